"""Where samples are (a file, its format, its columns) and what a reader makes of them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, cast

from ..errors import ConfigError, MMTSError, listed, reading, shown

FORMATS = ("auto", "csv", "text", "json", "parquet", "webdataset")
_FORMAT_OF_SUFFIX = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".tgz": "webdataset",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DEFAULT_COLUMNS = {
    "csv": ("title",),  # OpenCLIP's --csv-caption-key
    "json": ("desc", "caption"),  # VAST's annotations
    "parquet": ("title", "caption", "text", "desc"),
}
BATCH = 65_536  # captions
EMPTY_CELL = "nan"  # str() of what pandas makes of it, and so what OpenCLIP trains on
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # two letters at least: C:\ is a drive


@dataclass(frozen=True)
class Source:
    """Where the samples are and how to read them: the input flags of ``mmts cluster``.

    Attributes:
        data: a file; for Parquet also a folder or a glob pattern, for WebDataset a brace pattern or several (``::``).
        column: of the captions; of WebDataset the suffix of the member that holds them.
        separator: of a CSV, as pandas takes it: one character, or a regular expression.
        header: whether the first row of a CSV names the columns.
        label_flag: what asked for labels, for messages.
    """

    data: str
    format: str = "auto"
    column: Optional[str] = None
    separator: str = "\t"
    header: bool = True
    label_flag: str = "--label-column"

    def resolved_format(self) -> str:
        """The format, by the file's extension where it is ``auto``; compressed files by the one before."""
        if self.format != "auto":
            return self.format
        first = self.data.split("::")[0]
        if SCHEME.match(first):
            return "webdataset"
        suffixes = [suffix.lower() for suffix in Path(first).suffixes[-2:]]
        if len(suffixes) == 2 and suffixes[1] in _COMPRESSED:
            suffixes.pop()
        suffix = suffixes[-1] if suffixes else ""
        if suffix in _FORMAT_OF_SUFFIX:
            return _FORMAT_OF_SUFFIX[suffix]
        if os.path.isdir(first):
            if parquet_below(first):
                return "parquet"
            with reading(first, "cannot be read"):
                names = sorted(os.listdir(first))
            raise ConfigError(
                f"{self.data}: a folder without *.parquet files (it holds {listed(names) or 'nothing'}); name the "
                "file of the captions, or quote a brace pattern of tars: 'FOLDER/{00000..00009}.tar'"
            )
        raise ConfigError(
            f"{self.data}: the extension {suffix!r} does not tell the format; pass --format "
            f"{'|'.join(FORMATS[1:])} (extensions that do: {' '.join(_FORMAT_OF_SUFFIX)})"
        )


@dataclass(frozen=True)
class Samples:
    """One entry per training sample, in the order of the file.

    Attributes:
        captions: empty if only labels were asked for.
        labels: class ids as text, several columns joined with ``_``; empty unless asked for.
        column: where the captions stood, if the format has columns.
        notes: what the user should know about rows that are odd.
    """

    captions: list[str]
    labels: list[str] = field(default_factory=list)
    column: Optional[str] = None
    notes: list[str] = field(default_factory=list)


def parquet_below(folder: str) -> list[str]:
    """The Parquet files below a folder in the order of their names, without hidden and unfinished ones."""
    files = sorted(Path(folder).rglob("*.parquet"))
    return [str(file) for file in files if not any(part[0] in "._" for part in file.relative_to(folder).parts)]


def pick(source: Source, kind: str, names: Sequence[str], hint: str = "") -> str:
    """The caption column: the one asked for, else the first usual name that is there."""
    if source.column is not None:
        require(source, source.column, names, "--column", hint)
        return source.column
    usual = DEFAULT_COLUMNS[kind]
    for name in usual:
        if name in names:
            return name
    raise ConfigError(
        f"{source.data}: no column {' or '.join(map(repr, usual))}; found: {listed(names)}. "
        f"Name the column of the captions with --column. {hint}".rstrip(". ")
    )


def require(source: Source, name: str, names: Sequence[str], flag: str, hint: str = "") -> None:
    if name not in names:
        raise ConfigError(
            f"{source.data}: no column {shown(name)} ({flag}); found: {listed(names)}. {hint}".rstrip(". ")
        )


def join_labels(source: Source, names: Sequence[str], columns: Sequence[Sequence[Optional[str]]]) -> list[str]:
    joined = []
    for row, parts in enumerate(zip(*columns), 1):
        if None in parts:
            name = names[parts.index(None)]
            raise MMTSError(f"{source.data}: sample {row} has no {shown(name)} (empty, or NA); every sample needs one")
        joined.append("_".join(cast("tuple[str, ...]", parts)))
    return joined
