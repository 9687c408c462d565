"""Captions and labels of Parquet files, whole or some row groups at a time."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional, cast

from ..errors import MMTSError, one_line, reading, shown
from .source import BATCH, EMPTY_CELL, Samples, Source, join_labels, parquet_below, pick, require

_UNIT = 500_000  # rows of a Parquet file that an engine reads as one part


def parquet_files(data: str) -> list[str]:
    """A file, those below a folder, or those that a glob pattern names; both engines read the same.

    Raises:
        MMTSError: there is nothing there.
    """
    if os.path.isdir(data):
        files = parquet_below(data)
        if not files:
            raise MMTSError(f"{data}: the folder holds no *.parquet file")
        return files
    files = [data] if os.path.exists(data) else sorted(glob.glob(data, recursive=True))
    if not files:
        raise MMTSError(f"{data}: no such file")
    return files


def read_parquet(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    texts: list[Optional[str]] = []
    ids: list[list[Optional[str]]] = [[] for _ in labels]
    column, left_out = source.column, 0
    for file in parquet_files(source.data):
        for batch in parquet_batches(replace(source, column=column), file, labels, captions):
            column = batch.column
            left_out += batch.left_out
            texts += batch.captions
            for target, cells in zip(ids, batch.labels):
                target += cells
    empty = sum(text is None for text in texts)
    notes = [note for note in (_left_out(source, left_out),) if note]
    if empty:
        notes.append(
            f"{source.data}: {empty} cells of column {shown(column)} are empty; their caption is {EMPTY_CELL!r}"
        )
    captions_read = [EMPTY_CELL if text is None else text for text in texts]
    return Samples(captions_read, join_labels(source, labels, ids), column, notes)


def failed_downloads(source: Source) -> Optional[str]:
    """What :func:`read_samples` says of rows that it leaves out, for an engine that reads :func:`units`."""
    if source.resolved_format() != "parquet":
        return None
    files = parquet_files(source.data)
    return _left_out(source, sum(x.left_out for file in files for x in parquet_batches(source, file, captions=False)))


def _left_out(source: Source, rows: int) -> Optional[str]:
    if not rows:
        return None
    return (
        f"{source.data}: {rows} rows whose status is not 'success' are left out: downloads that failed (img2dataset); "
        "to keep them, drop the column"
    )


@dataclass(frozen=True)
class _Batch:
    """Some rows of a Parquet file: captions and labels, cells that are empty as ``None``."""

    column: Optional[str]
    captions: list[Optional[str]]
    labels: list[list[Optional[str]]]
    left_out: int


def parquet_batches(
    source: Source, path: str, labels: Sequence[str] = (), captions: bool = True, groups: Optional[range] = None
) -> Iterator[_Batch]:
    """All rows of a file, or of some of its row groups; a list of captions gives one row each.

    A report of img2dataset (columns ``url`` and ``status``) also names what could not be downloaded: no samples.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def texts(cells: Any, name: str) -> list[Optional[str]]:
        try:
            return cast("list[Optional[str]]", cells.cast(pa.large_string()).to_pylist())
        except pa.ArrowException as error:
            raise MMTSError(f"{path}: column {shown(name)} holds {one_line(str(cells.type))[:80]}, not text") from error

    with reading(path, "cannot be read as parquet (truncated or damaged?)"), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        column = pick(replace(source, data=path), "parquet", schema.names) if captions else None
        for label in labels:
            require(replace(source, data=path), label, schema.names, source.label_flag)
        report = "status" in schema.names and "url" in schema.names and _is_text(schema.field("status").type)
        wanted = [*([] if column is None else [column]), *labels, *(["status"] if report else [])]
        for batch in file.iter_batches(BATCH, row_groups=groups, columns=list(dict.fromkeys(wanted))):
            rows = len(batch)
            if report:
                batch = batch.filter(pc.equal(batch.column("status").cast(pa.string()), "success"))
            left_out, cells = rows - len(batch), None if column is None else batch.column(column)
            if cells is not None and (pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)):
                batch, cells = batch.take(pc.list_parent_indices(cells)), pc.list_flatten(cells)
            yield _Batch(
                column,
                [] if column is None else texts(cells, column),
                [texts(batch.column(label), label) for label in labels],
                left_out,
            )


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or (
        pa.types.is_dictionary(kind) and _is_text(kind.value_type)))  # fmt: skip


def row_group_runs(path: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    with reading(path, "cannot be read as parquet (truncated?)"):
        footer = pq.read_metadata(path)
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    first, rows = 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= _UNIT or group == len(sizes) - 1:
            yield f"{path}#{first}-{group}"
            first, rows = group + 1, 0
