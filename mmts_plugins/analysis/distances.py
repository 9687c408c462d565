"""Histograms of what a model compares by: true and false pairs, images with images, texts with texts (Fig. 8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..evaluation.retrieval import Similarity

KINDS = ("positive", "negative", "image_image", "text_text")
_SIDE = 1024  # of a square of similarities held at once, some 30 bytes each


@dataclass(frozen=True)
class Histogram:
    """Counts of similarities.

    Attributes:
        edges: ``[bins + 1]``, the same for every kind.
        counts: ``[bins]`` whole numbers for each of :data:`KINDS`: N of positive pairs, ``N (N - 1)`` of the others,
            each two images (or texts) once in either order.
        mean: of each kind, from the numbers themselves.
        overlap: the share of negative pairs that are at least as alike as the middling positive pair.
    """

    edges: np.ndarray
    counts: dict[str, np.ndarray]
    mean: dict[str, float]
    overlap: float


def histogram(
    images: Tensor,
    texts: Tensor,
    similarity: Similarity,
    low: float,
    high: float,
    bins: int = 200,
    watch: Callable[[], object] = lambda: None,
) -> Histogram:
    """Of ``[N, D]`` features whose rows are pairs; in blocks, never ``N x N``.

    Args:
        low, high: between which all similarities lie; what rounding puts beside them counts in the first or last bin.
        watch: called after each block of rows, of which there are :func:`blocks`.
    """
    count = len(images)
    counts = {kind: np.zeros(bins, np.int64) for kind in KINDS}
    sums = dict.fromkeys(KINDS, 0.0)
    positive = []
    parts = list(torch.arange(count).split(_SIDE))
    for place, rows in enumerate(parts):
        for number, columns in enumerate(parts):
            for kind, first, second in (
                ("negative", images, texts),
                ("image_image", images, images),
                ("text_text", texts, texts),
            ):
                mirrored = kind != "negative"
                if mirrored and number < place:
                    continue  # counted twice where it was met first
                weight = 2 if mirrored and number > place else 1
                block = similarity(first[rows], second[columns])
                found, total = _counted(block, low, high, bins), float(block.sum(dtype=torch.float64))
                if number == place:
                    own = block.diagonal()
                    found, total = found - _counted(own, low, high, bins), total - float(own.sum(dtype=torch.float64))
                    if kind == "negative":
                        positive.append(own.double())
                counts[kind] += weight * found
                sums[kind] += weight * total
        watch()
    pairs = torch.cat(positive)
    counts["positive"] = _counted(pairs, low, high, bins)
    sums["positive"] = float(pairs.sum())
    many = {kind: max(1, int(each.sum())) for kind, each in counts.items()}
    edges = np.linspace(low, high, bins + 1)
    middling = min(int((float(pairs.median()) - low) / (high - low) * bins), bins - 1)
    overlap = counts["negative"][middling:].sum() / many["negative"]
    return Histogram(edges, counts, {kind: sums[kind] / many[kind] for kind in KINDS}, float(overlap))


def blocks(count: int) -> int:
    """How many blocks of rows :func:`histogram` takes."""
    return -(-count // _SIDE)


def _counted(values: Tensor, low: float, high: float, bins: int) -> np.ndarray:
    place = ((values.flatten() - low) * (bins / (high - low))).long().clamp_(0, bins - 1)
    return torch.bincount(place, minlength=bins).cpu().numpy()
