"""Cluster tables too large to hold in memory: read in a stream, summarised once per node, never loaded whole.

What training needs of a table is a handful of numbers (:class:`.clusters.Summary`), its content hash, and the index of
:mod:`.lookup`. The first process of a node that opens the table reads it through once and leaves the numbers in the
cache; the others wait for it and read those.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ._files import PathLike, cache_folder, replacing
from .clusters import CAPTION, ClusterTable, ContentHash, Summary, check_columns, check_parts, part_info
from .errors import TableError

logger = logging.getLogger(__name__)

LARGE_FROM = 2_000_000  # keys; a smaller table takes a few hundred megabytes
LEVELS = 32_767  # distinct frequencies that an index can tell apart with 16 bits

_BATCH = 65_536
_BINS = 65_536


@dataclass(frozen=True)
class LargeTable:
    """The same table as :class:`.clusters.ClusterTable`, seen through a stream.

    Attributes:
        parts: its Parquet files, in order.
        kind, info, source, content_hash: as the attributes of ``ClusterTable``.
        rows, clusters, samples: how many keys, clusters and training samples.
        summary: of the frequencies over samples.
        levels: ``[<= LEVELS]`` ascending float64: all distinct frequencies, or evenly spaced ones where there are more.
    """

    parts: tuple[str, ...]
    kind: str
    info: dict[str, Any]
    source: str
    content_hash: str
    rows: int
    clusters: int
    samples: int
    summary: Summary
    levels: np.ndarray

    def __len__(self) -> int:
        return self.rows

    def probes(self, many: int) -> list[str]:
        """Some keys, from the start of each of its parts."""
        keys: list[str] = []
        for part in self.parts[: min(many, len(self.parts))]:
            batch = next(_batches([part], ["key"]))
            keys += batch["key"].slice(0, -(-many // min(many, len(self.parts)))).to_pylist()
        return keys[:many]

    def code(self, frequency: np.ndarray) -> np.ndarray:
        """``[n]`` int16: the nearest of :attr:`levels`; off by at most half of ``(max - min) / 32,766``."""
        between = (self.levels[1:] + self.levels[:-1]) / 2
        return np.searchsorted(between, frequency).astype(np.int16)


def open_table(path: PathLike) -> Union[ClusterTable, LargeTable]:
    """Load a table, or look at one of more than ``LARGE_FROM`` keys through a stream.

    Raises:
        TableError: as :meth:`.clusters.ClusterTable.load`. That a key occurs twice goes unnoticed in a large table.
    """
    source = Path(path)
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    try:
        rows = sum(pq.read_metadata(file).num_rows for file in files)
    except (pa.ArrowException, OSError):
        rows = 0  # the error is load's to tell
    return _look_at(source, files, rows) if rows >= LARGE_FROM else ClusterTable.load(path)


def _look_at(source: Path, files: list[Path], rows: int) -> LargeTable:
    stamp = json.dumps([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    name = hashlib.blake2b(f"{source.resolve()} {stamp}".encode(), digest_size=16).hexdigest()
    path = cache_folder() / "tables" / f"{name}.json"
    with one_at_a_time(path):
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError):
            facts = _read_through(source, files, rows)
            try:
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps(facts))
            except OSError as error:
                logger.warning("MM-TS: what %s holds cannot be cached in %s: %s", source, path, error)
    facts["summary"] = Summary(**facts["summary"])
    facts["levels"] = np.asarray(facts["levels"])
    return LargeTable(parts=tuple(map(str, files)), source=str(source), **facts)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Processes of a node that would build the same file do it one after another; the lock goes with its owner."""
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{path}.lock", "w")  # noqa: SIM115
    except (ImportError, OSError):  # no such locks, or no cache: each builds its own
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_through(source: Path, files: Sequence[Path], rows: int) -> dict[str, Any]:
    """One pass for each column, in the order in which :class:`.clusters.ContentHash` takes them."""
    logger.info("MM-TS: %s: reading %d keys, once", source, rows)
    for file in files:
        check_columns(file, pq.read_schema(file).names)
    info = part_info(pq.read_schema(files[0]), files[0])
    check_parts(source, info, len(files))
    kind = info.pop("kind", CAPTION)
    stated = info.pop("content_hash", None)
    digest = ContentHash(kind)
    for column in ("length", "key"):
        for batch in _batches(files, ["key"]):
            digest.add(column, batch["key"])
    clusters = 0
    for batch in _batches(files, ["cluster"]):
        numbers = batch["cluster"].to_numpy(zero_copy_only=False)
        _require(source, "cluster", len(numbers) == 0 or numbers.min() >= 0, "a negative number")
        clusters = max(clusters, int(numbers.max(initial=-1)) + 1)
        digest.add("cluster", numbers)
    low, high, samples, total = np.inf, -np.inf, 0, 0.0
    distinct: Any = np.empty(0)
    for batch in _batches(files, ["frequency", "count"]):
        frequency, count = (batch[name].to_numpy(zero_copy_only=False) for name in ("frequency", "count"))
        _require(
            source, "frequency", bool(np.isfinite(frequency).all() and (frequency > 0).all()), "a number not above zero"
        )
        _require(source, "count", bool((count >= 1).all()), "a number below one")
        low, high = min(low, frequency.min(initial=np.inf)), max(high, frequency.max(initial=-np.inf))
        samples, total = samples + int(count.sum()), total + float(frequency @ count)
        if len(distinct) <= LEVELS:
            distinct = np.union1d(distinct, frequency)
        digest.add("frequency", frequency)
    if stated is not None and len(files) == 1 and stated != digest.hexdigest():
        raise TableError(f"{source}: the content does not match its own hash; the file was changed or damaged")
    levels = distinct if len(distinct) <= LEVELS else np.linspace(low, high, LEVELS)
    return {
        "kind": kind,
        "info": info,
        "content_hash": digest.hexdigest(),
        "rows": rows,
        "clusters": clusters,
        "samples": samples,
        "summary": _summary(files, float(low), float(high), samples, total)._asdict(),
        "levels": levels.tolist(),
    }


