"""From a batch's token ids, or its captions, to its concepts' frequencies, without a sync.

A host such as OpenCLIP hands the model nothing but token ids. The captions of the cluster table are tokenized once by
the host's own tokenizer and hashed to 64 bits a row; a batch is hashed the same way and found by binary search: nine to
twelve bytes per caption on the device, O(B log M) a step. A host that keeps the captions as text, such as VAST, needs
no tokenizer: strings are hashed and found in the same way, on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

import numpy as np
import torch
from torch import Tensor

from .._files import cache_folder, cached, keep, mapped, one_at_a_time, replacing_folder, sealing, writing
from ..errors import MMTSError, TableError, reading
from ..processes import cores
from .hashing import hash_strings
from .parts import CAPTION
from .shift import check_swapped, swapped
from .streamed import LargeTable
from .table import ClusterTable

logger = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]

_CHUNK = 2048
_CACHE_FROM = 20_000  # captions; a smaller index is built faster than a cache is worth
_PARALLEL_FROM = 100_000
_PROBES = 512  # captions that tell tokenizers apart, beside the longest
_AGAIN = 8  # every eighth of them, and the longest, are tokenized twice
_REPEATED, _REPEATS = 8, 32  # and these of the longest so many times more: one draw of two comes out alike often
_NO_PAD = -1  # strings hashed as tokens are not filled up
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
        TableError: the table is keyed by class, which token ids cannot tell; or the tokenizer is random.
    """

    def __init__(
        self, table: Union[ClusterTable, LargeTable], tokenizer: Tokenizer, pad_id: int, device: torch.device
    ) -> None:
        if table.kind != CAPTION:
            raise TableError(
                f"{table.source}: keyed by {table.kind}, but this host looks samples up by caption; make a table of "
                "captions (mmts cluster CAPTIONS, with --label-column and --column to use class labels)"
            )
        key = _key(table, tokenizer, pad_id)
        if isinstance(table, LargeTable):
            self.frequencies = table.levels
            hashes, code = _mapped_index(table, tokenizer, pad_id, key)
        else:
            hashes, rows = _cached_index(table, tokenizer, pad_id, key)
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
    """Finds a key of the cluster table, a caption, a class or a clip id, by its text, on the CPU.

    Nine to twelve bytes per key; ten, mapped from the cache and shared by a node's ranks, of a large table.
    Keys are compared by 64 bits of BLAKE2b: among ``n`` about ``n^2 / 2^65`` pairs collide, 3e-7 for CC3M.

    Attributes:
        frequencies: ``[U]`` distinct frequencies of the table (of a large one, its levels), float64.
        missing: ``U``, the index of a key that is not in the table.
    """

    def __init__(self, table: Union[ClusterTable, LargeTable]) -> None:
        self._hash: Callable[[Sequence[str]], np.ndarray] = hash_strings
        if isinstance(table, LargeTable):
            self._hash = _hash_as_tokens
            self.frequencies = table.levels
            self.missing = len(self.frequencies)
            self._hashes, self._codes = _mapped_index(table, _as_tokens, _NO_PAD, _key(table, _as_tokens, _NO_PAD))
            return
        hashes = np.concatenate(
            [hash_strings(table.keys.slice(start, _CHUNK).to_pylist()) for start in range(0, len(table), _CHUNK)]
        )
        self.frequencies, code = np.unique(table.frequency, return_inverse=True)
        self.missing = len(self.frequencies)
        order = np.argsort(hashes)
        self._hashes = hashes[order]
        self._codes = code[order].astype(np.min_scalar_type(self.missing))

    def __call__(self, keys: Sequence[str]) -> np.ndarray:
        """``n`` keys to ``[n]`` int64 indices into :attr:`frequencies`; :attr:`missing` where unknown."""
        wanted = self._hash(keys)
        place = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        return np.where(self._hashes[place] == wanted, self._codes[place].astype(np.int64), self.missing)


def _as_tokens(keys: Sequence[str]) -> Tensor:
    """Keys as rows of four numbers, so that a large table is indexed by them as it is by a host's tokens."""
    return torch.from_numpy(hash_strings(keys).view(np.uint16).astype(np.int64)).view(-1, 4)


def _hash_as_tokens(keys: Sequence[str]) -> np.ndarray:
    return hash_tokens(_as_tokens(keys), _NO_PAD).numpy()


