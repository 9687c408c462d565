"""The cluster table (which caption belongs to which concept, how common it is) and the cluster shift, Eq. 6."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar, Union, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ._files import PathLike, replacing
from .errors import ConfigError, TableError

CAPTION = "caption"
CLASS = "class"
_METADATA_KEY = b"mmts"
_FORMAT = 1
_ROW_GROUP = 65_536  # what a reader in a stream holds at a time

Sizes = TypeVar("Sizes", bound=Union[torch.Tensor, np.ndarray])


def cluster_shift(sizes: Union[Sizes, Sequence[float]], shift_min: float, shift_max: float) -> Sizes:
    """Cluster sizes to cluster shifts, Eq. 6 of the paper.

    ``sh(c) = (K_c - min K) / (max K - min K) * (shift_max - shift_min) + shift_min``

    Args:
        sizes: ``[K]``, how many samples (or how common) each cluster is, over *all* clusters of the training set.
        shift_min, shift_max: the shift of the rarest and of the most common cluster, in units of temperature.

    Returns:
        ``[K]`` shifts, a tensor for a tensor, else a NumPy array; float64 unless ``sizes`` is of another float type.
        Where all sizes are equal the ratio is 0/0 and every cluster gets the midpoint.

    Raises:
        ConfigError: ``sizes`` is empty or not finite, or ``shift_min > shift_max``.
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
        if self.cluster.min() < 0:
            raise bad("column 'cluster' holds a negative number")
        if not (np.isfinite(self.frequency).all() and self.frequency.min() > 0):
            raise bad("column 'frequency' must hold finite numbers above zero")
        if self.count.min() < 1:
            raise bad("column 'count' must hold numbers of at least one")

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
        """A table from plain columns, see the attributes of the class."""
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
        """Hash of what training reads (keys, clusters, frequencies), whatever the file's layout or compression."""
        digest = ContentHash(self.kind)
        for column, values in (("length", self.keys), ("key", self.keys), ("cluster", self.cluster),
                               ("frequency", self.frequency)):  # fmt: skip
            digest.add(column, values)
        return digest.hexdigest()

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        return len(self.sizes)

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
        """``[M]`` float64: Eq. 6 for every key, with the minimum and maximum over the whole table."""
        return cluster_shift(self.frequency, shift_min, shift_max)

    def third_means(self, values: np.ndarray) -> tuple[float, float, float]:
        """Means of ``values`` (``[M]``, one per key) over the head, middle and tail third of the training samples.

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
        """``[n]`` int64: the row of each key, -1 where the table does not have it."""
        found = pc.index_in(pa.array(keys, pa.large_string()), value_set=self.keys)
        return cast(np.ndarray, found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64))

    def third_borders(self) -> tuple[float, float]:
        """The lowest frequency of the head and of the middle, as in :meth:`thirds`; infinite where nothing is."""
        distinct = np.unique(self.frequency)
        third = self.thirds(distinct)
        return tuple(float(distinct[third <= last].min(initial=np.inf)) for last in (0, 1))  # type: ignore[return-value]

    def thirds(self, frequency: np.ndarray) -> np.ndarray:
        """To which third of the training samples, ranked by frequency, samples as common as ``frequency`` belong.

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
            whole: where this is one part of a table in a folder: ``clusters`` and ``samples`` of all of it, and how
                many ``parts`` there are.

        Raises:
            TableError: the file cannot be written; whatever stood there before still does.
        """
        info = {
            **self.info,
            "format": _FORMAT,
            "kind": self.kind,
            "clusters": len(self.sizes),
            "samples": int(self.count.sum()),
            "frequency_min": float(self.frequency.min()),
            "frequency_max": float(self.frequency.max()),
            "content_hash": self.content_hash,
            **(whole or {}),
        }
        table = pa.table(
            {"key": self.keys, "cluster": self.cluster, "frequency": self.frequency, "count": self.count}
        ).replace_schema_metadata({_METADATA_KEY: json.dumps(info, sort_keys=True).encode()})
        try:
            with replacing(path) as temporary:
                pq.write_table(table, temporary, compression="zstd", row_group_size=_ROW_GROUP)
        except OSError as error:
            raise TableError(f"{path}: cannot write the cluster table: {error}") from error

    @classmethod
    def load(cls, path: PathLike) -> ClusterTable:
        """Read a Parquet file, or a folder of Parquet parts.

        Raises:
            TableError: missing, truncated, not a cluster table, or changed since it was written.
        """
        source = Path(path)
        if not source.exists():
            raise TableError(f"{source}: no such cluster table; make one with: mmts cluster CAPTIONS -o {source}")
        parts = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
        if not parts:
            raise TableError(f"{source}: the folder holds no *.parquet file")
        tables = []
        for part in parts:
            try:
                schema = pq.read_schema(part)
                check_columns(part, schema.names)
                columns = [name for name in ("key", "cluster", "frequency", "count") if name in schema.names]
                tables.append(pq.read_table(part, columns=columns))
            except (pa.ArrowException, OSError) as error:
                raise TableError(f"{part}: not a readable Parquet file (truncated or foreign?): {error}") from error
        info = part_info(tables[0].schema, parts[0])
        check_parts(source, info, len(parts))
        table = pa.concat_tables([part.replace_schema_metadata(None) for part in tables]).combine_chunks()
        for name in table.column_names:
            if table.column(name).null_count:
                raise TableError(f"{source}: column {name!r} holds {table.column(name).null_count} empty cells")
        try:
            keys = _one(table.column("key").cast(pa.large_string()))
            cluster = _one(table.column("cluster").cast(pa.int32())).to_numpy(zero_copy_only=False)
            frequency = _one(table.column("frequency").cast(pa.float64())).to_numpy(zero_copy_only=False)
            if "count" in table.column_names:
                count = _one(table.column("count").cast(pa.int64())).to_numpy(zero_copy_only=False)
            else:
                count = np.ones(len(keys), np.int64)
        except pa.ArrowException as error:
            raise TableError(f"{source}: a column has the wrong type: {error}") from error
        if pc.count_distinct(keys).as_py() != len(keys):
            raise TableError(f"{source}: {len(keys) - pc.count_distinct(keys).as_py()} keys occur more than once")
        kind = info.pop("kind", CAPTION)
        loaded = cls(keys, cluster, frequency, count, kind, info, str(source))
        stated = info.get("content_hash")
        if len(parts) > 1:
            info.pop("content_hash", None)  # of the first part alone
        elif stated is not None and stated != loaded.content_hash:
            raise TableError(f"{source}: the content does not match its own hash; the file was changed or damaged")
        return loaded


class ContentHash:
    """:attr:`ClusterTable.content_hash`, a piece at a time: all lengths, then all keys, clusters and frequencies."""

    def __init__(self, kind: str) -> None:
        self._digest = hashlib.blake2b(kind.encode(), digest_size=16)

    def add(self, column: str, values: Any) -> None:
        """The next piece of ``length`` or ``key`` (both from an Arrow array of large strings), or a number column."""
        if column == "length":
            self._digest.update(pc.binary_length(values).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        elif column == "key":
            offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
            text = values.buffers()[2]
            if text is not None and len(offsets):
                self._digest.update(memoryview(text)[int(offsets[0]) : int(offsets[-1])])
        else:
            self._digest.update(values.astype({"cluster": "<i4", "frequency": "<f8"}[column]).tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def check_columns(part: Path, names: Sequence[str]) -> None:
    """Raise a TableError unless the columns of a cluster table are among ``names``."""
    missing = {"key", "cluster", "frequency"} - set(names)
    if missing:
        raise TableError(
            f"{part}: not a cluster table: column {sorted(missing)[0]!r} is missing (found: "
            f"{', '.join(names[:8])}); make one with: mmts cluster"
        )


def check_parts(source: Path, info: dict[str, Any], found: int) -> None:
    """Raise a TableError where a folder holds more or fewer parts than its table has."""
    if info.get("parts", found) != found:
        raise TableError(f"{source}: holds {found} parts of a table of {info['parts']}; copy the whole folder")


def _one(column: pa.ChunkedArray) -> pa.Array:
    """A column as a single contiguous array."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def part_info(schema: pa.Schema, part: Path) -> dict[str, Any]:
    """The metadata that a part of a table carries; empty where another tool wrote it."""
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        return {}
    try:
        info = json.loads(raw)
        written = int(info["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(f"{part}: the table's metadata cannot be read: {error}") from error
    if written > _FORMAT:
        raise TableError(f"{part}: written by a newer mmts-plugins (format {written}, this one reads {_FORMAT})")
    return dict(info)
