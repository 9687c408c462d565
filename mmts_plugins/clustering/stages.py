"""A cluster table in stages over files: part in, labelled part and counts out. Any engine can run them, in any order.

    count    captions of one input file, with how often each occurs, grouped by the caption's hash
    merge    the groups of one hash range from all input files: one part of distinct captions
    sample   embeddings of those captions of a part that the K-Means fit needs
    assign   embeds a part and labels it with the nearest centre of every run
    finish   the labelled part with the sizes of all clusters filled in: a part of the table

Every stage writes its file whole or not at all and skips what is there, so a killed run goes on where it was. No stage
holds more than one part; nothing grows with the number of captions but the files. The sample is drawn by the captions'
hashes, so that it does not depend on how the input is cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from .._files import replacing
from ..data import cache
from ..data.captions import caption_batches
from ..data.encoders import TextEncoder
from ..data.rows import Rows
from ..data.source import Source
from ..errors import ConfigError, MMTSError, reading
from ..tables import ClusterTable
from ..tables.hashing import hash_strings
from . import kmeans
from .estimate import Recipe
from .sampling import priorities

BUCKETS = 256  # hash ranges that an input file is split into
PART_ROWS = 262_144  # captions of a part before duplicates across input files are merged

_DAMAGED = "a damaged part; delete it and run the same command again"

STAGES = ("count", "merge", "sample", "assign", "finish")


@dataclass(frozen=True)
class Job:
    """One run over files: what it reads, what it computes and the folder of its intermediate files."""

    folder: str
    source: Source
    encoder: str
    batch_size: int
    device: Optional[str]
    cached: bool
    keep_blank: bool
    recipe: Recipe
    part_rows: int = PART_ROWS

    def path(self, stage: str, part: int, suffix: str = ".parquet") -> Path:
        """Of the file that a stage writes for a part."""
        return Path(self.folder) / stage / f"{part:06d}{suffix}"

    def claim(self, units: list[str]) -> None:
        """Write down what this folder is for, or check that it is for this.

        Raises:
            ConfigError: it holds another run's files.
        """
        wanted = json.loads(json.dumps({**asdict(self), "units": units, "files": [_stamp(unit) for unit in units]}))
        wanted.pop("folder")
        path = Path(self.folder) / "job.json"
        if path.exists():
            with reading(path, "a damaged note of an unfinished run; delete its folder"):
                found = dict(json.loads(path.read_text()))
            differ = sorted(key for key in wanted if wanted[key] != found.get(key))
            if differ:
                raise ConfigError(
                    f"{self.folder} holds an unfinished run with another {' and '.join(differ)}; finish that with its "
                    "own flags, or delete the folder"
                )
            return
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(wanted))


def _stamp(unit: str) -> Optional[tuple[int, int]]:
    """Size and time of the input file: they tell one that was changed in between."""
    path = unit.rpartition("#")[0] or unit
    if not os.path.exists(path):
        return None
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


class Worker:
    """Runs stages in one process; loads the encoder once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._encoder = TextEncoder(job.encoder, job.batch_size, job.device)

    @cached_property
    def _identity(self) -> Optional[str]:
        return self._encoder.identity() if self.job.cached else None

    def run(self, stage: str, part: int, **arguments: Any) -> None:
        """One part of one stage, unless it is there already."""
        getattr(self, stage)(part, **arguments)

    def count(self, part: int, unit: str, weight: int = 1) -> None:
        target = self.job.path("count", part, ".arrow")
        if target.exists():
            return
        counts = pa.table({"key": pa.array([], pa.large_string()), "count": pa.array([], pa.int64())})
        for captions in caption_batches(self.job.source, unit):
            if not self.job.keep_blank:
                _refuse_blank(captions, unit)
            one = pa.table({"key": pa.array(captions, pa.large_string())})
            one = one.append_column("count", pa.array(np.full(len(one), weight, np.int64)))
            counts = _merged(pa.concat_tables([counts, one]))
        hashes = hash_strings(counts["key"].to_pylist())
        order = np.argsort(hashes, kind="stable")
        counts = counts.append_column("hash", pa.array(hashes)).take(order)
        ends = np.searchsorted(hashes[order] >> np.uint64(56), np.arange(BUCKETS + 1, dtype=np.uint64))
        with replacing(target) as temporary, pa.ipc.new_file(str(temporary), counts.schema) as writer:
            for low, high in zip(ends, ends[1:]):
                piece = counts.slice(low, high - low).combine_chunks().to_batches()
                writer.write_batch(piece[0] if piece else pa.RecordBatch.from_pylist([], schema=counts.schema))

    def merge(self, part: int, buckets: tuple[int, int], units: int) -> None:
        target = self.job.path("merge", part)
        if target.exists():
            return
        batches = []
        for unit in range(units):
            path = self.job.path("count", unit, ".arrow")
            with reading(path, _DAMAGED), _opened(path) as reader:
                batches += [reader.get_batch(bucket) for bucket in range(*buckets)]
        table = (
            pa.Table.from_batches(batches).group_by(["key", "hash"], use_threads=False).aggregate([("count", "sum")])
        )
        order = pc.sort_indices(table, [("hash", "ascending"), ("key", "ascending")])
        table = table.rename_columns(["key", "hash", "count"]).take(order)
        with replacing(target) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=cache.PART)

    def sample(self, part: int, wanted: bool) -> None:
        """Embeddings of the rows listed in ``chosen``; the file has them in that order. None wanted, no file."""
        target = self.job.path("sample", part, ".npy")
        if target.exists() or not wanted:
            return
        rows = _load(self.job.path("chosen", part, ".npy"))
        pieces = []
        for start, keys in self._chunks(part):
            inside = rows[(rows >= start) & (rows < start + len(keys))] - start
            if self._identity is None:
                keys, inside = [keys[row] for row in inside], np.arange(len(inside))
            if len(inside):
                pieces.append(self._embed(keys)[inside])
        with replacing(target) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(pieces))

    def assign(self, part: int) -> None:
        target = self.job.path("assign", part)
        if target.exists():
            return
        centres = _load(Path(self.job.folder) / "centres.npy")
        labels = []
        for _, keys in self._chunks(part):
            points = Rows(self._embed(keys))
            labels.append(kmeans.assign(points, centres, np.ones(len(keys)), self.job.device)[0])
        columns = {str(run): column for run, column in enumerate(np.concatenate(labels, axis=1))}
        with replacing(target) as temporary:
            pq.write_table(pa.table(columns), temporary, compression="zstd")

    def finish(self, part: int, info: dict[str, Any], output: str) -> None:
        target = Path(output) / f"part-{part:06d}.parquet"
        if target.exists():
            return
        sizes = _load(Path(self.job.folder) / "sizes.npy")
        merged, labels = read_part(self.job.path("merge", part)), read_part(self.job.path("assign", part))
        frequency = np.zeros(len(merged))
        for run, column in enumerate(labels.columns):
            frequency += sizes[run][column.to_numpy()]
        rank = np.empty(sizes.shape[1], np.int32)
        rank[np.argsort(-sizes[0], kind="stable")] = np.arange(sizes.shape[1])
        table = ClusterTable.build(merged["key"].combine_chunks(), rank[labels["0"].to_numpy()],
                                   frequency / len(sizes), merged["count"].to_numpy(), info=info)  # fmt: skip
        whole = {"clusters": sizes.shape[1], "samples": int(sizes[0].sum()), "parts": info["parts"],
                 "table": info["table"], "part": part}  # fmt: skip
        table.save(target, whole)

    def _chunks(self, part: int) -> Iterator[tuple[int, list[str]]]:
        start = 0
        path = self.job.path("merge", part)
        with reading(path, _DAMAGED), open_part(path) as file:
            for group in range(file.num_row_groups):
                keys = file.read_row_group(group, columns=["key"])["key"].to_pylist()
                yield start, keys
                start += len(keys)

    def _embed(self, captions: list[str]) -> np.ndarray:
        return cache.embed_part(self._encoder.encode, self._identity, captions, f"--encoder {self.job.encoder}")


