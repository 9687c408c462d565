"""Hashes: of a string, by which keys are found and samples drawn, and of what training reads of a table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_NUMBERS = {"cluster": "<i4", "frequency": "<f8", "count": "<i8"}


def hash_strings(strings: Iterable[str]) -> np.ndarray:
    """``[n]`` uint64, the same on every machine and in every process."""
    # surrogatepass: JSON may hold half a character, which no table does.
    digests = (hashlib.blake2b(each.encode(errors="surrogatepass"), digest_size=8).digest() for each in strings)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


class ContentHash:
    """:attr:`.table.ClusterTable.content_hash`, some rows at a time."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        # One digest for each column, so that rows may come in pieces of any size.
        self._columns = {name: hashlib.blake2b(digest_size=16) for name in ("length", "key", *_NUMBERS)}

    def add(self, columns: Mapping[str, Any]) -> None:
        """Take in the next rows: ``key`` an Arrow array of large strings, the others NumPy arrays."""
        self._columns["length"].update(_lengths(columns["key"]))
        self._columns["key"].update(_text(columns["key"]))
        for name in _NUMBERS:
            self._columns[name].update(_bytes(name, columns[name]))

    def hexdigest(self) -> str:
        whole = hashlib.blake2b(self._kind.encode(), digest_size=16, person=b"mmts table 2")
        for digest in self._columns.values():
            whole.update(digest.digest())
        return whole.hexdigest()


def legacy_hash(kind: str, pieces: Callable[[str], Iterable[Any]]) -> str:
    """Compute the content hash of format 1: lengths of keys, keys, clusters, frequencies, each of all rows. No counts.

    Args:
        kind: of the keys.
        pieces: the name of a column to its arrays, which are as in :meth:`ContentHash.add`.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for keys in pieces("key"):
        digest.update(_lengths(keys))
    for keys in pieces("key"):
        digest.update(_text(keys))
    for name in ("cluster", "frequency"):
        for numbers in pieces(name):
            digest.update(_bytes(name, numbers))
    return digest.hexdigest()


def _lengths(keys: pa.Array) -> bytes:
    lengths: bytes = pc.binary_length(keys).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
    return lengths


def _text(keys: pa.Array) -> Union[bytes, memoryview]:
    _, offsets, text = keys.buffers()
    if text is None or offsets is None or not len(keys):
        return b""
    ends = np.frombuffer(offsets, np.int64)[[keys.offset, keys.offset + len(keys)]]
    return memoryview(text)[int(ends[0]) : int(ends[1])]


def _bytes(name: str, numbers: np.ndarray) -> memoryview:
    return np.ascontiguousarray(numbers, _NUMBERS[name]).view(np.uint8).data
