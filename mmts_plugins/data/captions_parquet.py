"""Captions and labels of Parquet and Arrow files, whole or some row groups at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Optional, cast

from ..errors import MMTSError, one_line, reading, shown
from .opening import open_bytes
from .source import BATCH, EMPTY_CELL, Samples, Source, join_labels, pick, require

_UNIT = 500_000  # rows of a Parquet file that an engine reads as one part


def read_parquet(source: Source, files: Sequence[str], labels: Sequence[str], captions: bool) -> Samples:
    texts: list[Optional[str]] = []
    ids: list[list[Optional[str]]] = [[] for _ in labels]
    column, left_out = source.column, 0
    for file in files:
        for batch in parquet_batches(replace(source, column=column), file, labels, captions):
            column = batch.column
            left_out += batch.left_out
            texts += batch.captions
            for target, cells in zip(ids, batch.labels):
                target += cells
    empty = sum(text is None for text in texts)
    found = Samples([EMPTY_CELL if text is None else text for text in texts], column=column, form="parquet")
    note = _left_out(source, left_out)
    if note:
        found.notes.append(note)
        found.left_out["failed downloads"] = left_out
    if empty:
        found.notes.append(
            f"{source.data}: {empty} cells of column {shown(column)} are empty; their caption is {EMPTY_CELL!r}"
        )
    found.labels = join_labels(source, labels, ids)
    return found


def failed_downloads(source: Source, files: Sequence[str]) -> Optional[str]:
    """What :func:`read_parquet` says of rows that it leaves out, for an engine that reads :func:`.captions.units`."""
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

    def texts(cells: Any, name: str) -> list[Optional[str]]:
        try:
            return cast("list[Optional[str]]", cells.cast(pa.large_string()).to_pylist())
        except pa.ArrowException as error:
            raise MMTSError(f"{path}: column {shown(name)} holds {one_line(str(cells.type))[:80]}, not text") from error

    with reading(path, f"cannot be read as {_name(path)} (truncated or damaged?)"), _opened(path) as (schema, batches):
        column = pick(replace(source, data=path), "parquet", schema.names) if captions else None
        for label in labels:
            require(replace(source, data=path), label, schema.names, source.label_flag)
        report = "status" in schema.names and "url" in schema.names and _is_text(schema.field("status").type)
        wanted = [*([] if column is None else [column]), *labels, *(["status"] if report else [])]
        for batch in batches(list(dict.fromkeys(wanted)), groups):
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


Batches = Callable[[list[str], Optional[range]], Iterator[Any]]


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Batches]]:
    """The schema of a Parquet or Arrow file (also the stream of ``datasets``' ``save_to_disk``), and its batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_bytes(path) as raw:
        start = raw.read(6)
        raw.seek(0)
        whole = start == b"ARROW1"
        if not whole and (start[:4] == b"PAR1" or not path.endswith(".arrow")):
            with pq.ParquetFile(raw) as file:
                yield (
                    file.schema_arrow,
                    lambda columns, groups: file.iter_batches(BATCH, row_groups=groups, columns=columns),
                )
            return
        with pa.ipc.open_file(raw) if whole else pa.ipc.open_stream(raw) as arrow:
            every = (arrow.get_batch(number) for number in range(arrow.num_record_batches)) if whole else arrow
            yield arrow.schema, lambda columns, _: (batch.select(columns) for batch in every)


def _name(path: str) -> str:
    return "arrow" if path.endswith(".arrow") else "parquet"


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or (
        pa.types.is_dictionary(kind) and _is_text(kind.value_type)))  # fmt: skip


def row_group_runs(path: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    with reading(path, "cannot be read as parquet (truncated?)"), open_bytes(path) as file:
        footer = pq.read_metadata(file)
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    first, rows = 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= _UNIT or group == len(sizes) - 1:
            yield f"{path}#{first}-{group}"
            first, rows = group + 1, 0
