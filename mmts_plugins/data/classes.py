"""Classes and how often each occurs: ``class_id,count`` CSV as the authors of MM-TS publish it, and tables of classes.

Runs inside training, too: nothing but NumPy, Arrow and the standard library.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Optional, Union

import numpy as np

from ..errors import TableError, listed, shown
from ..fields import LARGEST_WHOLE
from ..tables import CLASS, ClusterTable
from .opening import opened_text, reading_text

_COLUMNS = ("class_id", "count")


def load_table(path: str) -> ClusterTable:
    """A cluster table, or classes as ``class_id,count`` CSV.

    Raises:
        TableError: it cannot be read.
    """
    return load_classes(path) if path.endswith(".csv") else ClusterTable.load(path)


def load_classes(path: str) -> ClusterTable:
    """``class_id,count`` CSV as a table of classes: the one that ``mmts cluster --class-counts`` writes.

    Raises:
        TableError: it cannot be read, or a class has no sample.
    """
    return counted(read_counts(path), path)


def counted(counts: Mapping[str, int], source: str) -> ClusterTable:
    """Counts of classes as a table; ``source`` is the file that they are of.

    Raises:
        TableError: there are none, or one is zero.
    """
    if not counts:
        raise TableError(f"{source}: no rows")
    empty = min(sorted(counts), key=lambda key: counts[key])
    if counts[empty] < 1:
        raise TableError(f"{source}: class {empty} has the count {counts[empty]}")
    return replace(class_table(list(counts), list(counts.values())), source=source)


def class_table(
    ids: Sequence[str], count: Union[Sequence[int], np.ndarray], info: Optional[dict[str, Any]] = None
) -> ClusterTable:
    """One key and one cluster per class, in the order of their names: the same counts have the same hash, wherever they
    come from and in whatever order. The frequency of a class is its count."""
    rows = sorted(range(len(ids)), key=lambda row: ids[row])
    sizes = np.asarray(count)[rows]
    return ClusterTable.build([ids[row] for row in rows], range(len(rows)), sizes, sizes, CLASS, info)


def read_class_counts(path: str) -> tuple[list[str], np.ndarray, list[str]]:
    """:func:`read_counts` of classes that have samples.

    Returns:
        The ids, ``[M]`` int64 counts above zero, and notes for the user.

    Raises:
        TableError: it cannot be read, or no class has a sample.
    """
    counts = read_counts(path)
    present = {key: count for key, count in counts.items() if count}
    if not present:
        raise TableError(f"{path}: holds no class with a count above zero")
    notes = []
    if len(present) < len(counts):
        notes.append(f"{path}: {len(counts) - len(present)} classes have no sample (count 0) and are left out")
    return list(present), np.array(list(present.values()), np.int64), notes


def read_counts(path: str) -> dict[str, int]:
    """The classes of a ``class_id,count`` CSV as they are written, each with its count; other columns are free.

    Raises:
        TableError: it cannot be read, a class occurs twice or has no name, or a count is not a whole number.
    """
    counts: dict[str, int] = {}
    for line, key, count in read_rows(path, _COLUMNS, "a distribution of classes", strict=True):
        if not key.strip():
            raise TableError(f"{path}: line {line}: no class_id")
        if key in counts:
            raise TableError(f"{path}: line {line}: class {shown(key)} occurs more than once")
        digits = count.strip()
        if not re.fullmatch("[0-9]+", digits):
            raise TableError(
                f"{path}: line {line}: the count of class {shown(key)} is {shown(count)}: not a whole number"
            )
        counts[key] = int(digits.lstrip("0")[:20] or 0)  # 20 digits are too many, and 5,000 take Python too long
        if counts[key] > LARGEST_WHOLE:
            raise TableError(f"{path}: line {line}: the count of class {shown(key)} is {shown(count)}: too large")
    total = sum(counts.values())
    if total > LARGEST_WHOLE:
        raise TableError(f"{path}: the counts add up to {total}: too large")
    return counts


def read_rows(path: str, columns: Sequence[str], what: str, strict: bool = False) -> Iterator[tuple[Any, ...]]:
    """Line number and the named columns of every row of a CSV; cells that are not there are empty.

    Args:
        path: the file.
        columns: by the names in its first row.
        what: the file is to be, for messages.
        strict: refuse stray quotes, and more fields than the header has where the last column is wanted: ``1,234`` is
            no count of 1. Elsewhere they are taken for a part of the last column.

    Raises:
        TableError: it cannot be read, or a column is missing.
    """
    with reading_text(path, f"cannot be read as {what}", TableError), opened_text(path, newline="") as file:
        rows = csv.DictReader(file, strict=strict)
        names = list(rows.fieldnames or [])
        lacking = [column for column in columns if column not in names]
        if lacking:
            raise TableError(f"{path}: not {what}: column {lacking[0]!r} is missing (found: {', '.join(names[:8])})")
        for row in rows:
            surplus: Any = row.get(None)
            if strict and names[-1] in columns and surplus and any(cell.strip() for cell in surplus):
                raise TableError(f"{path}: line {rows.line_num}: has more fields than the header {listed(names)}")
            yield (rows.line_num, *(row[column] or "" for column in columns))
