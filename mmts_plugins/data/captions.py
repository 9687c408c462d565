"""The captions and labels of a training set, whatever the format: all at once, or in units for an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Optional

from ..errors import ConfigError, MMTSError
from .captions_csv import read_csv
from .captions_json import read_json
from .captions_parquet import parquet_batches, parquet_files, read_parquet, row_group_runs
from .captions_text import read_text
from .source import BATCH, EMPTY_CELL, Samples, Source
from .text import reading_text
from .webdataset import read_webdataset, shards, tar_captions


def read_samples(source: Source, labels: Sequence[str] = (), captions: bool = True) -> Samples:
    """Read captions, labels or both.

    Raises:
        ConfigError: a flag does not fit the file (format, column, separator).
        MMTSError: the file is missing or damaged.
    """
    kind = source.resolved_format()
    if kind == "webdataset" and (source.column or "").lower().endswith("json"):
        raise ConfigError(f"{source.data}: --column {source.column}: a .json holds fields, not a caption by itself")
    if labels and kind in ("text", "webdataset"):
        raise ConfigError(f"{source.data}: {source.label_flag} needs named columns (CSV, JSON or Parquet), not {kind}")
    if kind == "webdataset":
        samples = read_webdataset(source)
    elif kind == "parquet":
        samples = read_parquet(source, labels, captions)
    else:
        if not os.path.exists(source.data):
            raise MMTSError(f"{source.data}: no such file")
        reader = {"csv": read_csv, "json": read_json, "text": read_text}[kind]
        with reading_text(source.data, f"cannot be read as {kind}"):
            samples = reader(source, labels, captions)
    if not samples.captions and not samples.labels:
        why = "".join(f"; {note.partition(': ')[2]}" for note in samples.notes)
        raise MMTSError(f"{source.data}: holds no samples (read as {kind}){why}")
    blank = sum(not caption.strip() for caption in samples.captions)
    if blank:
        samples.notes.append(f"{source.data}: {blank} samples have a blank caption; they are kept, as one caption")
    return samples


def units(source: Source) -> list[str]:
    """What engines read in parallel: runs of row groups of Parquet files (``FILE#first-last``), or tars.

    Any other format is one unit.

    Raises:
        MMTSError: there is nothing there.
    """
    kind = source.resolved_format()
    if kind == "webdataset":
        return shards(source.data)
    if kind == "parquet":
        return [unit for file in parquet_files(source.data) for unit in row_group_runs(file)]
    if not os.path.exists(source.data):
        raise MMTSError(f"{source.data}: no such file")
    return [source.data]


def caption_batches(source: Source, unit: str) -> Iterator[list[str]]:
    """The captions of one of :func:`units`, some thousands at a time; the same as :func:`read_samples` gives."""
    kind = source.resolved_format()
    if kind == "webdataset":
        captions: list[str] = []
        for caption in tar_captions(unit, source.column):
            if isinstance(caption, str):
                captions.append(caption)
            if len(captions) == BATCH:
                yield captions
                captions = []
        if captions:
            yield captions
    elif kind == "parquet":
        path, _, groups = unit.rpartition("#")
        first, last = map(int, groups.split("-"))
        for batch in parquet_batches(source, path, groups=range(first, last + 1)):
            yield [EMPTY_CELL if text is None else text for text in batch.captions]
    else:
        yield read_samples(source).captions


def refuse_blank(captions: Sequence[str], source: str, keep: Optional[bool]) -> None:
    """Raise an MMTSError where captions are blank, unless they are to be kept."""
    blank = [number for number, caption in enumerate(captions, 1) if not caption.strip()]
    if blank and not keep:
        raise MMTSError(
            f"{source}: {len(blank)} samples have a blank caption (the first: sample {blank[0]}); drop them from the "
            "training set too, or pass --keep-blank to keep them as one caption"
        )
