"""The Parquet files of a table: opened, their columns and metadata checked, whole or as parts in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .._files import PathLike
from ..errors import TableError, reading, shown
from ..fields import MAPPING, TEXT, WHOLE, Field
from .hashing import ContentHash, legacy_hash

CAPTION = "caption"
CLASS = "class"
COLUMNS = {"key": pa.large_string(), "cluster": pa.int32(), "frequency": pa.float64(), "count": pa.int64()}
METADATA_KEY = b"mmts"
FORMAT = 2
"""1, until 0.1: the hash left out the counts."""

_MOST_CLUSTERS = 1 << 24  # or as many as there are keys; so that a number per cluster fits into memory
_MOST = 2**53  # of samples, and so of a frequency: sums are exact, in whole numbers and in floats
_DEEPEST = 16  # metadata


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
OF_A_FILE = ("format", "content_hash", "parts", "part", "table")
_OF_A_PART = ("content_hash", "part", "frequency_min", "frequency_max")
_OF_A_RUN = ("created", "versions")  # a killed run that goes on has others


def part_info(schema: pa.Schema, part: PathLike) -> dict[str, Any]:
    """Read the metadata that a part of a table carries; empty where another tool wrote it.

    Raises:
        TableError: they are damaged, or of a newer release.
    """
    raw = (schema.metadata or {}).get(METADATA_KEY)
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
    if written > FORMAT:
        raise TableError(f"{part}: written by a newer mmts-plugins (format {written}, this one reads {FORMAT})")
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


def whole_info(source: object, files: Sequence[Path], infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
    its_own = {*OF_A_FILE, *(_OF_A_PART if len(files) > 1 else ())}
    return {name: value for name, value in first.items() if name not in its_own}


def check_counted(files: Sequence[Path], parts: Sequence[Iterable[str]]) -> None:
    """Raise a TableError where some parts have counts and others have none."""
    with_counts = ["count" in part for part in parts]
    if any(with_counts) and not all(with_counts):
        one, other = files[with_counts.index(True)], files[with_counts.index(False)]
        raise TableError(f"{other}: column 'count' is missing, which {one.name} has")


def check_part_hash(file: Path, info: dict[str, Any], kind: str, part: Mapping[str, pa.Array]) -> None:
    """Raise a TableError where one part of several states another hash than its content has."""
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