def _key(table: Union[ClusterTable, LargeTable], tokenizer: Tokenizer, pad_id: int) -> str:
    """Names an index: by the whole table, and by what the tokenizer makes of captions of this very table.

    Raises:
        TableError: the tokenizer makes something else of the same captions each time.
    """
    probes, longest = table.probes(_PROBES), table.longest
    again = [*probes[::_AGAIN], *longest, *longest[:_REPEATED] * _REPEATS]
    with reading(table.source, "its captions cannot be tokenized", TableError):
        first, second = (hash_tokens(tokenizer(captions), pad_id) for captions in ([*probes, *longest], again))
    of_longest = first[len(probes) :]
    # Random reductions (CLIPA) touch only captions longer than the context.
    expected = [first[: len(probes)][::_AGAIN], of_longest, of_longest[:_REPEATED].repeat(_REPEATS)]
    if not torch.equal(second, torch.cat(expected)):
        raise TableError(
            "the tokenizer is random: it gives one caption other tokens each time, so that no caption of "
            f"{table.source} can be found by its tokens; train without that (CLIPA: set reduction_mask in the model's "
            "text_cfg.tokenizer_kwargs to 'syntax', or leave it out)"
        )
    seed = [table.shuffle] if isinstance(table, LargeTable) and table.shuffle is not None else []
    about = json.dumps([table.content_hash, pad_id, *seed]).encode()
    return hashlib.blake2b(about + first.numpy().tobytes(), digest_size=16).hexdigest()


