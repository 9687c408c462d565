"""The cluster table (which caption belongs to which concept, how common it is) and the cluster shift, Eq. 6."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar, Union, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ._files import PathLike, replacing, writing
from .errors import ConfigError, TableError, reading, shown
from .fields import MAPPING, TEXT, WHOLE, Field

CAPTION = "caption"
CLASS = "class"
_METADATA_KEY = b"mmts"
_FORMAT = 2  # 1, until 0.1: the hash left out the counts
_ROW_GROUP = 65_536  # what a reader in a stream holds at a time
_MOST_CLUSTERS = 1 << 24  # or as many as there are keys; so that a number per cluster fits into memory
_MOST = 2**53  # of samples, and so of a frequency: sums are exact, in whole numbers and in floats
_DEEPEST = 16  # metadata
_LONGEST = 64  # keys that a table knows to be long: a tokenizer that cuts shows itself there
_LONGEST_KEY = 2_000  # characters of them

COLUMNS = {"key": pa.large_string(), "cluster": pa.int32(), "frequency": pa.float64(), "count": pa.int64()}

Sizes = TypeVar("Sizes", bound=Union[torch.Tensor, np.ndarray])


def cluster_shift(sizes: Union[Sizes, Sequence[float]], shift_min: float, shift_max: float) -> Sizes:
    """Turn cluster sizes into cluster shifts, Eq. 6 of the paper.

    ``sh(c) = (K_c - min K) / (max K - min K) * (shift_max - shift_min) + shift_min``

    Args:
        sizes: ``[K]``, how many samples (or how common) each cluster is, over *all* clusters of the training set.
        shift_min, shift_max: the shift of the rarest and of the most common cluster, in units of temperature.

    Returns:
        ``[K]`` shifts, a tensor for a tensor, else a NumPy array; float64 unless ``sizes`` is of another float type.
        Where all sizes are equal the ratio is 0/0 and every cluster gets the midpoint.

    Raises:
        ConfigError: ``sizes`` is empty or not finite, or ``shift_min > shift_max``.

    Examples:
        >>> from mmts_plugins.clusters import cluster_shift
        >>> cluster_shift([100, 20, 60], shift_min=0.05, shift_max=0.10).round(3)
        array([0.1  , 0.05 , 0.075])
    """
    if not shift_min <= shift_max:
        raise ConfigError(f"shift_min {shift_min} is above shift_max {shift_max} (--mmts-shift-min, --mmts-shift-max)")
    if isinstance(sizes, torch.Tensor):
        shifts = cluster_shift(sizes.detach().cpu().double().numpy(), shift_min, shift_max)
        return cast(Sizes, torch.from_numpy(shifts).to(sizes if sizes.is_floating_point() else sizes.device))
    values = np.asarray(sizes)
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ConfigError("cluster sizes must be finite numbers, at least one")
    low, high = values.min(), values.max()
    if low == high:
        return cast(Sizes, np.full_like(values, (shift_min + shift_max) / 2))
    return cast(Sizes, (values - low) / (high - low) * (shift_max - shift_min) + shift_min)


class Summary(NamedTuple):
    """Frequencies in a few numbers: the extremes over keys, means over samples (all, and each third by rank), and the
    lowest frequency of the head and of the middle (infinite where nothing falls into them)."""

    low: float
    high: float
    mean: float
    head: float
    middle: float
    tail: float
    head_from: float
    middle_from: float


@dataclass(frozen=True, eq=False)
class ClusterTable:
    """One row per distinct caption (or class): to which cluster it belongs and how common its concept is.

    Attributes:
        keys: ``[M]`` Arrow strings, distinct: captions, or class ids (``kind`` says which).
        cluster: ``[M]`` int32 in ``[0, K)``.
        frequency: ``[M]`` float64, ``K_c`` of Eq. 6: the size of the key's cluster (a caption that occurs 40 times
            counts 40 times), the class count, or the mean size over several clusterings.
        count: ``[M]`` int64, how many samples have this key; ones where the file does not say.
        kind: ``"caption"`` or ``"class"``.
        info: how the table was made (encoder, k, seed, versions, ...); free-form, JSON.
        source: the file it came from, for messages.
    """

    keys: pa.Array
    cluster: np.ndarray
    frequency: np.ndarray
    count: np.ndarray
    kind: str = CAPTION
    info: dict[str, Any] = field(default_factory=dict)
    source: str = "the cluster table"

    def __post_init__(self) -> None:
        def bad(what: str) -> TableError:
            return TableError(f"{self.source}: {what}")

        if len(self.keys) == 0:
            raise bad("the table is empty")
        if self.kind not in (CAPTION, CLASS):
            raise bad(f"unknown kind of key {self.kind!r}, expected {CAPTION!r} or {CLASS!r}")
        for name in ("cluster", "frequency", "count"):
            if len(getattr(self, name)) != len(self.keys):
                raise bad(f"column {name!r} has {len(getattr(self, name))} rows, 'key' has {len(self.keys)}")
        check_numbers(self.source, self.cluster, self.frequency, self.count, len(self.keys))
        samples_of(self.source, self.count)

    @classmethod
    def build(
        cls,
        keys: Union[Sequence[str], pa.Array],
        cluster: Union[Sequence[int], np.ndarray],
        frequency: Union[Sequence[float], np.ndarray],
        count: Union[Sequence[int], np.ndarray, None] = None,
        kind: str = CAPTION,
        info: Optional[dict[str, Any]] = None,
    ) -> ClusterTable:
        """Make a table from plain columns, see the attributes of the class.

        Examples:
            >>> from mmts_plugins.clusters import ClusterTable
            >>> captions = ["a dog", "a puppy", "a theremin"]
            >>> table = ClusterTable.build(captions, cluster=[0, 0, 1], frequency=[40, 40, 2], count=[30, 10, 2])
            >>> table.sizes
            array([40,  2])
            >>> table.shifts(0.05, 0.10)
            array([0.1 , 0.1 , 0.05])
            >>> table.rows_of(["a theremin", "never seen"])
            array([ 2, -1])
        """
        array = keys if isinstance(keys, pa.Array) else pa.array(keys, pa.large_string())
        return cls(
            array.cast(pa.large_string()),
            np.asarray(cluster, np.int32),
            np.asarray(frequency, np.float64),
            np.ones(len(array), np.int64) if count is None else np.asarray(count, np.int64),
            kind,
            dict(info or {}),
        )

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sizes(self) -> np.ndarray:
        """``[K]`` how many samples each cluster holds, int64."""
        return np.bincount(self.cluster, weights=self.count).astype(np.int64)

    @cached_property
    def content_hash(self) -> str:
        """Hash of what training reads (kind, keys, clusters, frequencies, counts, in their order), whatever the file's
        layout or compression, or its cut into parts."""
        digest = ContentHash(self.kind)
        digest.add(self._columns)
        return digest.hexdigest()

    @cached_property
    def legacy_hash(self) -> str:
        """What :attr:`content_hash` was in tables of format 1, and so in records of their runs: without the counts."""
        return legacy_hash(self.kind, lambda name: [self._columns[name]])

    @property
    def _columns(self) -> dict[str, Any]:
        return {"key": self.keys, "cluster": self.cluster, "frequency": self.frequency, "count": self.count}

    @cached_property
    def longest(self) -> list[str]:
        """Some of the longest keys, longest first, of each the first 2,000 characters."""
        return longer_keys([], self.keys)

    def probes(self, many: int) -> list[str]:
        """Return some keys, spread over the table."""
        rows = np.linspace(0, len(self) - 1, min(many, len(self))).astype(np.int64)
        return cast(list[str], self.keys.take(rows).to_pylist())

    def has_hash(self, stated: object) -> bool:
        """Tell whether what a run recorded is this table's hash, of today or of format 1."""
        return stated == self.content_hash or stated == self.legacy_hash

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        return int(self.cluster.max()) + 1

    @property
    def samples(self) -> int:
        """How many training samples all keys stand for."""
        return int(self.count.sum())

    @cached_property
    def summary(self) -> Summary:
        """The frequencies over training samples in a few numbers."""
        mean = float(np.average(self.frequency, weights=self.count))
        low, high = float(self.frequency.min()), float(self.frequency.max())
        return Summary(low, high, mean, *self.third_means(self.frequency), *self.third_borders())

    def shifts(self, shift_min: float, shift_max: float) -> np.ndarray:
        """Apply Eq. 6 to every key, with the minimum and maximum over the whole table: ``[M]`` float64."""
        return cluster_shift(self.frequency, shift_min, shift_max)

    def third_means(self, values: np.ndarray) -> tuple[float, float, float]:
        """Average ``values`` (``[M]``, one per key) over the head, middle and tail third of the training samples.

        Samples are ranked by ``frequency``; a key whose samples lie across a border counts to both sides in proportion.
        """
        order = np.argsort(-self.frequency, kind="stable")
        edges = np.concatenate([[0.0], np.cumsum(self.count[order])]) / self.count.sum()
        means = []
        for third in range(3):
            inside = np.diff(np.clip(edges, third / 3, (third + 1) / 3))
            means.append(float(np.average(values[order], weights=inside)))
        return means[0], means[1], means[2]

    def rows_of(self, keys: Sequence[str]) -> np.ndarray:
        """Find the row of each key: ``[n]`` int64, -1 where the table does not have it."""
        found = pc.index_in(pa.array(keys, pa.large_string()), value_set=self.keys)
        return cast(np.ndarray, found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64))

    def third_borders(self) -> tuple[float, float]:
        """Return the lowest frequency of the head and of the middle, see :meth:`thirds`; infinite where nothing is."""
        distinct = np.unique(self.frequency)
        third = self.thirds(distinct)
        return tuple(float(distinct[third <= last].min(initial=np.inf)) for last in (0, 1))  # type: ignore[return-value]

    def thirds(self, frequency: np.ndarray) -> np.ndarray:
        """Tell to which third of the training samples, ranked by frequency, samples as common as ``frequency`` belong.

        Args:
            frequency: ``[n]``, of any samples, evaluated ones for example.

        Returns:
            ``[n]`` int64: 0 for the head, 1 for the middle, 2 for the tail. Equal frequencies share a third, the one in
            which the middle of such training samples lies: unlike in :meth:`third_means` nobody is split.
        """
        order = np.argsort(self.frequency, kind="stable")
        ascending, below = self.frequency[order], np.concatenate([[0], np.cumsum(self.count[order])])
        rarer, not_commoner = (below[np.searchsorted(ascending, frequency, side)] for side in ("left", "right"))
        # In whole numbers: the share of commoner samples, and half of the equal ones, in thirds.
        twice_above = 2 * below[-1] - rarer - not_commoner
        return np.minimum(3 * twice_above // (2 * below[-1]), 2)

    def save(self, path: PathLike, whole: Optional[dict[str, Any]] = None) -> None:
        """Write one Parquet file (readable by any tool), whole or not at all.

        Args:
            path: the file.
            whole: where this is one part of a table in a folder: ``clusters`` and ``samples`` of all of it, how many
                ``parts`` there are, which ``part`` this is (from 0), and ``table``, a word that all its parts share and
                no other table's.

        Raises:
            TableError: the file cannot be written; whatever stood there before still does.
        """
        info = {
            **{name: value for name, value in self.info.items() if name not in _OF_A_FILE},
            "format": _FORMAT,
            "kind": self.kind,
            "clusters": self.clusters,
            "samples": self.samples,
            "frequency_min": float(self.frequency.min()),
            "frequency_max": float(self.frequency.max()),
            "content_hash": self.content_hash,
            **(whole or {}),
        }
        table = pa.table(self._columns).replace_schema_metadata(
            {_METADATA_KEY: json.dumps(info, sort_keys=True).encode()}
        )
        # Through a file of Python's, which takes names that are not UTF-8.
        with writing(path, "cannot write the cluster table", TableError), replacing(path) as temporary:
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd", row_group_size=_ROW_GROUP)

    @classmethod
    def load(cls, path: PathLike) -> ClusterTable:
        """Read a Parquet file, or a folder of Parquet parts.

        Raises:
            TableError: missing, truncated, not a cluster table, parts of several tables, or changed since it was
                written.
        """
        source = Path(path)
        files = table_files(source)
        infos, parts = [], []
        for file in files:
            with opened(file) as parquet:
                infos.append(part_info(parquet.schema_arrow, file))
                parts.append(read_columns(file, parquet.read(columns_of(parquet)), COLUMNS))
        info = whole_info(source, files, infos)
        check_counted(files, parts)
        kind = info.pop("kind", CAPTION)
        if len(files) > 1:
            for file, stated, part in zip(files, infos, parts):
                _check_hash(file, stated, kind, part)
        columns = {
            name: pa.concat_arrays([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]
            for name in parts[0]
        }
        keys = columns.pop("key")
        numbers = {name: column.to_numpy(zero_copy_only=False) for name, column in columns.items()}
        numbers.setdefault("count", np.ones(len(keys), np.int64))
        loaded = cls(keys, **numbers, kind=kind, info=info, source=str(source))
        if len(files) == 1 and infos[0]:
            if infos[0]["format"] > 1:
                check_hash(source, infos[0], loaded.content_hash)
            else:
                check_hash(source, infos[0], loaded.legacy_hash)
        check_stated_samples(source, info, loaded.samples)
        distinct = pc.count_distinct(keys).as_py()
        if distinct != len(keys):
            raise TableError(f"{source}: {len(keys) - distinct} keys occur more than once")
        return loaded


class ContentHash:
    """:attr:`ClusterTable.content_hash`, some rows at a time."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        # One digest for each column, so that rows may come in pieces of any size.
        self._columns = {name: hashlib.blake2b(digest_size=16) for name in ("length", *COLUMNS)}

    def add(self, columns: Mapping[str, Any]) -> None:
        """Take in the next rows: ``key`` an Arrow array of large strings, the others NumPy arrays."""
        self._columns["length"].update(_lengths(columns["key"]))
        self._columns["key"].update(_text(columns["key"]))
        for name in ("cluster", "frequency", "count"):
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
    little = {"cluster": "<i4", "frequency": "<f8", "count": "<i8"}[name]
    return np.ascontiguousarray(numbers, little).view(np.uint8).data


def longer_keys(longest: list[str], keys: pa.Array) -> list[str]:
    """Pick the longest of some keys (see :attr:`ClusterTable.longest`) and more keys."""
    lengths = pc.binary_length(keys).to_numpy(zero_copy_only=False)
    if len(longest) == _LONGEST and lengths.max(initial=0) <= len(longest[-1].encode()):
        return longest
    rows = np.argpartition(-lengths, _LONGEST)[:_LONGEST] if len(lengths) > _LONGEST else np.arange(len(lengths))
    found = [key[:_LONGEST_KEY] for key in keys.take(np.sort(rows)).to_pylist()]
    return sorted(longest + found, key=lambda key: -len(key.encode()))[:_LONGEST]


# --- reading files


def table_files(source: Path) -> list[Path]:
    """List the Parquet files of a table, in order.

    Raises:
        TableError: there are none.
    """
    with reading(source, "cannot be read as a cluster table", TableError):
        if source.is_dir():
            files = sorted(source.glob("*.parquet"))
            if not files:
                raise TableError(f"{source}: the folder holds no *.parquet file")
        elif source.exists():
            files = [source]
        else:
            raise TableError(f"{source}: no such cluster table; make one with: mmts cluster CAPTIONS -o {source}")
        for file in files:
            if not file.is_file():
                raise TableError(f"{file}: not a file")
    return files


@contextmanager
def opened(part: PathLike) -> Iterator[pq.ParquetFile]:
    """Open a part of a table. Whatever goes wrong while it is read is a TableError that names it."""
    with reading(part, "not a readable Parquet file (truncated or foreign?)", TableError):
        # Through a file of Python's, which takes names that are not UTF-8.
        with open(part, "rb") as file, pq.ParquetFile(file) as parquet:
            _check_names(part, parquet.schema_arrow.names)
            yield parquet


def _check_names(part: PathLike, names: Sequence[str]) -> None:
    missing = {"key", "cluster", "frequency"} - set(names)
    if missing:
        raise TableError(
            f"{part}: not a cluster table: column {sorted(missing)[0]!r} is missing (found: "
            f"{', '.join(names[:8])}); make one with: mmts cluster"
        )
    for name in COLUMNS:
        if names.count(name) > 1:
            raise TableError(f"{part}: not a cluster table: column {name!r} is there {names.count(name)} times")


def columns_of(parquet: pq.ParquetFile) -> list[str]:
    """Name those columns of a table that a file has: all, or all but ``count``."""
    return [name for name in COLUMNS if name in parquet.schema_arrow.names]


def read_columns(part: PathLike, table: Union[pa.Table, pa.RecordBatch], names: Iterable[str]) -> dict[str, pa.Array]:
    """Read those columns that are there, each one array of its type in :data:`COLUMNS`.

    Raises:
        TableError: one is of a type that does not fit, has empty cells, or holds text that is not UTF-8.
    """
    columns = {}
    for name in names:
        if name not in table.schema.names:
            continue
        column = table.column(name)
        if not _fits(name, column.type) and not (pa.types.is_null(column.type) and len(column) == 0):
            raise TableError(f"{part}: column {name!r} has the wrong type: {shown(str(column.type))}")
        with reading(part, f"column {name!r} has the wrong type", TableError):
            column = pc.cast(column, COLUMNS[name])
            if isinstance(column, pa.ChunkedArray):
                column = pa.concat_arrays([*column.chunks, pa.array([], COLUMNS[name])])
        if column.null_count:
            raise TableError(f"{part}: column {name!r} holds {column.null_count} empty cells")
        with reading(part, f"column {name!r} is damaged", TableError):
            column.validate(full=True)  # offsets in order, text in UTF-8
        columns[name] = column
    return columns


def _fits(name: str, kind: pa.DataType) -> bool:
    """Whether a type means what the column means: a bool or a date becomes a number all too easily."""
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if name == "key":
        text = [types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_integer]
        text += [is_view for is_view in (getattr(types, "is_string_view", None),) if is_view is not None]
        return any(is_one(kind) for is_one in text)
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


# What metadata state, as far as anything reads it; the rest is free.
_STATED = {
    "kind": Field(TEXT, choices=(CAPTION, CLASS)),
    "clusters": Field(WHOLE, least=1),
    "samples": Field(WHOLE, least=1),
    "parts": Field(WHOLE, least=1),
    "part": Field(WHOLE, least=0),
    "table": Field(TEXT),
    "content_hash": Field(TEXT),
    "runs": Field(WHOLE, least=1),
    "stability": Field(MAPPING, null=True),
}
_OF_A_FILE = ("format", "content_hash", "parts", "part", "table")
_OF_A_PART = ("content_hash", "part", "frequency_min", "frequency_max")
_OF_A_RUN = ("created", "versions")  # a killed run that goes on has others


def part_info(schema: pa.Schema, part: PathLike) -> dict[str, Any]:
    """Read the metadata that a part of a table carries; empty where another tool wrote it.

    Raises:
        TableError: they are damaged, or of a newer release.
    """
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        return {}
    with reading(part, "the table's metadata cannot be read", TableError):
        info = json.loads(raw)
        if not isinstance(info, dict):
            raise ValueError("not a mapping")
        if _deeper(info, _DEEPEST):
            raise RecursionError
        json.dumps(info, ensure_ascii=False).encode()  # half a character could not be written again
    where = f"{part}: the table's metadata cannot be read:"
    written = Field(WHOLE, least=1).check(f"{where} 'format'", info.get("format"), TableError)
    if written > _FORMAT:
        raise TableError(f"{part}: written by a newer mmts-plugins (format {written}, this one reads {_FORMAT})")
    for name, field_ in _STATED.items():
        if name in info:
            info[name] = field_.check(f"{where} {name!r}", info[name], TableError)
    return {**info, "format": written}


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    return not levels or any(
        _deeper(each, levels - 1) for each in (value.values() if isinstance(value, dict) else value)
    )


def whole_info(source: Path, files: Sequence[Path], infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what all parts of a table state alike.

    Raises:
        TableError: they are not the parts of one table, or not all of them.
    """
    first = infos[0]
    # The word that a table's parts share says all; without it (format 1, other writers) the whole recipe must agree.
    shared = ("format", "kind", "clusters", "samples", "parts") if "table" in first else {*first}
    for file, info in zip(files[1:], infos[1:]):
        names = {*shared, *(() if "table" in first else info), "table"} - {*_OF_A_PART, *_OF_A_RUN}
        for name in sorted(names):
            one, other = (json.dumps(each.get(name), sort_keys=True) for each in (first, info))
            if one != other:
                raise TableError(
                    f"{source}: {files[0].name} and {file.name} are of different tables: {name!r} is "
                    f"{shown(first.get(name))} and {shown(info.get(name))}; keep each table in a folder of its own"
                )
    if first and len(files) > 1 and "parts" not in first:
        raise TableError(f"{source}: holds {len(files)} whole tables, {files[0].name} for example; name one of them")
    if first.get("parts", len(files)) != len(files):
        raise TableError(f"{source}: holds {len(files)} parts of a table of {first['parts']}; copy the whole folder")
    if "part" in first and {info.get("part") for info in infos} != set(range(len(files))):
        raise TableError(f"{source}: a part is there twice, and another is not; copy the whole folder")
    its_own = {*_OF_A_FILE, *(_OF_A_PART if len(files) > 1 else ())}
    return {name: value for name, value in first.items() if name not in its_own}


def check_counted(files: Sequence[Path], parts: Sequence[Iterable[str]]) -> None:
    """Raise a TableError where some parts have counts and others have none."""
    with_counts = ["count" in part for part in parts]
    if any(with_counts) and not all(with_counts):
        one, other = files[with_counts.index(True)], files[with_counts.index(False)]
        raise TableError(f"{other}: column 'count' is missing, which {one.name} has")


def _check_hash(file: Path, info: dict[str, Any], kind: str, part: Mapping[str, pa.Array]) -> None:
    if not info:
        return
    columns: dict[str, Any] = {"count": np.ones(len(part["key"]), np.int64)}
    for name, column in part.items():
        columns[name] = column if name == "key" else column.to_numpy(zero_copy_only=False)
    if info["format"] > 1:
        digest = ContentHash(kind)
        digest.add(columns)
        check_hash(file, info, digest.hexdigest())
    else:
        check_hash(file, info, legacy_hash(kind, lambda name: [columns[name]]))


def check_hash(source: object, info: dict[str, Any], found: str) -> None:
    """Raise a TableError where a file states another hash than its content has, or none where it must."""
    stated = info.get("content_hash", found if info["format"] == 1 else None)
    if stated != found:
        raise TableError(f"{source}: the content does not match its own hash; the file was changed or damaged")


def check_stated_samples(source: object, info: dict[str, Any], samples: int) -> None:
    """Raise a TableError where the metadata speak of more or fewer samples than the counts add up to."""
    if info.get("samples", samples) != samples:
        raise TableError(
            f"{source}: holds {samples} samples, its metadata say {info['samples']}; the file was changed or damaged"
        )


def check_numbers(source: object, cluster: np.ndarray, frequency: np.ndarray, count: np.ndarray, keys: int) -> None:
    """Raise a TableError for numbers that no table of so many keys can hold. No rows are fine."""
    if not len(cluster):
        return
    if cluster.min() < 0:
        raise TableError(f"{source}: column 'cluster' holds a negative number")
    if cluster.max() >= max(keys, _MOST_CLUSTERS):
        raise TableError(
            f"{source}: column 'cluster' holds {cluster.max()}: clusters are to be numbered from 0 without gaps"
        )
    if not (np.isfinite(frequency).all() and frequency.min() > 0):
        raise TableError(f"{source}: column 'frequency' must hold finite numbers above zero")
    if frequency.max() > _MOST:
        raise TableError(f"{source}: column 'frequency' holds {frequency.max():g}: too large for a number of samples")
    if count.min() < 1:
        raise TableError(f"{source}: column 'count' must hold numbers of at least one")


def samples_of(source: object, count: np.ndarray, before: int = 0) -> int:
    """Add ``before`` and ``count``. Raises a TableError for more samples than add up exactly."""
    roughly = before + float(count.sum(dtype=np.float64))  # whole numbers would wrap around
    samples = before + int(count.sum()) if roughly < 2 * _MOST else 2 * _MOST
    if samples > _MOST:
        raise TableError(f"{source}: column 'count' adds up to more than {_MOST} samples")
    return samples
