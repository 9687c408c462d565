"""Embeddings in parts, in memory or mapped from files, and which of them a sample takes."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from typing import Union

import numpy as np

from ..errors import MMTSError

_GATHER = 512  # rows; each maps the pages around it, 64 KiB or so
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64


class Rows:
    """``[n, d]`` embeddings in one or several parts of any numeric type, read as float32 a block at a time.

    Pages of mapped files are given back once read: a pass over a file of any size holds one block.

    Raises:
        MMTSError: the parts differ in dimension.
    """

    def __init__(self, parts: Union[np.ndarray, Sequence[np.ndarray]]) -> None:
        self.parts = [parts] if isinstance(parts, np.ndarray) else list(parts)
        self.width = self.parts[0].shape[1]
        for number, part in enumerate(self.parts):
            if part.shape[1] != self.width:
                raise MMTSError(
                    f"part {number} of the embeddings has {part.shape[1]} dimensions, part 0 has {self.width}; "
                    "all must come from one encoder"
                )
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """``(first row, [<= size, d] float32)`` over all rows in order."""
        for start, part in zip(self._starts, self.parts):
            for offset in range(0, len(part), size):
                yield int(start) + offset, np.asarray(part[offset : offset + size], np.float32)
                release(part)

    def take(self, index: np.ndarray) -> np.ndarray:
        """``[m, d]`` float32: the rows of ``index``, in its order."""
        taken = np.empty((len(index), self.width), np.float32)
        order = np.argsort(index, kind="stable")
        ends = np.searchsorted(index[order], self._starts)
        for start, part, low, high in zip(self._starts, self.parts, ends, ends[1:]):
            for offset in range(low, high, _GATHER):
                places = order[offset : min(offset + _GATHER, high)]
                taken[places] = part[index[places] - start]
                release(part)
        return taken


def release(part: np.ndarray) -> None:
    """Give the memory of a mapped file back; what is read again is mapped again."""
    base = part.base
    if isinstance(part, np.memmap) and isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)  # a mapping opened for reading only: nothing is lost


def caption_hashes(captions: Sequence[str]) -> np.ndarray:
    """``[n]`` uint64, the same on every machine and in every process."""
    digests = b"".join(hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def priorities(hashes: np.ndarray, weight: np.ndarray, seed: int) -> np.ndarray:
    """``[n]`` float64: the places of a weighted sample go to the highest (priority sampling, Duffield et al. 2007).

    A row's priority is ``weight / u`` with ``u`` uniform in (0, 1], drawn from its hash and the seed. So a sample does
    not depend on the order of the rows or on how they are cut into parts, and parts can choose their own candidates.
    """
    with np.errstate(over="ignore"):
        x = hashes + np.uint64(seed % (1 << 64)) * _INCREMENT + _INCREMENT
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    uniform = ((x >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
    return weight / uniform


def sample(priority: np.ndarray, weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``size`` rows of highest priority and what each stands for.

    Returns:
        ``[m]`` indices by descending priority, and ``[m]`` float64 weights whose sum over any subset is an unbiased
        estimate of that subset's weight: ``max(weight, threshold)``, with the threshold the highest priority left out.
    """
    if size >= len(priority):
        order = np.argsort(-priority, kind="stable")
        return order, weight[order].astype(np.float64)
    best = np.argpartition(-priority, size)[: size + 1]
    best = best[np.argsort(-priority[best], kind="stable")]
    chosen, threshold = best[:size], priority[best[size]]
    return chosen, np.maximum(weight[chosen], threshold)