def _merged(table: pa.Table) -> pa.Table:
    return table.group_by("key", use_threads=False).aggregate([("count", "sum")]).rename_columns(["key", "count"])


def _refuse_blank(captions: list[str], unit: str) -> None:
    if any(not caption.strip() for caption in captions):
        raise MMTSError(
            f"{unit}: holds blank captions; drop them from the training set too, or pass --keep-blank to keep them as "
            "one caption"
        )


def open_part(path: Path) -> pq.ParquetFile:
    """A part written by a stage.

    Raises:
        MMTSError: it is truncated or missing, which a stage never leaves behind by itself.
    """
    with reading(path, _DAMAGED):
        return pq.ParquetFile(path)


def read_part(path: Path, columns: Optional[list[str]] = None) -> pa.Table:
    """All of :func:`open_part`."""
    with reading(path, _DAMAGED), open_part(path) as file:
        return file.read(columns=columns)


def _load(path: Path) -> np.ndarray:
    with reading(path, _DAMAGED):
        return cast(np.ndarray, np.load(path, allow_pickle=False))


def _opened(path: Path) -> pa.ipc.RecordBatchFileReader:
    with reading(path, _DAMAGED):
        return pa.ipc.open_file(pa.memory_map(str(path)))


def plan_merge(job: Job, units: int) -> list[tuple[int, int]]:
    """Ranges of buckets with about ``part_rows`` captions each."""
    rows = np.zeros(BUCKETS, np.int64)
    for unit in range(units):
        path = job.path("count", unit, ".arrow")
        with reading(path, _DAMAGED), _opened(path) as reader:
            rows += [reader.get_batch(bucket).num_rows for bucket in range(BUCKETS)]
    if not rows.any():
        raise MMTSError(f"{job.source.data}: holds no samples (read as {job.source.resolved_format()})")
    ranges, low = [], 0
    for bucket in range(BUCKETS):
        if bucket > low and rows[low : bucket + 1].sum() > job.part_rows:
            ranges.append((low, bucket))
            low = bucket
    ranges.append((low, BUCKETS))
    return [(low, high) for low, high in ranges if rows[low:high].any()]


