"""Cluster tables too large to hold in memory: read in a stream, summarised once per node, never loaded whole.

What training needs of a table is a handful of numbers (:class:`.table.Summary`), its content hash, and the index of
:mod:`.index`. The first process of a node that opens the table reads it through once and leaves the numbers in the
cache; the others wait for it and read those. The index is made later, and checks each row group that it reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import stat_result
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

import numpy as np

from .._files import PathLike, cache_folder, cached, keep, one_at_a_time
from ..errors import TableError, reading
from ..fields import MAPPING, TEXT, TEXTS, WHOLE, Field
from .hashing import ContentHash, legacy_hash
from .parts import (
    CAPTION,
    CLASS,
    COLUMNS,
    check_counted,
    check_hash,
    check_numbers,
    check_stated_samples,
    columns_of,
    opened,
    part_info,
    read_columns,
    samples_of,
    table_files,
    whole_info,
)
from .remote import located
from .table import ClusterTable, Summary, longer_keys

logger = logging.getLogger(__name__)

LARGE_FROM = 2_000_000  # keys; a smaller table takes a few hundred megabytes
LEVELS = 32_767  # distinct frequencies that an index can tell apart with 16 bits

_BATCH = 65_536
_BINS = 65_536
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class LargeTable:
    """The same table as :class:`.table.ClusterTable`, seen through a stream.

    Attributes:
        parts: its Parquet files, in order.
        kind, info, source, content_hash: as the attributes of ``ClusterTable``.
        rows, clusters, samples: how many keys, clusters and training samples.
        summary: of the frequencies over samples.
        levels: ``[<= LEVELS]`` ascending float64: all distinct frequencies, or evenly spaced ones where there are more.
        longest: as ``ClusterTable.longest``.
        groups: the content hash of each row group, in order.
        shuffle: the seed by which captions swap frequencies, see :meth:`.table.ClusterTable.shuffled`.
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
    longest: list[str]
    groups: list[str]
    shuffle: Optional[int] = None

    def __len__(self) -> int:
        return self.rows

    @cached_property
    def legacy_hash(self) -> str:
        """As ``ClusterTable.legacy_hash``; reads the table through."""
        return _legacy_hash(self.kind, self.parts)

    def has_hash(self, stated: object) -> bool:
        """As ``ClusterTable.has_hash``."""
        return stated == self.content_hash or stated == self.legacy_hash

    def shuffled(self, seed: int) -> LargeTable:
        """As ``ClusterTable.shuffled``; the swap is made with the index, in some 60 bytes a caption.

        Raises:
            TableError: a table of classes.
        """
        if self.kind != CAPTION:
            raise TableError(f"{self.source}: --mmts-shuffle-shifts: {len(self):,} classes are too many to shuffle")
        return replace(self, shuffle=seed)

    def probes(self, many: int) -> list[str]:
        """Some keys, from the start of each of its parts."""
        keys: list[str] = []
        for part in self.parts[: min(many, len(self.parts))]:
            batch = next(_batches([part], ["key"]), None)  # a part may be empty
            if batch is not None:
                keys += batch["key"].slice(0, -(-many // min(many, len(self.parts)))).to_pylist()
        return keys[:many]

    def code(self, frequency: np.ndarray) -> np.ndarray:
        """``[n]`` int16: the nearest of :attr:`levels`; off by at most half of ``(max - min) / 32,766``."""
        between = (self.levels[1:] + self.levels[:-1]) / 2
        return np.searchsorted(between, frequency).astype(np.int16)

    def row_groups(self) -> list[tuple[str, int]]:
        """The part and the number of every row group, in order."""
        groups = []
        for part in self.parts:
            with opened(part) as parquet:
                groups += [(part, group) for group in range(parquet.num_row_groups)]
        return groups

    def read_group(self, number: int, part: str, group: int) -> dict[str, Any]:
        """The columns of one row group, as :meth:`.table.ContentHash.add` takes them.

        Raises:
            TableError: it is not what it was when the table was read through.
        """
        digest = ContentHash(self.kind)
        with opened(part) as parquet:
            columns = _arrays(part, parquet.read_row_group(group, columns_of(parquet)))
        digest.add(columns)
        if number >= len(self.groups) or digest.hexdigest() != self.groups[number]:
            raise TableError(f"{part}: changed since it was read through; start the run again")
        return columns


def open_table(path: PathLike) -> Union[ClusterTable, LargeTable]:
    """Load a table, or look at one of more than ``LARGE_FROM`` keys through a stream.

    Raises:
        TableError: as :meth:`.table.ClusterTable.load`. That a key occurs twice goes unnoticed in a large table.
    """
    source = located(path)
    files = table_files(source)
    rows = 0
    for file in files:
        with opened(file) as parquet:
            rows += parquet.metadata.num_rows
    if rows < LARGE_FROM:
        return ClusterTable.load(path)
    return replace(_look_at(source, files, rows), source=str(path))


def _look_at(source: Path, files: list[Path], rows: int) -> LargeTable:
    name = _name(source, files)
    folder = cache_folder("tables")
    path = None if folder is None else folder / f"{name}.json"
    with one_at_a_time(path):
        facts = cached(path, name, lambda file, size: _facts(file, size, rows))
        if facts is None:
            facts = _read_through(source, files, rows)
            if _name(source, files) != name:
                raise TableError(f"{source}: changed while it was read; start the run again")
            keep(path, name, lambda file: file.write(json.dumps(facts).encode()))
    facts["summary"] = Summary(**facts["summary"])
    facts["levels"] = np.asarray(facts["levels"])
    return LargeTable(parts=tuple(map(str, files)), source=str(source), **facts)


def _name(source: Path, files: Sequence[Path]) -> str:
    with reading(source, "cannot be read as a cluster table", TableError):
        return name_of(source.resolve(), [(file.name, file.stat()) for file in files])


def name_of(source: Path, files: Sequence[tuple[str, stat_result]]) -> str:
    """Of what is known of a table before it is read: another one where anything about a file changed."""
    about = [
        (name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
        for name, status in files
    ]
    return hashlib.blake2b(json.dumps([str(source), about]).encode(), digest_size=16).hexdigest()


_FACTS = {
    "kind": Field(TEXT, choices=(CAPTION, CLASS)),
    "info": Field(MAPPING),
    "content_hash": Field(TEXT),
    "rows": Field(WHOLE, least=1),
    "clusters": Field(WHOLE, least=1),
    "samples": Field(WHOLE, least=1),
    "groups": Field(TEXTS),
}


def _facts(file: BinaryIO, size: int, rows: int) -> dict[str, Any]:
    """What :func:`_read_through` returned, from the cache. Raises anything where it cannot be that."""
    facts = json.loads(file.read(size))
    if {*facts} != {*_FACTS, "summary", "levels", "longest"}:
        raise ValueError("it holds other fields")
    for name, field in _FACTS.items():
        facts[name] = field.check(name, facts[name])
    summary, levels = Summary(**facts["summary"]), np.asarray(facts["levels"], np.float64)
    about = [summary.low, summary.tail, summary.middle, summary.head, summary.high]
    fine = (
        facts["rows"] == rows
        and all(isinstance(each, float) and not math.isnan(each) for each in summary)
        and summary.low > 0
        and all(less <= more * _ROUNDING for less, more in zip(about, about[1:]))
        and summary.low <= summary.mean * _ROUNDING <= summary.high * _ROUNDING**2
        and 1 <= len(levels) <= LEVELS
        and (levels[0], levels[-1]) == (summary.low, summary.high)
        and bool((np.diff(levels) > 0).all())
        and all(isinstance(key, str) for key in facts["longest"])
    )
    if not fine:
        raise ValueError("its numbers cannot be a table's")
    return dict(facts)


def _read_through(source: Path, files: Sequence[Path], rows: int) -> dict[str, Any]:
    """Everything but the thirds' means in one pass."""
    logger.info("MM-TS: %s: reading %d keys, once", source, rows)
    infos, names, groups = [], [], []
    for file in files:
        with opened(file) as parquet:
            infos.append(part_info(parquet.schema_arrow, file))
            read_columns(file, parquet.schema_arrow.empty_table(), COLUMNS)  # also of a part without rows
            names.append(columns_of(parquet))
            groups.append(parquet.num_row_groups)
    info = whole_info(source, files, infos)
    check_counted(files, names)
    kind = info.pop("kind", CAPTION)
    digest, digests = ContentHash(kind), []
    found, clusters, low, high, samples, total = 0, 0, np.inf, -np.inf, 0, 0.0
    distinct: Any = np.empty(0)
    longest: list[str] = []
    for file, stated, many in zip(files, infos, groups):
        of_part, of_groups = ContentHash(kind), [ContentHash(kind) for _ in range(many)]
        for group, columns in _by_group(file):
            cluster, frequency, count = (columns[name] for name in ("cluster", "frequency", "count"))
            check_numbers(source, cluster, frequency, count, rows)
            samples, total = samples_of(source, count, samples), total + float(frequency @ count)
            for each in (digest, of_part, of_groups[group]):
                each.add(columns)
            found += len(cluster)
            clusters = max(clusters, int(cluster.max(initial=-1)) + 1)
            low, high = min(low, frequency.min(initial=np.inf)), max(high, frequency.max(initial=-np.inf))
            if len(distinct) <= LEVELS:
                distinct = np.union1d(distinct, frequency)
            longest = longer_keys(longest, columns["key"])
        digests += [each.hexdigest() for each in of_groups]
        if stated:
            check_hash(file, stated, of_part.hexdigest() if stated["format"] > 1 else _legacy_hash(kind, [file]))
    if found != rows:
        raise TableError(f"{source}: holds {found} rows where it promises {rows}; the file was changed or damaged")
    check_stated_samples(source, info, samples)
    levels = distinct if len(distinct) <= LEVELS else np.linspace(low, high, LEVELS)
    return {
        "kind": kind,
        "info": info,
        "content_hash": digest.hexdigest(),
        "rows": rows,
        "clusters": clusters,
        "samples": samples,
        "summary": _summary(files, distinct, float(low), float(high), samples, total)._asdict(),
        "levels": levels.tolist(),
        "longest": longest,
        "groups": digests,
    }


def _summary(
    files: Sequence[Path], distinct: np.ndarray, low: float, high: float, samples: int, total: float
) -> Summary:
    """Exact where all ``distinct`` frequencies are known; else the thirds come from a histogram, within a 65,536th of
    the range."""
    if low == high:
        return Summary(low, high, low, low, low, low, np.inf, low)
    exact = len(distinct) <= LEVELS
    bins = len(distinct) if exact else _BINS
    mass, weighted = np.zeros(bins), np.zeros(bins)
    for batch in _batches(files, ["frequency", "count"]):
        frequency, count = batch["frequency"], batch["count"]
        if exact:
            place = np.searchsorted(distinct, frequency)
        else:
            place = ((frequency - low) / (high - low) * bins).astype(np.int64)
        place = np.clip(place, 0, bins - 1)
        mass += np.bincount(place, count, bins)
        weighted += np.bincount(place, frequency * count, bins)
    used = np.flatnonzero(mass)[::-1]
    frequency = distinct[used] if exact else weighted[used] / mass[used]
    table = ClusterTable.build([str(bin) for bin in used], used * 0, frequency, mass[used])
    return Summary(low, high, total / samples, *table.third_means(table.frequency), *table.third_borders())


def _legacy_hash(kind: str, files: Sequence[PathLike]) -> str:
    return legacy_hash(kind, lambda name: (batch[name] for batch in _batches(files, [name])))


def _batches(files: Sequence[PathLike], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        with opened(file) as parquet:
            wanted = [name for name in columns_of(parquet) if name in names] or ["key"]
            for batch in parquet.iter_batches(_BATCH, columns=wanted):
                yield _arrays(file, batch, names)


def _by_group(file: PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """All columns in batches, each with the number of its row group."""
    with opened(file) as parquet:
        for group in range(parquet.num_row_groups):
            for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=columns_of(parquet)):
                yield group, _arrays(file, batch)


def _arrays(part: PathLike, batch: Any, names: Iterable[str] = COLUMNS) -> dict[str, Any]:
    """Columns of one batch or table as :meth:`.table.ContentHash.add` takes them; ones where there are no counts."""
    columns: dict[str, Any] = read_columns(part, batch, names)
    arrays = {name: each if name == "key" else each.to_numpy(zero_copy_only=False) for name, each in columns.items()}
    if "count" in names:
        arrays.setdefault("count", np.ones(batch.num_rows, np.int64))
    return arrays