def _cached_index(table: ClusterTable, tokenizer: Tokenizer, pad_id: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Sorted hashes and their table rows, from the cache where a large table met this tokenizer before."""
    if len(table) < _CACHE_FROM:
        return _build_index(table, tokenizer, pad_id)
    folder, name = cache_folder(), f"tokens-{key}.npy"
    path = None if folder is None else folder / name

    def read(file: BinaryIO, size: int) -> tuple[np.ndarray, np.ndarray]:
        hashes, rows = np.array(mapped(file, size, "<i8", 2))
        if not _ascending(hashes) or rows.min() < 0 or rows.max() >= len(table):
            raise ValueError("its numbers cannot be an index")
        return hashes, rows

    found = cached(path, name, read)
    if found is None:
        found = hashes, rows = _build_index(table, tokenizer, pad_id)
        keep(path, name, lambda file: np.save(file, np.stack([hashes, rows]), False))
    return found


def _ascending(hashes: np.ndarray) -> bool:
    block = 1 << 20
    return all(
        bool((hashes[start + 1 : start + block + 1] > hashes[start : start + block][: len(hashes) - start - 1]).all())
        for start in range(0, len(hashes), block)
    )


def _build_index(table: ClusterTable, tokenizer: Tokenizer, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    def hashed(start: int) -> Tensor:
        return hash_tokens(tokenizer(table.keys.slice(start, _CHUNK).to_pylist()), pad_id)

    starts = range(0, len(table), _CHUNK)
    workers = 0 if len(table) < _PARALLEL_FROM else _MOST_WORKERS
    parts = list(_in_workers(table.source, hashed, starts, workers))
    hashes = torch.cat(parts).numpy()
    rows = _commonest(hashes, table.count)
    return hashes[rows], rows


# --- large tables: the index is made in a stream and mapped

_RECORD = np.dtype([("hash", "<i8"), ("count", "<i4"), ("code", "<i2")])
_HASHES, _CODES = "hashes.i64", "codes.i16"
_MOST_WORKERS = 16
_FANOUT = 256  # files that the records are split into by the hash's first byte, to be sorted one at a time


def _mapped_index(table: LargeTable, tokenizer: Tokenizer, pad_id: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """``[n]`` int64 sorted hashes and ``[n]`` int16 codes of their frequencies, mapped from the cache.

    Ten bytes a caption, on disk and in the page cache, which the ranks of a node share. Built once, in a stream; where
    there is no cache at each start, in a temporary file.

    Raises:
        TableError: it cannot be written.
    """
    parent, name = cache_folder(), f"tokens-{key}"
    where = tempfile.gettempdir() if parent is None else parent
    full = (
        f"the index of {len(table):,} captions cannot be written; it takes {len(table) * 24 / 1e9:.1f} GB while it is "
        f"made; name a folder with room in {'TMPDIR' if parent is None else 'MMTS_CACHE'}"
    )
    if parent is None:
        with writing(where, full, TableError), tempfile.TemporaryDirectory(prefix="mmts-") as temporary:
            _write_index(table, tokenizer, pad_id, Path(temporary), name)
            found = _stored_index(Path(temporary), name, len(table.levels))  # stays mapped when the file is gone
    else:
        with one_at_a_time(parent / name):
            found = _stored_index(parent / name, name, len(table.levels))
            if found is None:
                with writing(parent / name, full, TableError), replacing_folder(parent / name) as folder:
                    _write_index(table, tokenizer, pad_id, folder, name)
                found = _stored_index(parent / name, name, len(table.levels))
    if found is None:
        raise TableError(
            f"{where}: the index of captions is not what was written there a moment ago; is the disk sound?"
        )
    return found


def _stored_index(folder: Path, name: str, levels: int) -> Optional[tuple[np.ndarray, np.ndarray]]:
    # Copy on write: shared pages, and an array that torch takes without a warning. Nothing writes.
    def read_hashes(file: BinaryIO, size: int) -> np.ndarray:
        hashes = np.memmap(file, "<i8", "c", 0, size // 8)
        if size % 8 or not _ascending(hashes):
            raise ValueError("its hashes are not in order")
        return hashes

    def read_codes(file: BinaryIO, size: int) -> np.ndarray:
        codes = np.memmap(file, "<i2", "c", 0, size // 2)
        if hashes is None or size != 2 * len(hashes) or codes.min() < 0 or codes.max() >= levels:
            raise ValueError("its numbers cannot be an index")
        return codes

    hashes = cached(folder / _HASHES, f"{name}/{_HASHES}", read_hashes)
    if hashes is None:
        return None
    codes = cached(folder / _CODES, f"{name}/{_CODES}", read_codes)
    return None if codes is None else (hashes, codes)


def _write_index(table: LargeTable, tokenizer: Tokenizer, pad_id: int, folder: Path, name: str) -> None:
    groups = table.row_groups()

    def records(number: int) -> Tensor:
        columns = table.read_group(number, *groups[number])
        keys = columns["key"]
        out = np.empty(len(keys), _RECORD)
        hashes = [
            hash_tokens(tokenizer(keys.slice(start, _CHUNK).to_pylist()), pad_id).numpy()
            for start in range(0, len(keys), _CHUNK)
        ]
        out["hash"] = np.concatenate([*hashes, np.empty(0, np.int64)])
        out["count"] = np.minimum(columns["count"], np.iinfo(np.int32).max)
        out["code"] = table.code(columns["frequency"])
        return torch.from_numpy(out.view(np.uint8))

    buckets = [(folder / f"{number}.records").open("wb") for number in range(_FANOUT)]
    try:
        for part in _in_workers(table.source, records, range(len(groups)), _MOST_WORKERS):
            found = part.numpy().view(_RECORD)
            bucket = (found["hash"] >> 56) + _FANOUT // 2
            order = np.argsort(bucket, kind="stable")
            ends = np.searchsorted(bucket[order], np.arange(_FANOUT + 1))
            for file, low, high in zip(buckets, ends, ends[1:]):
                file.write(found[order[low:high]].tobytes())
    finally:
        for file in buckets:
            file.close()
    with (
        sealing(folder / _HASHES, f"{name}/{_HASHES}") as hashes,
        sealing(folder / _CODES, f"{name}/{_CODES}") as codes,
    ):
        kept = []
        for file in buckets:
            found = np.fromfile(file.name, _RECORD)
            found = found[_commonest(found["hash"], found["count"])]
            hashes.write(found["hash"].tobytes())
            if table.shuffle is None:
                codes.write(found["code"].tobytes())
            else:
                kept.append(found[["code", "count"]].copy())
            os.unlink(file.name)
        if table.shuffle is not None:
            every = np.concatenate(kept)
            check_swapped(table.source, table.levels[every["code"]], every["count"])
            codes.write(swapped(every["code"], every["count"], table.shuffle).tobytes())


def _commonest(hashes: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Rows by ascending hash, one each: captions that tokenize alike (case, spacing, the context length's cut) share
    one entry, and the commonest stands."""
    order = np.lexsort((-count.astype(np.int64), hashes))
    return order[np.r_[True, np.diff(hashes[order]) != 0][: len(order)]]


class _Chunks(torch.utils.data.Dataset[Any]):
    def __init__(self, work: Callable[[int], Tensor], items: Sequence[int]) -> None:
        self.work, self.items = work, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Union[Tensor, MMTSError]:
        try:
            return self.work(self.items[index])
        except MMTSError as error:
            return error  # raised, the loader would wrap it in a traceback of its own


def _in_workers(source: str, work: Callable[[int], Tensor], items: Sequence[int], workers: int) -> Iterator[Tensor]:
    """Tokenize in forked loader workers: Python tokenizers make a few thousand captions a second and core.

    Where processes cannot be forked (a tokenizer need not survive pickling), or for ``workers=0``: in this one.

    Raises:
        TableError: a caption cannot be tokenized.
    """
    with reading(source, "its captions cannot be tokenized", TableError):
        for number, part in enumerate(_parts(_Chunks(work, items), min(workers, cores(), len(items))), 1):
            if isinstance(part, MMTSError):
                raise part
            yield part
            if workers and number % max(len(items) // 10, 1) == 0:
                logger.info("MM-TS: tokenizing the table's captions, %d%%", 100 * number // len(items))


def _parts(chunks: _Chunks, workers: int) -> Iterator[Any]:
    # A daemon, as some launchers make of a rank, may have no children.
    if workers > 1 and _can_fork() and not multiprocessing.current_process().daemon:
        loader: Any = torch.utils.data.DataLoader(
            chunks, batch_size=None, num_workers=workers, multiprocessing_context="fork"
        )
        try:
            return iter(loader)
        except OSError as error:  # no more processes, no memory for them
            logger.warning("MM-TS: no process can be started (%s); tokenizing in this one", error)
    return map(chunks.__getitem__, range(len(chunks)))


def _can_fork() -> bool:
    return hasattr(os, "fork") and "fork" in multiprocessing.get_all_start_methods()