def choose(job: Job, parts: int) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """The fit sample of every run, in one pass over the hashes and counts of all parts.

    Returns:
        For each run ``[m]`` numbers of rows (over all parts) by descending priority, and ``[m]`` their weights, as
        :func:`.sampling.sample` gives them; and how many distinct captions there are.
    """
    recipe = job.recipe
    size = recipe.fit_rows * recipe.clusters
    best: list[tuple[np.ndarray, ...]] = [(np.empty(0), np.empty(0), np.empty(0, np.int64))] * recipe.runs
    start = 0
    for part in range(parts):
        table = read_part(job.path("merge", part), ["hash", "count"])
        hashes, weight = table["hash"].to_numpy(), table["count"].to_numpy().astype(np.float64)
        rows = np.arange(start, start + len(hashes))
        start += len(hashes)
        for run in range(recipe.runs):
            priority = priorities(hashes, weight, recipe.seed + run)
            joined = [np.concatenate(pair) for pair in zip(best[run], (priority, weight, rows))]
            order = np.argsort(-joined[0], kind="stable")[: size + 1]
            best[run] = tuple(column[order] for column in joined)
    chosen, weights = [], []
    for priority, weight, rows in best:
        threshold = priority[size] if len(priority) > size else 0.0
        chosen.append(rows[:size])
        weights.append(np.maximum(weight[:size], threshold))
    return chosen, weights, start
