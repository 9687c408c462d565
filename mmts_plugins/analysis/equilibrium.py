"""The ratio of alignment to uniformity over temperature, by batch size and share of shuffled pairs: their Fig. 1.

Of the positive pair ``(i, p(i))`` at logit scale ``s`` it is ``exp(s a) / (R + C)``: ``a`` the pair's similarity, ``R``
and ``C`` the sums of ``exp(s ...)`` over the other texts of image ``i`` and the other images of text ``p(i)`` (Eq. 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..evaluation.retrieval import Similarity

_BLOCK = 2**20  # similarities held at once, some 30 bytes each
_LOST = 1e-6  # a sum that is less of what was taken off it has too few digits left


@dataclass(frozen=True)
class Curve:
    """One batch size and one share of shuffled pairs.

    Attributes:
        geometric: ``[T]`` ``exp(-mean loss)``; 1 is the equilibrium, where the mean loss is 0.
        arithmetic: ``[T]`` the mean of the ratios themselves, as the paper has it; a few pairs are most of it.
        scale: where the geometric mean is 1, between the two scales around it; ``None`` where it never is.
    """

    batch_size: int
    shuffled: float
    batches: int
    geometric: np.ndarray
    arithmetic: np.ndarray
    scale: Optional[float]


def log_sums(images: Tensor, texts: Tensor, scales: Tensor, similarity: Similarity) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of ``exp(s (similarity - top))`` over the *other* texts and images; ``top`` is the highest similarity.

    Args:
        images, texts: ``[B, D]``, row ``i`` of one belongs to row ``i`` of the other.
        scales: ``[T]`` float64.

    Returns:
        Rows ``[T, B]``, columns ``[T, B]``, both float64, and ``top``, a scalar. Memory is ``T * B`` and a block.
    """
    count = len(images)
    rows, columns = (torch.zeros(len(scales), count, dtype=torch.float64) for _ in range(2))
    step = max(1, _BLOCK // count)
    top = torch.stack([similarity(images[i : i + step], texts).double().amax() for i in range(0, count, step)]).amax()
    for start in range(0, count, step):
        block = similarity(images[start : start + step], texts).double() - top
        own = torch.arange(start, start + len(block))
        block[own - start, own] = -torch.inf
        for number, scale in enumerate(scales):
            weight = (scale * block).exp_()
            rows[number, own] = weight.sum(1)
            columns[number] += weight.sum(0)
    return rows, columns, top


def log_ratios(images: Tensor, texts: Tensor, scales: Tensor, others: Sequence[Tensor],
               similarity: Similarity) -> list[Tensor]:  # fmt: skip
    """``log`` of the ratio of every pair, for several ways to pair.

    Args:
        others: permutations ``[B]``: the text that stands beside each image. One pass serves all of them.

    Returns:
        ``[T, B]`` float64 for each permutation.
    """
    rows, columns, top = log_sums(images, texts, scales, similarity)
    own = _pairs(images, texts, similarity) - top
    found = []
    for other in others:
        pair = torch.where(other == torch.arange(len(other)), own, _pairs(images, texts[other], similarity) - top)
        exponents = scales[:, None] * pair
        moved = other != torch.arange(len(other))
        # Of a pair that was put together, the true ones are negatives now, and it is none.
        beside = (
            rows
            + columns[:, other]
            + moved.double()
            * ((scales[:, None] * own).exp() + (scales[:, None] * own[other]).exp() - 2 * exponents.exp())
        )
        lost = (moved & (beside < _LOST * exponents.exp()).any(0)).nonzero()[:, 0]
        for few in lost.split(max(1, _BLOCK // len(other))):
            beside[:, few] = _beside(images, texts, scales, few, other[few], similarity, top)
        found.append(exponents - beside.clamp_min(torch.finfo(torch.float64).tiny).log())
    return found


def _beside(
    images: Tensor, texts: Tensor, scales: Tensor, rows: Tensor, columns: Tensor, similarity: Similarity, top: Tensor
) -> Tensor:
    """Sums over the negatives of a few pairs, one by one: ``[T, F]``."""
    across = similarity(images[rows], texts).double() - top
    down = similarity(images, texts[columns]).double().T - top
    place = torch.arange(len(rows))
    across[place, columns] = down[place, rows] = -torch.inf
    return torch.stack([(scale * across).exp().sum(1) + (scale * down).exp().sum(1) for scale in scales])


def _pairs(images: Tensor, texts: Tensor, similarity: Similarity) -> Tensor:
    step = 256
    parts = [similarity(images[i : i + step], texts[i : i + step]).diagonal() for i in range(0, len(images), step)]
    return torch.cat(parts).double()


def equilibrium(
    images: Tensor,
    texts: Tensor,
    scales: Sequence[float],
    batch_sizes: Sequence[int],
    shuffled: Sequence[float],
    similarity: Similarity,
    batches: int = 4,
    seed: int = 0,
    watch: Callable[[], object] = lambda: None,
) -> list[Curve]:
    """Curves for every batch size and share.

    Args:
        images, texts: ``[N, D]`` of pairs.
        scales: logit scales, ascending.
        shuffled: shares of the pairs of a batch, in ``[0, 1]``, that get one another's texts.
        batches: how many batches of a size are drawn, at most, none of which shares a pair with another.
        watch: called after each batch.

    Raises:
        ConfigError: a batch size is more than there are pairs, or too small.
    """
    for size in batch_sizes:
        if not 2 <= size <= len(images):
            raise ConfigError(f"a batch size of {size}: there are {len(images)} pairs, and a batch has two or more")
    at = torch.tensor(list(scales), dtype=torch.float64)
    curves = []
    for size in batch_sizes:
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=draw)
        many = min(batches, len(images) // size)
        ratios: list[list[Tensor]] = [[] for _ in shuffled]
        for number in range(many):
            rows = order[number * size : (number + 1) * size]
            others = [_shuffled(size, share, draw) for share in shuffled]
            for place, found in enumerate(log_ratios(images[rows], texts[rows], at, others, similarity)):
                ratios[place].append(found)
            watch()
        for share, parts in zip(shuffled, ratios):
            logs = torch.cat(parts, dim=1)
            mean = logs.mean(1).numpy()
            arithmetic = logs.exp().mean(1).numpy()
            curves.append(Curve(size, share, many, np.exp(mean), arithmetic, _crossing(np.asarray(scales), mean)))
    return curves


def _shuffled(size: int, share: float, draw: torch.Generator) -> Tensor:
    """A permutation that moves ``share`` of the places, each to another."""
    other = torch.arange(size)
    many = round(share * size)
    if many >= 2:
        places = torch.randperm(size, generator=draw)[:many]
        other[places] = places.roll(1)
    return other


def _crossing(scales: np.ndarray, logs: np.ndarray) -> Optional[float]:
    """The lowest scale at which the mean log ratio passes zero, on a straight line over the logarithm of the scale."""
    for left, right in _neighbours(len(scales)):
        if logs[left] < 0 <= logs[right]:
            part = -logs[left] / (logs[right] - logs[left])
            return float(np.exp(np.log(scales[left]) + part * np.log(scales[right] / scales[left])))
    return None


def _neighbours(count: int) -> Iterator[tuple[int, int]]:
    return zip(range(count - 1), range(1, count))
