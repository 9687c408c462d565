"""A small CLIP of transformers' on scikit-learn's handwritten digits, made long-tailed, with transformers' own Trainer.

    python train.py --output_dir runs/plain
    python train.py --output_dir runs/mmts --loss mmts --mmts-clusters clusters.parquet --mmts-column caption

Nothing here knows of mmts-plugins: the second line is the first with flags. ``--write FILE`` writes the training
captions for ``mmts cluster`` and stops.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, HfArgumentParser, PreTrainedTokenizerFast, Trainer, TrainingArguments

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = ("a photo of the digit {}", "the number {}", "a handwritten {}", "{} in pencil")
LENGTH = 8


def samples() -> tuple[list[dict[str, Any]], torch.Tensor, torch.Tensor]:
    """Training pairs, of which digit d has a share of 0.75 ** d; 30 images of each digit are held out."""
    digits, draw = load_digits(), random.Random(0)
    images = torch.from_numpy(digits.images).float().sub(8).div(8)[:, None]
    rows: list[dict[str, Any]] = []
    held: list[tuple[int, int]] = []
    for digit in range(10):
        own = [i for i, label in enumerate(digits.target) if label == digit]
        draw.shuffle(own)
        held += [(i, digit) for i in own[:30]]
        kept = own[30 : 30 + round((len(own) - 30) * 0.75**digit)]
        rows += [{"image": images[i], "caption": draw.choice(FORMS).format(WORDS[digit])} for i in kept]
    index, labels = zip(*held)
    return rows, images[list(index)], torch.tensor(labels)


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[EOS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=LENGTH
    )


def model_of(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    text = {**tower, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    image = {**tower, "image_size": 8, "patch_size": 2, "num_channels": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=64))


class Collate:
    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        texts = [f"{text} [EOS]" for text in texts]
        tokens = self.tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.stack([row["image"] for row in rows])
        return {"pixel_values": images, **self.tokens([row["caption"] for row in rows]), "return_loss": True}


@dataclass
class Script:
    write: Optional[str] = field(default=None, metadata={"help": "write the training captions as CSV, and stop"})


def main() -> None:
    parser = HfArgumentParser((Script, TrainingArguments))
    parser.set_defaults(
        output_dir="runs/digits", num_train_epochs=15, per_device_train_batch_size=64, learning_rate=2e-3, use_cpu=True,
        warmup_steps=20, logging_steps=20, save_strategy="no", report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    script, settings = parser.parse_args_into_dataclasses()
    rows, images, labels = samples()
    captions = [row["caption"] for row in rows]
    if script.write:
        with open(script.write, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("caption",), *([caption] for caption in captions)])
        print(f"{len(captions)} captions: {script.write}")
        return
    tokenizer = tokenizer_of(captions)
    torch.manual_seed(settings.seed)
    model, collate = model_of(tokenizer), Collate(tokenizer)
    trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate)
    trainer.train()
    model.eval()
    with torch.no_grad():
        prompts = collate.tokens([FORMS[0].format(word) for word in WORDS])
        logits = model(pixel_values=images, **prompts)["logits_per_image"]
    right = logits.argmax(dim=1) == labels
    thirds = {"head": labels < 3, "middle": (labels >= 3) & (labels < 7), "tail": labels >= 7}
    found = {name: round(100 * float(right[part].float().mean()), 1) for name, part in thirds.items()}
    found = {"all": round(100 * float(right.float().mean()), 1), **found}
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(settings.output_dir) / "accuracy.json").write_text(json.dumps(found))
    print(f"zero-shot accuracy on {len(labels)} images: {found}")


if __name__ == "__main__":
    main()
