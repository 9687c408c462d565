"""Names of Python's own functions and what their docstrings say: real text pairs with a long tail, without a download.

    python train.py --output runs/plain
    python train.py --output runs/mmts --loss mmts --mmts-clusters clusters.parquet

Nothing here knows of mmts-plugins: the second line is the first with flags. ``--write FILE`` writes the training pairs
for ``mmts cluster`` and stops.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import re
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

try:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
except ImportError:  # until 5.2
    from sentence_transformers.models import StaticEmbedding


def pairs() -> list[tuple[str, str]]:
    """Each documented function and class of the standard library: the first line of its docstring, and its name."""
    found: dict[str, str] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        if "site-packages" in module or "test" in module.lower():
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # of lib2to3, on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                line = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
                name = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", node.name))
                if len(line) > 15 and name:
                    found.setdefault(line, f"{module.replace('.', ' ')} {name}")
    return list(found.items())


def split(every: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """A tenth is held out, told by its text, so that it is the same on every machine."""
    held = [pair for pair in every if hashlib.sha256(pair[0].encode()).digest()[0] < 26]
    return [pair for pair in every if pair not in set(held)], held


def model_of(texts: list[str], dimensions: int) -> SentenceTransformer:
    """The mean of learned vectors of word pieces, which are learned from the texts: seconds on a CPU, no download."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=6000, special_tokens=["[UNK]"]))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dimensions)], device="cpu")


def recall(model: SentenceTransformer, held: list[tuple[str, str]]) -> dict[str, float]:
    texts, names = (model.encode(list(side), convert_to_tensor=True, normalize_embeddings=True) for side in zip(*held))
    ranks = (texts @ names.T).argsort(dim=1, descending=True).argsort(dim=1).diagonal()
    return {f"R@{k}": round(100 * float((ranks < k).float().mean()), 2) for k in (1, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/docstrings"))
    parser.add_argument("--write", type=Path, help="write the training pairs as CSV (text, name), and stop")
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    training, held = split(pairs())
    if args.write:
        with args.write.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "name"), *training])
        print(f"{len(training)} pairs to train on, {len(held)} held out: {args.write}")
        return
    torch.manual_seed(args.seed)
    model = model_of([text for pair in training for text in pair], dimensions=128)
    texts, names = zip(*training)
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(args.output), num_train_epochs=args.epochs, per_device_train_batch_size=128, learning_rate=0.05,
        warmup_steps=20, logging_steps=50, save_strategy="no", report_to=["none"], seed=args.seed, use_cpu=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"text": texts, "name": names}),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    found = recall(model, held)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "recall.json").write_text(json.dumps(found))
    print(f"held out, {len(held)} pairs, text to name: {found}")


if __name__ == "__main__":
    main()
