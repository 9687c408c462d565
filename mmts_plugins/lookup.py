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
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._files import replacing
from .clusters import CAPTION, ClusterTable
from .errors import TableError

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

    def __init__(self, table: ClusterTable, tokenizer: Tokenizer, pad_id: int, device: torch.device) -> None:
        if table.kind != CAPTION:
            raise TableError(
                f"{table.source}: keyed by {table.kind}, but this host looks samples up by caption; make a table of "
                "captions (mmts cluster CAPTIONS, with --label-column and --column to use class labels)"
            )
        hashes, rows = _cached_index(table, tokenizer, pad_id)
        self.merged = len(table) - len(rows)
        self._pad_id = pad_id
        self._hashes = torch.from_numpy(hashes).to(device)
        # One small integer per caption; distinct frequencies are few (one per cluster for a single K-Means run).
        self.frequencies, code = np.unique(table.frequency[rows], return_inverse=True)
        self.missing = len(self.frequencies)
        dtype = np.min_scalar_type(-self.missing)  # signed: torch indexes with int16, not with uint16
        self._codes = torch.from_numpy(code.astype(dtype)).to(device)

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
    name = hashlib.blake2b(
        table.content_hash.encode() + table.count.tobytes() + _fingerprint(table, tokenizer, pad_id), digest_size=16
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


def cache_folder() -> Path:
    """``$MMTS_CACHE``, else ``mmts-plugins`` in the user's cache folder."""
    if "MMTS_CACHE" in os.environ:
        return Path(os.environ["MMTS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmts-plugins"


def _fingerprint(table: ClusterTable, tokenizer: Tokenizer, pad_id: int) -> bytes:
    """Tells tokenizers apart by what they make of captions of this very table, spread over it."""
    probes = table.keys.take(np.linspace(0, len(table) - 1, 512).astype(np.int64)).to_pylist()
    return str(pad_id).encode() + np.ascontiguousarray(tokenizer(probes).numpy()).tobytes()


def _build_index(table: ClusterTable, tokenizer: Tokenizer, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    def hashed(start: int) -> Tensor:
        return hash_tokens(tokenizer(table.keys.slice(start, _CHUNK).to_pylist()), pad_id)

    starts = range(0, len(table), _CHUNK)
    if len(table) < _PARALLEL_FROM:
        parts = [hashed(start) for start in starts]
    else:
        parts = _in_workers(hashed, starts, len(table))
    hashes = torch.cat(parts).numpy()
    # Captions that tokenize alike (case, spacing, the context length's cut) share one entry: the commonest stands.
    order = np.lexsort((-table.count, hashes))
    first = np.r_[True, np.diff(hashes[order]) != 0]
    rows = order[first]
    return hashes[rows], rows


class _Chunks(torch.utils.data.Dataset[Tensor]):
    def __init__(self, hashed: Callable[[int], Tensor], starts: range) -> None:
        self.hashed, self.starts = hashed, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        return self.hashed(self.starts[index])


def _in_workers(hashed: Callable[[int], Tensor], starts: range, total: int) -> list[Tensor]:
    """Tokenize in forked loader workers: Python tokenizers make a few thousand captions a second and core."""
    workers = min(16, os.cpu_count() or 1)
    loader = torch.utils.data.DataLoader(
        _Chunks(hashed, starts),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if hasattr(os, "fork") else None,
    )
    parts = []
    for number, part in enumerate(loader, 1):
        parts.append(part)
        if number % max(len(starts) // 10, 1) == 0:
            logger.info("MM-TS: tokenizing the table's captions, %d of %d", min(number * _CHUNK, total), total)
    return parts
