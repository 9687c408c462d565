"""A user's script, which knows nothing of us: a tiny CLIP of transformers', noise images, its Trainer."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, HfArgumentParser, PreTrainedTokenizerFast, Trainer, TrainingArguments

NOUNS = ["dog", "cat", "bird", "sea", "car", "tree"]
WORDS = ["[PAD]", "[UNK]", "a", "photo", "of", "the", "[EOS]", *NOUNS]
LENGTH = 8
TEXT = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": LENGTH, "eos_token_id": 6, "bos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def tokenizer_of(folder: Path, **options: object) -> Path:
    """A tokenizer of the model's own words, saved as ``from_pretrained`` wants it."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    given = {"model_max_length": LENGTH, "pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", **options}
    PreTrainedTokenizerFast(tokenizer_object=words, **given).save_pretrained(folder)
    config = folder / "tokenizer_config.json"  # as every version since 4 reads it
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def model_of(kind: str = "clip", seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    if kind == "dual":
        from transformers import BertConfig, BertModel, VisionTextDualEncoderModel, ViTConfig, ViTModel

        sizes = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                               "num_attention_heads", "max_position_embeddings")}  # fmt: skip
        towers = {"vision_model": ViTModel(ViTConfig(**VISION)), "text_model": BertModel(BertConfig(**sizes))}
        model = VisionTextDualEncoderModel(**towers)
        model.config.projection_dim = 16
        return model
    if kind == "siglip":
        from transformers import SiglipConfig, SiglipModel

        return SiglipModel(SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=VISION))
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def captions() -> list[str]:
    return [f"a photo of the {NOUNS[min(i % 8, 5)]}" for i in range(48)]


class Pairs(torch.utils.data.Dataset):
    def __init__(self, tokenizer: object) -> None:
        made = torch.Generator().manual_seed(3)
        self.images = torch.randn(48, 3, 16, 16, generator=made)
        self.texts, self.tokenizer = captions(), tokenizer

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"image": self.images[index], "caption": self.texts[index] + " [EOS]"}


class Collate:
    """To a fixed length, or to the batch's longest text."""

    def __init__(self, tokenizer: object, padding: str) -> None:
        self.tokenizer, self.padding = tokenizer, padding

    def __call__(self, examples: list[dict[str, object]]) -> dict[str, object]:
        texts = [example["caption"] for example in examples]
        tokens = self.tokenizer(texts, padding=self.padding, max_length=LENGTH, truncation=True, return_tensors="pt")
        pictures = torch.stack([example["image"] for example in examples])
        given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return {"pixel_values": pictures, **given, "return_loss": True}


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **rest):
        outputs = model(**inputs)
        loss = outputs["logits_per_image"].square().mean()
        return (loss, outputs) if return_outputs else loss


class OwnTrainer(Trainer):
    """As people write one: the model's loss, logged by the way."""

    def compute_loss(self, model, inputs, return_outputs=False, **rest):
        outputs = model(**inputs)
        self.latest = float(outputs["loss"].detach())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


@dataclass
class Script:
    tokenizer: Path = field(metadata={"help": "folder"})
    kind: str = "clip"
    padding: str = "max_length"
    trainer: str = "Trainer"
    resume: str = ""


def main() -> None:
    own, settings = HfArgumentParser((Script, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(own.tokenizer)
    model = model_of(own.kind)
    model.name_or_path = str(own.tokenizer)
    settings.remove_unused_columns = False
    made = {"Trainer": Trainer, "OwnTrainer": OwnTrainer, "OwnLoss": OwnLoss}[own.trainer]
    trainer = made(
        model=model, args=settings, train_dataset=Pairs(tokenizer), data_collator=Collate(tokenizer, own.padding)
    )
    trainer.train(resume_from_checkpoint=own.resume or None)
    rank = settings.process_index
    torch.save(model.state_dict(), Path(settings.output_dir) / f"final-{rank}.pt")
    print("LOSS", [each["loss"] for each in trainer.state.log_history if "loss" in each], flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order


if __name__ == "__main__":
    main()
