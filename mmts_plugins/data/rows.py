"""Embeddings in parts, in memory or mapped from files."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Union

import numpy as np

from ..errors import MMTSError

_GATHER = 512  # rows; each maps the pages around it, 64 KiB or so


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
