"""Where samples are (files, their format, their columns) and what a reader makes of them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any, Optional, cast

import numpy as np

from ..errors import ConfigError, MMTSError, listed, shown
from . import forms
from .files import expand, parts_of
from .opening import SCHEME, is_url, start_of

TEXT_FORMATS = ("csv", "text", "json")
_FORMAT_OF_SUFFIX = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".tgz": "webdataset",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_PICKLES = (".pkl", ".pickle")
DEFAULT_COLUMNS = {
    "csv": ("title", "caption", "captions", "text", "sentence", "description", "comment"),  # the first is OpenCLIP's
    "json": ("desc", "caption", "captions", "text", "title", "sentence", "sentences", "description", "comment"),
    "parquet": ("title", "caption", "text", "desc", "captions", "TEXT", "sentence", "sentences", "description"),
}
BATCH = 65_536  # captions
EMPTY_CELL = "nan"  # str() of what pandas makes of it, and so what OpenCLIP trains on
_FINEST = 1000  # a weight has at most three decimals


@dataclass(frozen=True)
class Source:
    """Where the samples are and how to read them: the input flags of ``mmts cluster``.

    Attributes:
        data: files, folders, patterns or URLs, several joined with ``::``.
        format: one of :data:`.forms.FORMATS`.
        column: of the captions; of JSON also a path (:mod:`.forms`); of WebDataset the suffix of the member that holds
            them, of a ``.json`` with a field (``json.caption``).
        separator: of a CSV, as pandas takes it: one character, or a regular expression.
        header: whether the first row of a CSV names the columns.
        label_flag: what asked for labels, for messages.
        split: names with commas, of a form that has splits, or of files that are named by them, or ``all``; ``None``:
            of a form what is trained on.
        weights: of each of the joined parts, how often a sample of it counts; empty where all count once.
        skip_damaged: leave out what cannot be read of a tar, or of a line of JSON, and count it.
    """

    data: str
    format: str = "auto"
    column: Optional[str] = None
    separator: str = "\t"
    header: bool = True
    label_flag: str = "--label-column"
    split: Optional[str] = None
    weights: tuple[int, ...] = ()
    skip_damaged: bool = False

    @cached_property
    def parts(self) -> list[Part]:
        """The parts, each with its files: listed and looked into once, and by workers that are sent this not again.

        Raises:
            ConfigError, MMTSError: nothing is there, or what it is cannot be told.
        """
        names = parts_of(self.data)
        weights = self.weights or (1,) * len(names)
        if len(weights) != len(names):
            raise ConfigError(
                f"--weights: {len(weights)} for {len(names)} sources of {shown(self.data)}; give one for each, joined "
                "as they are with '::'"
            )
        return [self._part(name, weight) for name, weight in zip(names, weights)]

    def _part(self, name: str, weight: int) -> Part:
        files, splits = expand(name), cast("tuple[str, ...]", ())
        if len(files) > 1 and files[0].endswith((".parquet", ".arrow")):
            files, splits = _of_split(name, files, self.split)
        beside_images = files[0].endswith(".txt") and name != files[0] and not _is_pattern(name)
        if self.format == "pairs" or (self.format == "auto" and beside_images):
            return Part(name, files, "pairs", weight)
        return Part(name, files, self._kind(files[0]), weight, splits)

    def resolved_format(self) -> str:
        """How the first file is read: by ``format``, else by what it holds, else by its extension."""
        return self.parts[0].kind

    def _kind(self, file: str) -> str:
        if self.format != "auto":
            if forms.form_named(self.format):
                return "json"
            return "text" if forms.lines_named(self.format) or self.format == "kaggle" else self.format
        if SCHEME.match(file) and not is_url(file):
            return "webdataset"
        suffixes = [suffix.lower() for suffix in Path(file).suffixes[-2:]]
        if len(suffixes) == 2 and suffixes[1] in _COMPRESSED:
            suffixes.pop()
        suffix = suffixes[-1] if suffixes else ""
        start = start_of(file)
        if suffix in _PICKLES or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start.count(b"\0")):
            raise ConfigError(
                f"{file}: a pickle, which can run code when it is opened, and so is not read; have whoever trusts it "
                "write Parquet, CSV or JSON lines: pandas.read_pickle(FILE).to_parquet('captions.parquet')"
            )
        if start[:4] == b"PAR1":
            return "parquet"
        if start[:6] == b"ARROW1" or suffix == ".arrow":
            return "arrow"
        if start[257:262] == b"ustar":
            return "webdataset"
        if suffix in _FORMAT_OF_SUFFIX:
            return _FORMAT_OF_SUFFIX[suffix]
        if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
            return "json"
        raise ConfigError(
            f"{file}: the extension {suffix!r} does not tell the format; pass --format "
            f"{'|'.join(forms.FORMATS[1:8])} (extensions that do: {' '.join(_FORMAT_OF_SUFFIX)})"
        )

    def of(self, file: str) -> Source:
        """The same, for one of its files."""
        return replace(self, data=file, weights=())


def _of_split(name: str, files: list[str], wanted: Optional[str]) -> tuple[list[str], tuple[str, ...]]:
    """Of files that are named by their splits, as those of the Hugging Face hub, the ones that are wanted; and all
    splits that there are."""
    of_file = {file: _split_of(file) for file in files}
    splits = tuple(sorted({split for split in of_file.values() if split}))
    if wanted is None or wanted == "all":
        return files, splits
    missing = [split for split in wanted.split(",") if split not in splits]
    if missing:
        found = f"; found: {', '.join(splits)}" if splits else ", and no file is named by one"
        raise ConfigError(f"{name}: no split {shown(missing[0])} (--split){found}")
    return [file for file in files if of_file[file] in wanted.split(",")], splits


def _split_of(file: str) -> str:
    """``train`` of ``data/train-00000-of-00002.parquet`` and of ``train/data-00000-of-00001.arrow``."""
    *_, folder, last = ["", *file.replace(os.sep, "/").split("/")]
    name = re.match(r"(train|test|val|validation|dev)\w*(?=[-_.])", last, re.I)
    if name:
        return name[0].lower()
    return folder.lower() if re.fullmatch(r"train|test|val|validation|dev", folder, re.I) else ""


def _is_pattern(name: str) -> bool:
    return any(each in name for each in "*?[{")


@dataclass(frozen=True)
class Part:
    """One of the sources that are joined.

    Attributes:
        name: as it was given.
        files: that it names, in order.
        kind: how they are read: one of :data:`.forms.FORMATS` that is no published form.
        weight: how often each sample counts.
        splits: by which its files are named.
    """

    name: str
    files: list[str]
    kind: str
    weight: int = 1
    splits: tuple[str, ...] = ()


def weights_of(text: str) -> tuple[int, ...]:
    """Weights as they are given, ``1::2.5``, as the smallest whole numbers of the same proportion.

    Raises:
        ConfigError: one is no number above zero, or too fine.
    """
    try:
        factors = [Fraction(each.strip()) for each in text.split("::")]
    except (ValueError, ZeroDivisionError):
        factors = []
    common = lcm(*(factor.denominator for factor in factors)) if factors else 0
    if not factors or min(factors) <= 0 or common > _FINEST:
        raise ConfigError(
            f"--weights {shown(text)}: numbers above zero with at most three decimals, joined with '::', one for each "
            "source, such as 1::2.5"
        )
    whole = [int(factor * common) for factor in factors]
    shared = int(np.gcd.reduce(whole))
    return tuple(each // shared for each in whole)


@dataclass
class Samples:
    """One entry per training sample, in the order of the files.

    Attributes:
        captions: empty if only labels were asked for.
        labels: class ids as text, several columns joined with ``_``; empty unless asked for.
        column: where the captions stood, if the format has columns.
        notes: what the user should know about rows that are odd.
        images: whose captions they are, where the form says; else empty.
        form: the name of the format, or of the published form.
        left_out: how many samples are, by why.
        weight: ``[n]`` int64, how often each counts; ``None`` where all count once.
        how: what decides which captions are read, as it is recorded.
    """

    captions: list[str]
    labels: list[str] = field(default_factory=list)
    column: Optional[str] = None
    notes: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    form: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    weight: Optional[np.ndarray] = None
    how: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Samples) -> None:
        """Those of the next file."""
        for name in ("captions", "labels", "images"):
            getattr(self, name).extend(getattr(other, name))
        self.notes += [note for note in other.notes if note not in self.notes]
        self.column, self.form = self.column or other.column, self.form or other.form
        for why, many in other.left_out.items():
            self.left_out[why] = self.left_out.get(why, 0) + many


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
        f"{source.data}: no column {' or '.join(map(repr, usual[:2]))} or another usual name; found: {listed(names)}. "
        f"Name the column of the captions with --column. {hint}".rstrip(". ")
    )


def require(source: Source, name: str, names: Sequence[str], flag: str, hint: str = "") -> None:
    if name not in names:
        close = difflib.get_close_matches(name[:80], [each[:80] for each in names], n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"{source.data}: no column {shown(name)} ({flag}); found: {listed(names)}.{meant} {hint}".rstrip(". ")
        )


def join_labels(source: Source, names: Sequence[str], columns: Sequence[Sequence[Optional[str]]]) -> list[str]:
    joined = []
    for row, parts in enumerate(zip(*columns), 1):
        if None in parts:
            name = names[parts.index(None)]
            raise MMTSError(f"{source.data}: sample {row} has no {shown(name)} (empty, or NA); every sample needs one")
        joined.append("_".join(cast("tuple[str, ...]", parts)))
    return joined
