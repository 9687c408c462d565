"""The cluster table: which caption belongs to which concept, and how common that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Optional, Union, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .._files import PathLike, replacing, writing
from ..errors import TableError
from .hashing import ContentHash, legacy_hash
from .parts import (
    CAPTION,
    CLASS,
    COLUMNS,
    FORMAT,
    METADATA_KEY,
    OF_A_FILE,
    check_counted,
    check_hash,
    check_numbers,
    check_part_hash,
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
from .shift import check_swapped, cluster_shift, swapped

_ROW_GROUP = 65_536  # what a reader in a stream holds at a time
_LONGEST = 64  # keys that a table knows to be long: a tokenizer that cuts shows itself there
_LONGEST_KEY = 2_000  # characters of them


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
            >>> from mmts_plugins.tables import ClusterTable
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

    def shuffled(self, seed: int) -> ClusterTable:
        """Give the frequencies to the wrong keys, as a control: what is left of a gain is not due to the clusters.

        Captions that occur equally often swap theirs, so that the distribution over samples stays exactly what it is;
        classes swap with any other. The content hash stays the file's.

        Raises:
            TableError: for most samples there is nothing to swap with.
        """
        alike = np.ones_like(self.count) if self.kind == CLASS else self.count
        check_swapped(self.source, self.frequency, alike)
        table = replace(self, frequency=swapped(self.frequency, alike, seed))
        vars(table)["content_hash"] = self.content_hash  # with the seed it says which table this is
        return table

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
            **{name: value for name, value in self.info.items() if name not in OF_A_FILE},
            "format": FORMAT,
            "kind": self.kind,
            "clusters": self.clusters,
            "samples": self.samples,
            "frequency_min": float(self.frequency.min()),
            "frequency_max": float(self.frequency.max()),
            "content_hash": self.content_hash,
            **(whole or {}),
        }
        table = pa.table(self._columns).replace_schema_metadata(
            {METADATA_KEY: json.dumps(info, sort_keys=True).encode()}
        )
        # Through a file of Python's, which takes names that are not UTF-8.
        with writing(path, "cannot write the cluster table", TableError), replacing(path) as temporary:
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd", row_group_size=_ROW_GROUP)

    @classmethod
    def load(cls, path: PathLike) -> ClusterTable:
        """Read a Parquet file, or a folder of Parquet parts; also behind a URL that fsspec opens.

        Raises:
            TableError: missing, truncated, not a cluster table, parts of several tables, or changed since it was
                written.
        """
        source = str(path)
        files = table_files(located(path))
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
                check_part_hash(file, stated, kind, part)
        columns = {
            name: pa.concat_arrays([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]
            for name in parts[0]
        }
        keys = columns.pop("key")
        numbers = {name: column.to_numpy(zero_copy_only=False) for name, column in columns.items()}
        numbers.setdefault("count", np.ones(len(keys), np.int64))
        loaded = cls(keys, **numbers, kind=kind, info=info, source=source)
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


def longer_keys(longest: list[str], keys: pa.Array) -> list[str]:
    """Pick the longest of some keys (see :attr:`ClusterTable.longest`) and more keys."""
    lengths = pc.binary_length(keys).to_numpy(zero_copy_only=False)
    if len(longest) == _LONGEST and lengths.max(initial=0) <= len(longest[-1].encode()):
        return longest
    rows = np.argpartition(-lengths, _LONGEST)[:_LONGEST] if len(lengths) > _LONGEST else np.arange(len(lengths))
    found = [key[:_LONGEST_KEY] for key in keys.take(np.sort(rows)).to_pylist()]
    return sorted(longest + found, key=lambda key: -len(key.encode()))[:_LONGEST]
