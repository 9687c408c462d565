"""The loss around a model's weights, and its gradient's norm, at several temperatures: Fig. 4, after Li et al. (2018).

Features do not depend on the temperature: they are computed once at each place, and serve every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.retrieval import Similarity

Encode = Callable[[slice], tuple[Tensor, Tensor]]
"""Features of images and texts ``[n, D]`` of some rows of the batch, as the model gives them at this moment."""


@dataclass(frozen=True)
class Landscape:
    """Losses and gradients.

    Attributes:
        steps: ``[G]`` multiples of the directions, 0 in the middle: the model itself.
        losses: ``[T, G, G]``, along the first direction, then the second.
        gradient_steps: ``[H]`` multiples of the first direction.
        gradients: ``[T, H]`` norms of the loss's gradient over all weights.
        centre: ``[T]`` the model's own loss, computed before anything was moved.
    """

    scales: Sequence[float]
    steps: np.ndarray
    losses: np.ndarray
    gradient_steps: np.ndarray
    gradients: np.ndarray
    centre: np.ndarray


def contrastive(images: Tensor, texts: Tensor, scale: float, similarity: Similarity) -> Tensor:
    """CLIP's symmetric loss at a logit scale."""
    logits = scale * similarity(images, texts)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


_TOKENS: dict[str, Callable[[Any], int]] = {
    "class_embedding": lambda tower: 1,
    "extra_class_embedding": lambda tower: tower.mmts_tokens - 1,
    "cls_emb": lambda tower: getattr(tower, "mmts_tokens", 1),
}
"""Vectors that are class tokens, and how many of them stand in one."""


def direction(model: nn.Module, draw: torch.Generator) -> dict[str, Tensor]:
    """A random direction with the norms of the model's weights, filter by filter.

    A filter is a row of a weight, a column of a raw ``[in, out]`` projection, and one class token; biases, norms and
    scales do not move.
    """
    found = {}
    for name, weight in model.named_parameters():
        short = name.rpartition(".")[2]
        drawn = torch.randn(weight.shape, generator=draw).to(weight)
        if short in ("proj", "text_projection"):
            found[name] = _scaled(drawn.T, weight.detach().T).T
        elif weight.ndim > 1:
            found[name] = _scaled(drawn.flatten(1), weight.detach().flatten(1)).view_as(weight)
        elif short in _TOKENS:
            many = _TOKENS[short](model.get_submodule(name.rpartition(".")[0]))
            found[name] = _scaled(drawn.view(many, -1), weight.detach().view(many, -1)).flatten()
        else:
            found[name] = torch.zeros_like(weight)
    return found


def _scaled(drawn: Tensor, weight: Tensor) -> Tensor:
    return drawn * (weight.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True).clamp_min(1e-12))


def landscape(
    model: nn.Module,
    encode: Encode,
    rows: int,
    scales: Sequence[float],
    similarity: Similarity,
    grid: int = 15,
    gradient_grid: int = 7,
    radius: float = 1.0,
    part: int = 64,
    seed: int = 0,
    watch: Callable[[], object] = lambda: None,
) -> Landscape:
    """Measure on one batch of ``rows`` pairs; the model's weights are put back as they were.

    Args:
        grid, gradient_grid: places along a direction, odd numbers: the middle one is the model.
        radius: the largest multiple of a direction.
        part: pairs encoded at once.
        watch: called at every place; there are ``grid ** 2 + gradient_grid * len(scales)``.
    """
    draw = torch.Generator().manual_seed(seed)
    first, second = direction(model, draw), direction(model, draw)
    steps, gradient_steps = (np.linspace(-radius, radius, many) for many in (grid, gradient_grid))
    with torch.no_grad():
        centre = _losses(encode, rows, part, scales, similarity)
        losses = np.zeros((len(scales), grid, grid))
        for i, along in enumerate(steps):
            for j, across in enumerate(steps):
                with _moved(model, (first, along), (second, across)):
                    losses[:, i, j] = _losses(encode, rows, part, scales, similarity)
                watch()
    gradients = np.zeros((len(scales), gradient_grid))
    for j, along in enumerate(gradient_steps):
        with _moved(model, (first, along)):
            with torch.no_grad():
                features = _features(encode, rows, part)
            for number, scale in enumerate(scales):
                gradients[number, j] = _gradient_norm(model, encode, features, part, scale, similarity)
                watch()
    return Landscape(list(scales), steps, losses, gradient_steps, gradients, centre)


def _features(encode: Encode, rows: int, part: int) -> tuple[Tensor, Tensor]:
    parts = [encode(slice(start, start + part)) for start in range(0, rows, part)]
    return torch.cat([images for images, _ in parts]), torch.cat([texts for _, texts in parts])


def _losses(encode: Encode, rows: int, part: int, scales: Sequence[float], similarity: Similarity) -> np.ndarray:
    images, texts = (each.double() for each in _features(encode, rows, part))
    return np.array([float(contrastive(images, texts, scale, similarity)) for scale in scales])


def _gradient_norm(
    model: nn.Module, encode: Encode, features: tuple[Tensor, Tensor], part: int, scale: float, similarity: Similarity
) -> float:
    """Through the features, a part of the batch at a time: never the graph of a whole batch."""
    leaves = [each.detach().requires_grad_() for each in features]
    wanted = torch.autograd.grad(contrastive(leaves[0], leaves[1], scale, similarity), leaves)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.zero_grad(set_to_none=True)
    for start in range(0, len(features[0]), part):
        rows = slice(start, start + part)
        torch.autograd.backward(encode(rows), tuple(each[rows] for each in wanted))
    norms = [weight.grad.norm() for weight in weights if weight.grad is not None]
    model.zero_grad(set_to_none=True)
    return float(torch.stack(norms).norm()) if norms else 0.0


@contextmanager
def _moved(model: nn.Module, *moves: tuple[dict[str, Tensor], float]) -> Iterator[None]:
    weights = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for along, many in moves:
                for name, weight in weights.items():
                    weight.add_(along[name], alpha=float(many))
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