def _summary(files: Sequence[Path], low: float, high: float, samples: int, total: float) -> Summary:
    """Means of the thirds from a histogram: within a 65,536th of the range."""
    if low == high:
        return Summary(low, high, low, low, low, low, np.inf, low)
    mass, weighted = np.zeros(_BINS), np.zeros(_BINS)
    for batch in _batches(files, ["frequency", "count"]):
        frequency, count = (batch[name].to_numpy(zero_copy_only=False) for name in ("frequency", "count"))
        place = np.minimum(((frequency - low) / (high - low) * _BINS).astype(np.int64), _BINS - 1)
        mass += np.bincount(place, count, _BINS)
        weighted += np.bincount(place, frequency * count, _BINS)
    used = np.flatnonzero(mass)[::-1]
    table = ClusterTable.build([str(bin) for bin in used], used * 0, weighted[used] / mass[used], mass[used])
    return Summary(low, high, total / samples, *table.third_means(table.frequency), *table.third_borders())


def _require(source: Path, column: str, fine: bool, what: str) -> None:
    if not fine:
        raise TableError(f"{source}: column {column!r} holds {what}")


def row_groups(parts: Sequence[str]) -> list[tuple[str, int]]:
    """Every row group of the parts, in order."""
    return [(part, group) for part in parts for group in range(pq.read_metadata(part).num_row_groups)]


def read_row_group(part: str, group: int, columns: Sequence[str]) -> dict[str, pa.Array]:
    """Columns of one row group, in the types of :class:`.clusters.ClusterTable`."""
    with pq.ParquetFile(part) as file:
        return _typed(part, file.read_row_group(group, _there(file, columns)).combine_chunks(), columns)


def _batches(files: Sequence[PathLike], columns: Sequence[str]) -> Iterator[dict[str, pa.Array]]:
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH, columns=_there(file, columns)):
                    yield _typed(path, batch, columns)
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"{path}: not a readable Parquet file (truncated or foreign?): {error}") from error


def _there(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    names = set(file.schema_arrow.names)
    return [name for name in columns if name in names] or ["key"]


def _typed(path: PathLike, batch: Any, columns: Sequence[str]) -> dict[str, pa.Array]:
    types = {"key": pa.large_string(), "cluster": pa.int32(), "frequency": pa.float64(), "count": pa.int64()}
    typed = {}
    for name in columns:
        if name == "count" and name not in batch.schema.names:
            typed[name] = pa.array(np.ones(batch.num_rows, np.int64))
            continue
        column = batch.column(name)
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks)
        if array.null_count:
            raise TableError(f"{path}: column {name!r} holds {array.null_count} empty cells")
        typed[name] = pc.cast(array, types[name])
    return typed
