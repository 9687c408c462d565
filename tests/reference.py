"""The paper's equations again, plainly and in float64, from its words: what the package is compared with."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def temperature(frequency, all_frequencies, alpha, shift_min, shift_max, step, period) -> np.ndarray:
    """Eqs. 6-8 for samples of the given frequencies."""
    low, high = min(all_frequencies), max(all_frequencies)
    base = alpha * math.cos(2 * math.pi * step / period) / 2
    return np.array(
        [
            base
            + (
                (k - low) / (high - low) * (shift_max - shift_min) + shift_min
                if high > low
                else (shift_min + shift_max) / 2
            )
            for k in frequency
        ]
    )


def info_nce_rows(anchors: Tensor, others: Tensor, tau: Tensor, first_positive: int = 0) -> Tensor:
    """Eq. 10 for each anchor, one at a time."""
    rows = []
    for i, anchor in enumerate(anchors):
        logits = torch.stack([anchor @ other for other in others]) / tau[i]
        rows.append(torch.logsumexp(logits, 0) - logits[first_positive + i])
    return torch.stack(rows)


def info_nce(images: Tensor, texts: Tensor, tau: Tensor) -> Tensor:
    """Eq. 12."""
    return (info_nce_rows(images, texts, tau).mean() + info_nce_rows(texts, images, tau).mean()) / 2


def max_margin(images: Tensor, texts: Tensor, margin: Tensor) -> Tensor:
    """Eq. 3 over all negatives in both directions, as the authors average it."""
    n = len(images)
    images = images / images.norm(dim=1, keepdim=True)
    texts = texts / texts.norm(dim=1, keepdim=True)
    hinges = []
    for i in range(n):
        positive = texts[i] @ images[i]
        for j in range(n):
            if j != i:
                hinges.append(torch.relu(margin[i] - positive + texts[i] @ images[j]))
                hinges.append(torch.relu(margin[i] - positive + texts[j] @ images[i]))
    return torch.stack(hinges).mean()
