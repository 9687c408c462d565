"""Image-text retrieval and zero-shot accuracy as papers report them, from features.

Everything reduces to one number per query, its rank (:func:`ranks`): recall@k is the share of ranks below k, and
zero-shot accuracy is recall@1 with one candidate per class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
import torch.nn.functional as F

from .errors import MMTSError

KS = (1, 5, 10)
TIE = 1e-6
"""Cosine similarities closer than this are ties: float32 cannot tell them apart, and a matrix product may give equal
columns results that differ in the last bits."""


def ranks(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    query_labels: torch.Tensor,
    candidate_labels: torch.Tensor,
    block_size: int = 1024,
) -> torch.Tensor:
    """Zero-based rank of each query's best relevant candidate; a candidate is relevant if its label is the query's.

    Ties are settled against the model: the rank counts the irrelevant candidates that score at least as high (up to
    :data:`TIE`), so a model that maps everything to one point gets a recall of 0, not of 1.

    Args:
        queries: ``[Q, D]``, L2-normalised.
        candidates: ``[C, D]``, L2-normalised.
        query_labels: ``[Q]`` integers.
        candidate_labels: ``[C]`` integers.
        block_size: queries compared at once; memory is ``block_size * C`` scores.

    Returns:
        ``[Q]`` int64 on the CPU.

    Raises:
        MMTSError: shapes do not fit, a feature is not finite, or a query has no relevant candidate.
    """
    for name, features, labels in (("queries", queries, query_labels), ("candidates", candidates, candidate_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise MMTSError(f"{name}: {tuple(labels.shape)} labels for features of shape {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise MMTSError(f"{name}: a feature is not a finite number; did the training diverge?")
    orphans = ~torch.isin(query_labels, candidate_labels)
    if orphans.any():
        raise MMTSError(f"{int(orphans.sum())} of {len(queries)} queries have no relevant candidate")
    result = []
    for block, labels in zip(queries.split(block_size), query_labels.split(block_size)):
        scores = block @ candidates.T
        relevant = labels[:, None] == candidate_labels
        best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
        result.append(((scores >= best - TIE) & ~relevant).sum(1).cpu())
    return torch.cat(result) if result else torch.empty(0, dtype=torch.int64)


def recall_at(rank: torch.Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """``{k: share of queries with a relevant candidate among the first k}``."""
    return {k: (rank < k).double().mean().item() for k in ks}


def image_text_recall(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    text_image: torch.Tensor,
    ks: Sequence[int] = KS,
) -> dict[str, dict[int, float]]:
    """Recall@k both ways for images with one or more captions each.

    An image counts as found if *any* of its captions is among the first k; a caption, if its image is.

    Args:
        image_features: ``[N, D]``, L2-normalised.
        text_features: ``[M, D]``, L2-normalised.
        text_image: ``[M]``, the row of the image that each caption describes. Every image needs a caption.
        ks: the cut-offs.

    Returns:
        ``{"image_to_text": {k: recall}, "text_to_image": {k: recall}}``, recalls in ``[0, 1]``.
    """
    images = torch.arange(len(image_features), device=text_image.device)
    return {
        "image_to_text": recall_at(ranks(image_features, text_features, images, text_image), ks),
        "text_to_image": recall_at(ranks(text_features, image_features, text_image, images), ks),
    }


def class_embeddings(text_features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """``[num_classes, D]``: the normalised mean of each class's prompts, the usual template ensemble."""
    total = text_features.new_zeros(num_classes, text_features.shape[1])
    return F.normalize(total.index_add(0, labels, text_features), dim=1)


def zero_shot_accuracy(
    image_features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Share of each class's images whose nearest class embedding is their own.

    Args:
        image_features: ``[N, D]``, L2-normalised.
        class_features: ``[C, D]``, L2-normalised, see :func:`class_embeddings`.
        labels: ``[N]`` in ``[0, C)``.

    Returns:
        ``[C]`` float64; NaN for a class without images.
    """
    classes = torch.arange(len(class_features), device=labels.device)
    hits = ranks(image_features, class_features, labels, classes) == 0
    labels = labels.cpu()
    right = torch.bincount(labels, weights=hits.double(), minlength=len(class_features))
    return right / torch.bincount(labels, minlength=len(class_features))


def encode(
    model: Any,
    preprocess: Callable[[Any], torch.Tensor],
    tokenizer: Callable[[Sequence[str]], torch.Tensor],
    images: Sequence[Any],
    captions: Sequence[str],
    batch_size: int = 256,
    device: Union[str, torch.device] = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """L2-normalised float32 features, on the CPU, of an OpenCLIP model.

    Args:
        model: an OpenCLIP model, already on ``device``; it is put in evaluation mode.
        preprocess: the validation transform, PIL image to tensor.
        tokenizer: strings to token ids.
        images: ``[N]`` paths.
        captions: ``[M]`` strings.
        batch_size: how many are encoded at once.
        device: where to compute.

    Returns:
        image features ``[N, D]`` and text features ``[M, D]``.

    Raises:
        MMTSError: an image cannot be read, or there is nothing to encode.
    """
    from PIL import Image
    from tqdm import tqdm

    if not images or not captions:
        raise MMTSError(f"nothing to encode: {len(images)} images, {len(captions)} captions")

    def load(path: Any) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                return preprocess(image)
        except OSError as error:
            raise MMTSError(f"{path}: cannot read the image: {error}") from error

    model.eval()
    kinds = (
        (images, lambda batch: model.encode_image(torch.stack([load(path) for path in batch]).to(device))),
        (captions, lambda batch: model.encode_text(tokenizer(list(batch)).to(device))),
    )
    features = []
    total = len(images) + len(captions)
    with torch.inference_mode(), tqdm(total=total, desc="  encode", leave=False, disable=None) as bar:
        for items, encoder in kinds:
            parts = []
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                parts.append(F.normalize(encoder(batch).float(), dim=-1).cpu())
                bar.update(len(batch))
            features.append(torch.cat(parts))
    return features[0], features[1]
