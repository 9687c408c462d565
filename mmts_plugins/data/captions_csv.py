"""Captions and labels of a CSV or TSV, as OpenCLIP's CsvDataset reads them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import shown
from .source import EMPTY_CELL, Samples, Source, join_labels, pick, require


def read_csv(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    """As OpenCLIP's CsvDataset: ``pandas.read_csv(file, sep=sep)`` of all columns, then ``str(value)``.

    A column of numbers therefore loses leading zeros here exactly as it does in training, a separator of several
    characters is a regular expression, and what pandas refuses is refused. Reading fewer columns would be another
    call: pandas then cuts rows that are too long without a word.
    """
    import pandas as pd

    options: dict[str, Any] = {"sep": source.separator, "header": "infer" if source.header else None}
    notes = []
    with warnings.catch_warnings():
        # Of the slower engine that a regular expression needs, and of columns that hold numbers and texts.
        warnings.simplefilter("ignore", pd.errors.ParserWarning)
        warnings.simplefilter("ignore", pd.errors.DtypeWarning)
        if labels:
            columns = pd.read_csv(source.data, nrows=1, **options).columns
            # Class ids stay as they are written.
            options["dtype"] = {name: str for name in columns if str(name) in labels and str(name) != source.column}
        frame = pd.read_csv(source.data, **options)
    columns = frame.columns
    names = [str(name) for name in columns]
    hint = _csv_hint(source, names)
    column = pick(source, "csv", names, hint) if captions else None
    for label in labels:
        require(source, label, names, source.label_flag, hint)
    texts: list[str] = []
    if column is not None:
        values = frame[columns[names.index(column)]]
        empty = int(values.isna().sum())
        if empty:
            notes.append(
                f"{source.data}: {empty} cells of column {shown(column)} are empty (or NA, null, None); their caption "
                f"is {EMPTY_CELL!r}, as in training"
            )
        texts = [str(value) for value in values.tolist()]
        quoted = sum(text[:1] == text[-1:] == '"' for text in texts)
        if quoted and len(source.separator) > 1:
            notes.append(
                f"{source.data}: {quoted} captions keep their quotes: {source.separator!r} has {len(source.separator)} "
                "characters, which pandas takes for a regular expression, in training too; where a "
                "tab is meant, leave the flag out"
            )
    notes += _csv_notes(source, frame, names)
    cells = [frame[columns[names.index(label)]] for label in labels]
    ids = [[None if pd.isna(value) else str(value) for value in column.tolist()] for column in cells]
    form = "kaggle" if source.format == "kaggle" else "csv"
    return Samples(texts, join_labels(source, labels, ids), column, notes, form=form)


def _csv_notes(source: Source, frame: Any, names: Sequence[str]) -> list[str]:
    """What pandas does without a word."""
    import pandas as pd

    notes = []
    if not isinstance(frame.index, pd.RangeIndex):
        notes.append(
            f"{source.data}: rows have more fields than the header; pandas takes the first ones for names of rows, so "
            f"that column {shown(names[0])} holds the field after them (as in training)"
        )
    texts = (frame.iloc[:, place] for place in range(len(names)))
    broken = sum("\n" in value or "\r" in value for column in texts if not pd.api.types.is_numeric_dtype(column)
                 for value in column.tolist() if isinstance(value, str))  # fmt: skip
    if broken:
        notes.append(
            f"{source.data}: {broken} cells hold line breaks: a stray quote? Every line up to the next quote is part "
            "of such a cell, as in training"
        )
    return notes


def _csv_hint(source: Source, names: Sequence[str]) -> str:
    if not source.header:
        return "With --no-header, columns go by position: --column 0 is the first"
    if len(names) == 1:
        for other in (",", "\t", ";", "|"):
            if other != source.separator and other in names[0]:
                way = "leave --separator out, a tab is the default" if other == "\t" else f"pass --separator {other!r}"
                return f"The header has no {source.separator!r}: {way}"
    return "For a file without a header pass --no-header, and name columns by position (--column 0)"
