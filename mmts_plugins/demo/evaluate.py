"""What the demo measures on the balanced held-out images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .data import IMAGE_KEY, LABEL_KEY, Split, captions_of

DEFINITION = (
    "All images of a digit share its captions: a caption and an image belong together if they are of the same digit. "
    "Image → text: the share of held-out images with a caption of their digit among the k most similar of all 50 "
    "captions. Text → image: the share of captions with an image of their digit among the k most similar held-out "
    "images. Accuracy (zero-shot): the share of held-out images that are more similar to the mean of their own digit's "
    "captions than to any other digit's. Ties count as misses."
)


@dataclass(frozen=True)
class Scores:
    """Shares in [0, 1]; see :data:`DEFINITION`.

    Attributes:
        recall: ``{"image_to_text" | "text_to_image": {k: share}}``.
        accuracy: over all held-out images.
        groups: ``{"head" | "middle" | "tail": accuracy}``.
        digits: ``{digit: accuracy}``.
    """

    recall: dict[str, dict[int, float]]
    accuracy: float
    groups: dict[str, float]
    digits: dict[int, float]


def evaluate(model: str, checkpoint: Path, folder: Path, parts: Split) -> Scores:
    """Score one trained model on ``folder/data/val.tsv``."""
    import pandas as pd
    import torch

    from ..evaluation.model import encode, load_model
    from ..evaluation.retrieval import class_embeddings, ranks, recall_at, zero_shot_accuracy

    frame = pd.read_csv(folder / "data" / "val.tsv", sep="\t")
    images = [folder / path for path in frame[IMAGE_KEY]]
    image_digits = torch.tensor(frame[LABEL_KEY].to_numpy())
    captions = [caption for digit in range(10) for caption in captions_of(digit)]
    caption_digits = torch.arange(10).repeat_interleave(len(captions) // 10)

    net, preprocess, tokenizer = load_model(model, checkpoint)
    image_features, text_features = encode(net, preprocess, tokenizer, images, captions)
    by_digit = zero_shot_accuracy(image_features, class_embeddings(text_features, caption_digits, 10), image_digits)
    return Scores(
        recall={
            "image_to_text": recall_at(ranks(image_features, text_features, image_digits, caption_digits)),
            "text_to_image": recall_at(ranks(text_features, image_features, caption_digits, image_digits)),
        },
        accuracy=by_digit.mean().item(),  # every digit has as many held-out images
        groups={name: by_digit[digits].mean().item() for name, digits in parts.groups().items()},
        digits={digit: by_digit[digit].item() for digit in range(10)},
    )
