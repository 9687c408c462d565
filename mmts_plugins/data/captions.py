"""The captions and labels of a training set, whatever the format: all at once, or in units for an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Optional

import numpy as np

from ..errors import ConfigError, MMTSError
from . import forms
from .captions_csv import read_csv
from .captions_json import read_json
from .captions_parquet import failed_downloads, parquet_batches, read_parquet, row_group_runs
from .captions_text import TELLING, read_pairs, read_text, telling
from .opening import exists, first_lines, is_url, reading_text
from .source import BATCH, EMPTY_CELL, Part, Samples, Source
from .webdataset import read_webdataset, rule_of, tar_captions


def read_samples(source: Source, labels: Sequence[str] = (), captions: bool = True) -> Samples:
    """Read captions, labels or both.

    Raises:
        ConfigError: a flag does not fit the files (format, column, separator, split).
        MMTSError: a file is missing or damaged.
    """
    found = Samples([])
    weights: list[np.ndarray] = []
    for part in source.parts:
        before = max(len(found.captions), len(found.labels))
        for one in _read(source, part, labels, captions):
            found.add(one)
            found.how.update(one.how)
        now = max(len(found.captions), len(found.labels))
        if source.weights:
            weights.append(np.full(now - before, part.weight, np.int64))
    found.weight = np.concatenate(weights) if weights else None
    if not found.captions and not found.labels:
        why = "".join(f"; {note.partition(': ')[2]}" for note in found.notes)
        raise MMTSError(f"{source.data}: holds no samples (read as {found.form}){why}")
    _check(source, found)
    _record(source, found)
    return found


def _read(source: Source, part: Part, labels: Sequence[str], captions: bool) -> Iterator[Samples]:
    if labels and part.kind in ("webdataset", "pairs"):
        raise _no_columns(source, part.name, part.kind)
    if source.split is not None and part.kind != "json" and not part.splits:
        raise ConfigError(f"{part.name}: --split {source.split}: a {part.kind} source has no splits; leave it out")
    named = source.of(part.name)
    if part.kind == "webdataset":
        yield read_webdataset(named, part.files)
    elif part.kind in ("parquet", "arrow"):
        _must_exist(part.files)
        found = replace(read_parquet(named, part.files, labels, captions), form=part.kind)
        if source.split is not None:
            found.how["split"] = source.split
        elif len(part.splits) > 1:
            found.notes.append(
                f"{part.name}: files of the splits {', '.join(part.splits)} are all read; name those that are trained "
                "on with --split"
            )
        yield found
    elif part.kind == "pairs":
        with reading_text(part.name, "cannot be read as texts beside images"):
            yield read_pairs(named, part.files)
    else:
        _must_exist(part.files)
        for file in part.files:
            one = source.of(file)
            kind, one = looked_into(one, part.kind)
            if labels and kind == "text":
                raise _no_columns(source, file, kind)
            with reading_text(file, f"cannot be read as {kind}"):
                yield {"csv": read_csv, "json": read_json, "text": read_text}[kind](one, labels, captions)


def _no_columns(source: Source, name: str, kind: str) -> ConfigError:
    return ConfigError(f"{name}: {source.label_flag} needs named columns (CSV, JSON or Parquet), not {kind}")


def _must_exist(files: Sequence[str]) -> None:
    for file in files:
        if not exists(file):
            raise MMTSError(f"{file}: no such file")


def looked_into(source: Source, kind: str) -> tuple[str, Source]:
    """How one file of a kind of :class:`.Part` is read, where its lines may be those of a published form."""
    plain = source.format == "auto" and source.column is None and source.separator == "\t" and source.header
    lines = first_lines(source.data, TELLING) if plain and kind in ("csv", "text") else []
    if source.format == "kaggle" or (lines and forms.KAGGLE.fullmatch(lines[0])):
        return "csv", replace(source, format="kaggle", column=source.column or "caption", separator=",")
    return ("text" if kind == "csv" and telling(lines) is not None else kind), source


def _check(source: Source, found: Samples) -> None:
    """What cannot be captions is an error, what hardly is one is said."""
    blank = sum(not caption.strip() for caption in found.captions)
    if blank:
        found.notes.append(f"{source.data}: {blank} samples have a blank caption; they are kept, as one caption")
    if found.captions and found.captions[0] == EMPTY_CELL and set(found.captions) == {EMPTY_CELL}:
        raise MMTSError(
            f"{source.data}: every caption is {EMPTY_CELL!r}, an empty cell: column {found.column!r} holds none; name "
            "another with --column"
        )
    if len(found.captions) > 1 and len(set(found.captions)) == 1:
        found.notes.append(f"{source.data}: all {len(found.captions)} captions are alike; is it the right column?")


def _record(source: Source, found: Samples) -> None:
    """How it was read, for the table: what another reading of the same files would have to be the same in."""
    how = {"format": found.form, "column": found.column, **found.how, **_weights(source)}
    if found.form in ("csv", "kaggle"):
        how.update(separator="," if found.form == "kaggle" else source.separator, header=source.header)
    rows = max(len(found.captions), len(found.labels))
    found.how = {**how, "samples": rows, **({"left_out": dict(found.left_out)} if found.left_out else {})}


def how_read(source: Source) -> dict[str, Any]:
    """What :func:`read_samples` would record, as far as the flags tell, for an engine that reads :func:`units`."""
    return {"format": source.resolved_format(), "column": source.column, **_weights(source)}


def _weights(source: Source) -> dict[str, str]:
    return {"weights": "::".join(map(str, source.weights))} if source.weights else {}


def told(source: Source, found: Samples) -> str:
    """What was read, in one line."""
    how, files = found.how, sum(len(part.files) for part in source.parts)
    said = [f"read {source.data} as {how['format']}" + (f" ({files} files)" if files > 1 else "")]
    said += [f"column {found.column!r}"] if found.column is not None else []
    said += [f"separator {how['separator']!r}"] if "separator" in how else []
    said += [f"{name} {how[name]}" for name in ("split", "suffix", "weights") if name in how]
    said += [f"{how['samples']:,} {'captions' if found.captions else 'rows'}"]
    said += [f"{many:,} {why} left out" for why, many in found.left_out.items()]
    return ", ".join(said)


def units(source: Source) -> list[str]:
    """What engines read in parallel: runs of row groups of Parquet files (``FILE#first-last``), or tars.

    Any other format is a file at a time.

    Raises:
        MMTSError: there is nothing there.
    """
    found: list[str] = []
    for part in source.parts:
        if part.kind == "webdataset":
            found += part.files
            continue
        _must_exist(part.files)
        found += (
            [unit for file in part.files for unit in row_group_runs(file)] if part.kind == "parquet" else part.files
        )
    return found


def unit_weights(source: Source) -> dict[str, int]:
    """How often a caption of each unit's file counts."""
    return {file: part.weight for part in source.parts for file in part.files}


def left_out(source: Source) -> Optional[str]:
    """What :func:`read_samples` says of rows that it leaves out, for an engine that reads :func:`units`."""
    notes = [failed_downloads(source.of(part.name), part.files) for part in source.parts if part.kind == "parquet"]
    return "; ".join(note for note in notes if note) or None


def caption_batches(source: Source, unit: str) -> Iterator[list[str]]:
    """The captions of one of :func:`units`, some thousands at a time; the same as :func:`read_samples` gives."""
    path, _, groups = unit.rpartition("#")
    if path and groups.replace("-", "").isdigit() and (is_url(path) or os.path.exists(path)):
        first, last = map(int, groups.split("-"))
        for batch in parquet_batches(source.of(path), path, groups=range(first, last + 1)):
            yield [EMPTY_CELL if text is None else text for text in batch.captions]
        return
    part = next(part for part in source.parts if unit in part.files)
    if part.kind == "webdataset":
        captions: list[str] = []
        for caption in tar_captions(unit, rule_of(source, part.files[0])):
            if isinstance(caption, str):
                captions.append(caption)
            if len(captions) == BATCH:
                yield captions
                captions = []
        if captions:
            yield captions
    else:
        for one in _read(source, replace(part, files=[unit]), (), True):
            yield one.captions


def refuse_blank(captions: Sequence[str], source: str, keep: Optional[bool]) -> None:
    """Raise an MMTSError where captions are blank, unless they are to be kept."""
    blank = [number for number, caption in enumerate(captions, 1) if not caption.strip()]
    if blank and not keep:
        raise MMTSError(
            f"{source}: {len(blank)} samples have a blank caption (the first: sample {blank[0]}); drop them from the "
            "training set too, or pass --keep-blank to keep them as one caption"
        )
