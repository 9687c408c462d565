"""From a batch's token ids, or its captions, to its concepts' frequencies, without a sync.

A host such as OpenCLIP hands the model nothing but token ids. The captions of the cluster table are tokenized once by
the host's own tokenizer and hashed to 64 bits a row; a batch is hashed the same way and found by binary search: nine to
twelve bytes per caption on the device, O(B log M) a step. A host that keeps the captions as text, such as VAST, needs
no tokenizer: strings are hashed and found in the same way, on the CPU.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from ._files import cache_folder, replacing
from .clusters import CAPTION, ClusterTable
from .errors import TableError
from .large import LargeTable, one_at_a_time, read_row_group, row_groups

logger = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]

_CHUNK = 2048
_CACHE_FROM = 20_000  # captions; a smaller index is built faster than a cache is worth
_PARALLEL_FROM = 100_000
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the increment of splitmix64, as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch shifts signed integers arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 products wrap around."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hash_tokens(tokens: Tensor, pad_id: int = 0) -> Tensor:
    """A 64-bit hash of each row of token ids, the same on every device.

    Trailing padding does not count, so a row hashes alike however far it was padded. Among n distinct rows about
    ``n^2 / 2^65`` pairs collide: 3e-7 for CC3M.

    Args:
        tokens: ``[B, L]``, any integer type.
        pad_id: the token that fills rows up.

    Returns:
        ``[B]`` int64.
    """
    tokens = tokens.long()
    position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    length = ((tokens != pad_id) * position).amax(dim=1, keepdim=True)
    factors = _mix(position * _GOLDEN) | 1
    values = _mix((tokens + 1) * factors) * (position <= length)
    return _mix(values.sum(dim=1) + length.squeeze(1) * _GOLDEN)


class TokenLookup:
    """Finds a tokenized caption's row of the cluster table.

    Args:
        table: keyed by caption.
        tokenizer: the host's own: a list of captions to ``[len, L]`` token ids.
        pad_id: the token it pads with.
        device: where batches will be looked up.

    Raises:
        TableError: the table is keyed by class, which token ids cannot tell.
    """

    def __init__(
        self, table: Union[ClusterTable, LargeTable], tokenizer: Tokenizer, pad_id: int, device: torch.device
    ) -> None:
        if table.kind != CAPTION:
            raise TableError(
                f"{table.source}: keyed by {table.kind}, but this host looks samples up by caption; make a table of "
                "captions (mmts cluster CAPTIONS, with --label-column and --column to use class labels)"
            )
        if isinstance(table, LargeTable):
            self.frequencies = table.levels
            hashes, code = _mapped_index(table, tokenizer, pad_id)
        else:
            hashes, rows = _cached_index(table, tokenizer, pad_id)
            # One small integer per caption; distinct frequencies are few (one per cluster for a single K-Means run).
            self.frequencies, code = np.unique(table.frequency[rows], return_inverse=True)
            # Signed: torch indexes with int16, not with uint16.
            code = code.astype(np.min_scalar_type(-len(self.frequencies)))
        self.merged = len(table) - len(hashes)
        self.missing = len(self.frequencies)
        self._pad_id = pad_id
        # On a CPU a mapped index stays where it is: all ranks of a node share its pages.
        self._hashes = torch.from_numpy(hashes).to(device)
        self._codes = torch.from_numpy(code).to(device)

    def __call__(self, tokens: Tensor) -> Tensor:
        """``[B, L]`` token ids to ``[B]`` int64 indices into :attr:`frequencies`; :attr:`missing` where unknown."""
        wanted = hash_tokens(tokens, self._pad_id)
        place = torch.searchsorted(self._hashes, wanted).clamp_(max=len(self._hashes) - 1)
        return torch.where(self._hashes[place] == wanted, self._codes[place].long(), self.missing)


class KeyLookup:
    """Finds a key of the cluster table, a caption or a clip id, by its text: nine to twelve bytes per key, on the CPU.

    Keys are compared by 64 bits of BLAKE2b: among ``n`` about ``n^2 / 2^65`` pairs collide, 3e-7 for CC3M.

    Attributes:
        frequencies: ``[U]`` distinct frequencies of the table, float64.
        missing: ``U``, the index of a key that is not in the table.
    """

    def __init__(self, table: ClusterTable) -> None:
        hashes = np.concatenate(
            [_hash_strings(table.keys.slice(start, _CHUNK).to_pylist()) for start in range(0, len(table), _CHUNK)]
        )
        self.frequencies, code = np.unique(table.frequency, return_inverse=True)
        self.missing = len(self.frequencies)
        order = np.argsort(hashes)
        self._hashes = hashes[order]
        self._codes = code[order].astype(np.min_scalar_type(self.missing))

    def __call__(self, keys: Sequence[str]) -> np.ndarray:
        """``n`` keys to ``[n]`` int64 indices into :attr:`frequencies`; :attr:`missing` where unknown."""
        wanted = _hash_strings(keys)
        place = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        return np.where(self._hashes[place] == wanted, self._codes[place].astype(np.int64), self.missing)


def _hash_strings(keys: Sequence[str]) -> np.ndarray:
    # surrogatepass: JSON may hold half a character, which no table does.
    digests = b"".join(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _cached_index(table: ClusterTable, tokenizer: Tokenizer, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted hashes and their table rows, from the cache where a large table met this tokenizer before."""
    if len(table) < _CACHE_FROM:
        return _build_index(table, tokenizer, pad_id)
    probes = table.keys.take(np.linspace(0, len(table) - 1, 512).astype(np.int64)).to_pylist()
    name = hashlib.blake2b(
        table.content_hash.encode() + table.count.tobytes() + _fingerprint(probes, tokenizer, pad_id), digest_size=16
    ).hexdigest()
    path = cache_folder() / f"tokens-{name}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return stored["hashes"], stored["rows"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("MM-TS: %s cannot be read (%s); building it again", path, error)
    hashes, rows = _build_index(table, tokenizer, pad_id)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, hashes=hashes, rows=rows)
    except OSError as error:
        logger.warning("MM-TS: the caption index cannot be cached in %s: %s", path, error)
    return hashes, rows


