"""How common a sample's concept is without any cluster: neighbours within a cosine radius, or how near the nearest are.

Both compare every row with reference rows: with all of them where there are few (then nothing depends on a seed), else
with a weighted sample, so that memory stays bounded and time linear in the number of rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from ..data.rows import Rows
from ..device import pick_device
from .sampling import priorities, sample

REFERENCES = 32_768

_BLOCK = 512  # rows against all references: 64 MiB of similarities
_PAIR_ROWS = 4096


def auto_radius(points: Rows, clusters: int) -> float:
    """The cosine similarity that one pair of rows in ``clusters`` exceeds: ``n / clusters`` neighbours on average.

    Taken from the pairs among at most 4,096 rows, always the same ones.
    """
    ones = np.ones(len(points))
    chosen, _ = sample(priorities(np.arange(len(points), dtype=np.uint64), ones, 0), ones, _PAIR_ROWS)
    x = _unit(torch.from_numpy(points.take(chosen)))
    similarity = (x @ x.T)[torch.triu(torch.ones(len(x), len(x), dtype=torch.bool), 1)]
    return float(np.quantile(similarity.numpy(), 1 - 1 / clusters)) if len(similarity) else 1.0


def radius_counts(
    points: Rows, weight: np.ndarray, hashes: np.ndarray, radius: float, references: int = REFERENCES,
    seed: int = 0, device: Optional[str] = None,
) -> np.ndarray:  # fmt: skip
    """``[n]`` float64: how many samples lie within a cosine similarity of at least ``radius``, oneself included.

    Args:
        weight: ``[n]`` how many samples each row stands for; rows of weight zero are compared, but are no reference.
        hashes: ``[n]`` uint64 by which references are drawn where there are more than ``references`` rows.
    """
    counts = weight.astype(np.float64)
    for start, own, similarity, mass in _against_references(points, weight, hashes, references, seed, device):
        near = (similarity >= radius).to(torch.float32)
        rows, columns = own
        near[rows, columns] = 0  # counted already, and exactly
        counts[start : start + len(near)] += (near @ mass).double().cpu().numpy()
    return counts


def nearness(
    points: Rows, weight: np.ndarray, hashes: np.ndarray, neighbours: int, references: int = REFERENCES,
    seed: int = 0, device: Optional[str] = None,
) -> np.ndarray:  # fmt: skip
    """``[n]`` float64 in (0, 1]: the mean of ``(1 + cosine) / 2`` over the nearest ``neighbours`` other samples.

    The inverse distance to the k-th neighbour, the textbook density, is infinite for a caption that occurs k times;
    this is bounded and orders samples much alike. A caption that occurs 40 times has 39 neighbours at cosine 1.
    """
    result = np.empty(len(points))
    for start, own, similarity, mass in _against_references(points, weight, hashes, references, seed, device):
        rows, columns = own
        similarity[rows, columns] = -torch.inf
        value, place = similarity.topk(min(neighbours, similarity.shape[1]), dim=1)
        same = torch.from_numpy(np.maximum(weight[start : start + len(value)] - 1, 0)).to(value)
        value = torch.cat([torch.ones_like(value[:, :1]), ((1 + value) / 2).clamp(0, 1)], 1)
        room = neighbours - torch.cat([torch.zeros_like(value[:, :1]), torch.cat([same[:, None], mass[place]], 1)
                                       .cumsum(1)[:, :-1]], 1)  # fmt: skip
        share = torch.minimum(torch.cat([same[:, None], mass[place]], 1), room.clamp(min=0))
        total = share.sum(1).clamp(min=1e-12)
        result[start : start + len(value)] = ((share * value).sum(1) / total).double().cpu().numpy()
    return np.maximum(result, 1e-12)


def _against_references(
    points: Rows, weight: np.ndarray, hashes: np.ndarray, references: int, seed: int, device: Optional[str]
) -> Iterator[tuple[int, tuple[Tensor, Tensor], Tensor, Tensor]]:
    """Blocks of rows: the first row, where rows meet themselves, ``[b, m]`` similarities, and the ``[m]`` weights."""
    from tqdm import tqdm

    where = pick_device(device)
    chosen, counts = sample(priorities(hashes, weight, seed), weight, references)
    chosen, counts = chosen[counts > 0], counts[counts > 0]
    reference = _unit(torch.from_numpy(points.take(chosen)).to(where))
    mass = torch.from_numpy(counts).to(where, torch.float32)
    place = np.full(len(points), -1)
    place[chosen] = np.arange(len(chosen))
    with tqdm(total=len(points), desc="neighbours", unit="row", file=sys.stderr, disable=len(points) < 50_000) as bar:
        for start, block in points.blocks(_BLOCK):
            x = _unit(torch.from_numpy(block).to(where))
            own = place[start : start + len(block)]
            rows = np.flatnonzero(own >= 0)
            meet = torch.from_numpy(rows).to(where), torch.from_numpy(own[rows]).to(where)
            yield start, meet, x @ reference.T, mass
            bar.update(len(block))


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)
