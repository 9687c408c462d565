"""A user's script, which knows nothing of us: a tiny static model, pairs of texts, sentence-transformers' trainer."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers import losses as losses_of
from tokenizers import Tokenizer, models, pre_tokenizers

try:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
except ImportError:  # until 5.2
    from sentence_transformers.models import StaticEmbedding

NOUNS = ["dog", "cat", "bird", "sea", "car", "tree"]
WORDS = ["[UNK]", "a", "photo", "of", "the", "seen", "today", *NOUNS, *[f"w{i}" for i in range(20)]]


def model_of(seed: int = 0) -> SentenceTransformer:
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def rows(negatives: bool = False) -> Dataset:
    found = {"caption": [], "sentence": []}
    if negatives:
        found["negative"] = []
    for i in range(48):
        noun = NOUNS[min(i % 8, 5)]
        found["caption"].append(f"a photo of the {noun}")
        found["sentence"].append(f"{noun} seen today w{i % 20}")
        if negatives:
            found["negative"].append(f"{NOUNS[(i + 1) % 6]} w{(i + 3) % 20}")
    return Dataset.from_dict(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kind", default="MultipleNegativesRankingLoss")
    parser.add_argument("--negatives", action="store_true")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--resume", default=None)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--gather", action="store_true")
    args = parser.parse_args()
    model = model_of()
    kind, wrap = args.kind.split(":")[0], args.kind.endswith(":matryoshka")
    if kind.startswith(("GIST", "CachedGIST")):
        loss = getattr(losses_of, kind)(model, model_of(1))
    elif kind == "CachedMultipleNegativesRankingLoss":
        loss = losses_of.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    else:
        loss = getattr(losses_of, kind)(model, **({"gather_across_devices": True} if args.gather else {}))
    if wrap:
        loss = losses_of.MatryoshkaLoss(model, loss, matryoshka_dims=[16, 8])
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(args.output), per_device_train_batch_size=8, num_train_epochs=args.epochs, learning_rate=1e-2,
        gradient_accumulation_steps=args.accumulation, bf16=args.bf16, use_cpu=True, logging_steps=1, save_steps=3,
        report_to=["none"], disable_tqdm=True, seed=7, dataloader_num_workers=args.workers,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model=model, args=settings, train_dataset=rows(args.negatives), loss=loss)
    trainer.train(resume_from_checkpoint=args.resume)
    torch.save(model.state_dict(), args.output / f"final-{settings.process_index}.pt")
    print("LOSS", [each["loss"] for each in trainer.state.log_history if "loss" in each], flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order


if __name__ == "__main__":
    main()