def _fingerprint(probes: list[str], tokenizer: Tokenizer, pad_id: int) -> bytes:
    """Tells tokenizers apart by what they make of captions of this very table, spread over it."""
    return str(pad_id).encode() + np.ascontiguousarray(tokenizer(probes).numpy()).tobytes()


def _build_index(table: ClusterTable, tokenizer: Tokenizer, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    def hashed(start: int) -> Tensor:
        return hash_tokens(tokenizer(table.keys.slice(start, _CHUNK).to_pylist()), pad_id)

    starts = range(0, len(table), _CHUNK)
    if len(table) < _PARALLEL_FROM:
        parts = [hashed(start) for start in starts]
    else:
        parts = list(_in_workers(hashed, starts))
    hashes = torch.cat(parts).numpy()
    rows = _commonest(hashes, table.count)
    return hashes[rows], rows


# --- large tables: the index is made in a stream and mapped

_RECORD = np.dtype([("hash", "<i8"), ("count", "<i4"), ("code", "<i2")])
_HASHES, _CODES = "hashes.i64", "codes.i16"
_FANOUT = 256  # files that the records are split into by the hash's first byte, to be sorted one at a time


def _mapped_index(table: LargeTable, tokenizer: Tokenizer, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """``[n]`` int64 sorted hashes and ``[n]`` int16 codes of their frequencies, mapped from the cache.

    Ten bytes a caption, on disk and in the page cache, which the ranks of a node share. Built once, in a stream.

    Raises:
        TableError: the cache cannot be written.
    """
    name = hashlib.blake2b(
        table.content_hash.encode() + _fingerprint(table.probes(512), tokenizer, pad_id), digest_size=16
    ).hexdigest()
    folder = cache_folder() / f"tokens-{name}"
    with one_at_a_time(folder):
        if not folder.exists():
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
                try:
                    _write_index(table, tokenizer, pad_id, temporary)
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
            except OSError as error:
                raise TableError(
                    f"{folder}: the index of {len(table):,} captions cannot be written: {error}; it takes "
                    f"{len(table) * 24 / 1e9:.1f} GB while it is made; name a folder with room in MMTS_CACHE"
                ) from error
    # Copy on write: shared pages, and an array that torch takes without a warning. Nothing writes.
    return np.memmap(folder / _HASHES, "<i8", "c"), np.memmap(folder / _CODES, "<i2", "c")


def _write_index(table: LargeTable, tokenizer: Tokenizer, pad_id: int, folder: Path) -> None:
    groups = row_groups(table.parts)

    def records(number: int) -> Tensor:
        columns = read_row_group(*groups[number], ["key", "frequency", "count"])
        keys = columns["key"]
        out = np.empty(len(keys), _RECORD)
        starts = range(0, len(keys), _CHUNK)
        out["hash"] = np.concatenate(
            [hash_tokens(tokenizer(keys.slice(start, _CHUNK).to_pylist()), pad_id).numpy() for start in starts]
        )
        out["count"] = np.minimum(columns["count"].to_numpy(), np.iinfo(np.int32).max)
        out["code"] = table.code(columns["frequency"].to_numpy())
        return torch.from_numpy(out.view(np.uint8))

    buckets = [(folder / f"{number}.records").open("wb") for number in range(_FANOUT)]
    try:
        for part in _in_workers(records, range(len(groups))):
            found = part.numpy().view(_RECORD)
            bucket = (found["hash"] >> 56) + _FANOUT // 2
            order = np.argsort(bucket, kind="stable")
            ends = np.searchsorted(bucket[order], np.arange(_FANOUT + 1))
            for file, low, high in zip(buckets, ends, ends[1:]):
                file.write(found[order[low:high]].tobytes())
    finally:
        for file in buckets:
            file.close()
    with (folder / _HASHES).open("wb") as hashes, (folder / _CODES).open("wb") as codes:
        for file in buckets:
            found = np.fromfile(file.name, _RECORD)
            found = found[_commonest(found["hash"], found["count"])]
            hashes.write(found["hash"].tobytes())
            codes.write(found["code"].tobytes())
            os.unlink(file.name)


def _commonest(hashes: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Rows by ascending hash, one each: captions that tokenize alike (case, spacing, the context length's cut) share
    one entry, and the commonest stands."""
    order = np.lexsort((-count.astype(np.int64), hashes))
    return order[np.r_[True, np.diff(hashes[order]) != 0][: len(order)]]


class _Chunks(torch.utils.data.Dataset[Tensor]):
    def __init__(self, work: Callable[[int], Tensor], items: Sequence[int]) -> None:
        self.work, self.items = work, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.work(self.items[index])


def _in_workers(work: Callable[[int], Tensor], items: Sequence[int]) -> Iterator[Tensor]:
    """Tokenize in forked loader workers: Python tokenizers make a few thousand captions a second and core."""
    loader: Any = torch.utils.data.DataLoader(
        _Chunks(work, items),
        batch_size=None,
        num_workers=min(16, os.cpu_count() or 1),
        multiprocessing_context="fork" if hasattr(os, "fork") else None,
    )
    for number, part in enumerate(loader, 1):
        yield part
        if number % max(len(items) // 10, 1) == 0:
            logger.info("MM-TS: tokenizing the table's captions, %d%%", 100 * number // len(items))
