"""Classes and how often each occurs."""

from __future__ import annotations

import os
import re

import numpy as np

from ..errors import MMTSError, listed, shown
from ..fields import LARGEST_WHOLE
from .text import reading_text


def read_class_counts(path: str) -> tuple[list[str], np.ndarray, list[str]]:
    """A CSV ``class_id,count``, as the authors of MM-TS publish for EPIC-KITCHENS-100.

    Returns:
        The ids as text, ``[M]`` int64 counts above zero, and notes for the user.
    """
    import pandas as pd

    if not os.path.exists(path):
        raise MMTSError(f"{path}: no such file (--class-counts)")
    with reading_text(path, "cannot be read as CSV"):
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [name for name in ("class_id", "count") if name not in frame.columns]
    if missing:
        raise MMTSError(
            f"{path}: no column {missing[0]!r}; --class-counts takes a CSV with the header class_id,count "
            f"(found: {listed([str(name) for name in frame.columns])})"
        )
    if not isinstance(frame.index, pd.RangeIndex):
        raise MMTSError(f"{path}: its rows have more fields than the header {listed(list(frame.columns))}")
    ids, counts = frame["class_id"].tolist(), []
    for row, (name, count) in enumerate(zip(ids, frame["count"].tolist()), 2):
        if not name.strip():
            raise MMTSError(f"{path}: line {row}: no class_id")
        if not re.fullmatch(r"[0-9]+", count):
            raise MMTSError(
                f"{path}: line {row}: the count of class {shown(name)} is {shown(count)}, not a whole number"
            )
        counts.append(int(count.lstrip("0")[:20] or 0))  # 20 digits are too many, and 5,000 take Python too long
        if counts[-1] > LARGEST_WHOLE:
            raise MMTSError(f"{path}: line {row}: the count of class {shown(name)} is {shown(count)}: too large")
    if sum(counts) > LARGEST_WHOLE:
        raise MMTSError(f"{path}: the counts add up to {sum(counts)}: too large")
    twice = frame["class_id"][frame["class_id"].duplicated()]
    if len(twice):
        raise MMTSError(f"{path}: class {shown(twice.iloc[0])} occurs more than once")
    present = [index for index, count in enumerate(counts) if count]
    if not present:
        raise MMTSError(f"{path}: holds no class with a count above zero")
    notes = []
    if len(present) < len(ids):
        notes.append(f"{path}: {len(ids) - len(present)} classes have no sample (count 0) and are left out")
    return [ids[index] for index in present], np.array([counts[index] for index in present], np.int64), notes
