"""The two losses as pure functions of features and a per-row temperature or margin (paper, Eqs. 2-5, 8, 10-12)."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def _full_precision(*tensors: Tensor) -> list[Tensor]:
    """Half types to float32 (products, exponents and sums of a loss need it); float32 and float64 as they are."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor,
    all_image_features: Optional[Tensor] = None,
    all_text_features: Optional[Tensor] = None,
    first_positive: int = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """InfoNCE in both directions with one temperature per row (paper, Eqs. 10-12 with tau_i of Eq. 8).

    Row ``i`` of the image-to-text and of the text-to-image similarities is divided by ``temperature[i]``; the loss is
    the mean of the two cross-entropies. Exact under autocast: products, exponents and sums are done in float32 (in
    float64 for float64 features).

    Args:
        image_features, text_features: ``[n, D]`` anchors, pairs by row, L2-normalised by the caller.
        temperature: ``[n]``, above zero.
        all_image_features, all_text_features: ``[N, D]`` what the anchors are compared with; the anchors themselves
            when left out. With ``local_loss`` these are the features of all ranks.
        first_positive: the column of the first anchor's positive.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        A scalar.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = _full_precision(image_features, text_features)
        scale = (1.0 / temperature).to(images.dtype).unsqueeze(1)
        target = torch.arange(first_positive, first_positive + len(images), device=images.device)
        if all_image_features is None or all_text_features is None:
            similarity = images @ texts.T
            image_to_text, text_to_image = similarity, similarity.T
        else:
            all_images, all_texts = _full_precision(all_image_features, all_text_features)
            image_to_text, text_to_image = images @ all_texts.T, texts @ all_images.T
        return (
            F.cross_entropy(scale * image_to_text, target, label_smoothing=label_smoothing)
            + F.cross_entropy(scale * text_to_image, target, label_smoothing=label_smoothing)
        ) / 2


def max_margin(image_features: Tensor, text_features: Tensor, margin: Tensor) -> Tensor:
    """Max-margin ranking in both directions with one margin per row (paper, Eq. 3 with m = tau_i of Eq. 8).

    With ``s`` the text-by-image similarities, the mean over all ``2 n (n - 1)`` hinges
    ``relu(margin_i - s_ii + s_ij)`` and ``relu(margin_i - s_ii + s_ji)``, ``j != i``. A single pair has no negative:
    the loss is zero (and keeps its graph).

    Args:
        image_features, text_features: ``[n, D]``, pairs by row, L2-normalised by the caller.
        margin: ``[n]``.

    Returns:
        A scalar.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = _full_precision(image_features, text_features)
        similarity = texts @ images.T
        n = len(similarity)
        threshold = (similarity.diagonal() - margin.to(similarity.dtype)).unsqueeze(1)
        hinges = F.relu(similarity - threshold) + F.relu(similarity.T - threshold)
        positives = torch.eye(n, dtype=torch.bool, device=similarity.device)
        return hinges.masked_fill(positives, 0.0).sum() / max(2 * n * (n - 1), 1)
