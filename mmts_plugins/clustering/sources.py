"""Reading what a table is made from: captions and labels (CSV, JSON, text, Parquet, WebDataset), counts, embeddings."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import re
import shlex
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Optional, TextIO, Union, cast

import numpy as np

from ..errors import ConfigError, MMTSError, cause, one_line, reading, shown
from ..fields import LARGEST_WHOLE
from .rows import Rows, release

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
_DEFAULT_COLUMNS = {
    "csv": ("title",),  # OpenCLIP's --csv-caption-key
    "json": ("desc", "caption"),  # VAST's annotations
    "parquet": ("title", "caption", "text", "desc"),
}
_BATCH = 65_536  # captions
_UNIT = 500_000  # rows of a Parquet file that an engine reads as one part
_EMPTY_CELL = "nan"  # str() of what pandas makes of it, and so what OpenCLIP trains on
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # two letters at least: C:\ is a drive
LARGEST = 1e12  # of an embedding: squares, summed over a set of any size, stay far from float32's end
_MANY_FIELDS = 20  # an object of more texts is no record
_DEEPEST = 6  # levels of a document that are looked at
_TEXT_FIELDS = ("caption", "captions", "sentence", "sentences", "raw", "desc", "description", "text", "comment")
_TABLE_LINES = 0.9  # of a text file's lines that look like rows of a table: then they are no captions
_NAMED_LINE = re.compile(
    r"[^\t,|]*\.(?:jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mkv|mov|webm|wav|mp3)(?:#\d+)?\s*([\t,|])", re.I
)


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
        if _SCHEME.match(first):
            return "webdataset"
        suffixes = [suffix.lower() for suffix in Path(first).suffixes[-2:]]
        if len(suffixes) == 2 and suffixes[1] in _COMPRESSED:
            suffixes.pop()
        suffix = suffixes[-1] if suffixes else ""
        if suffix in _FORMAT_OF_SUFFIX:
            return _FORMAT_OF_SUFFIX[suffix]
        if os.path.isdir(first):
            if _parquet_below(first):
                return "parquet"
            with reading(first, "cannot be read"):
                names = sorted(os.listdir(first))
            raise ConfigError(
                f"{self.data}: a folder without *.parquet files (it holds {_listed(names) or 'nothing'}); name the "
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
        samples = _read_webdataset(source)
    elif kind == "parquet":
        samples = _read_parquet(source, labels, captions)
    else:
        if not os.path.exists(source.data):
            raise MMTSError(f"{source.data}: no such file")
        reader = {"csv": _read_csv, "json": _read_json, "text": _read_text}[kind]
        with _reading_text(source.data, f"cannot be read as {kind}"):
            samples = reader(source, labels, captions)
    if not samples.captions and not samples.labels:
        why = "".join(f"; {note.partition(': ')[2]}" for note in samples.notes)
        raise MMTSError(f"{source.data}: holds no samples (read as {kind}){why}")
    blank = sum(not caption.strip() for caption in samples.captions)
    if blank:
        samples.notes.append(f"{source.data}: {blank} samples have a blank caption; they are kept, as one caption")
    return samples


@contextmanager
def _reading_text(path: str, what: str) -> Iterator[None]:
    """:func:`reading`, and how to convert a file of another encoding."""
    with reading(path, what):
        try:
            yield
        except UnicodeDecodeError as error:
            with open(path, "rb") as file:
                start = file.read(2)
            encoding = "UTF-16" if start in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
            converted = shlex.quote(f"utf8{Path(path).suffix}")
            way = f"if it is {encoding}, convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {converted}"
            if start == b"\x1f\x8b":
                way = "it is compressed; name it .gz, or gunzip it"
            raise MMTSError(f"{path}: {what}: it is not UTF-8 text ({cause(error)}); {way}") from error


def _opened_text(path: str) -> TextIO:
    """A text file, also through gzip, bzip2, xz and Zstandard, which are told by their first bytes."""
    with open(path, "rb") as file:
        start = file.read(10)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow as pa

        stream: Any = io.BytesIO(pa.CompressedInputStream(pa.OSFile(path), "zstd").read())
    else:
        # bzip2 has no first bytes that a text could not have, but for those of its first block.
        known = {b"\x1f\x8b": gzip.open, b"BZh" + start[3:4] + b"1AY&SY": bz2.open, b"\xfd7zXZ\0": lzma.open}
        opener: Any = next((opener for magic, opener in known.items() if start.startswith(magic)), open)
        stream = opener(path, "rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig")


def _read_csv(source: Source, labels: Sequence[str], captions: bool) -> Samples:
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
    column = _pick(source, "csv", names, hint) if captions else None
    for label in labels:
        _require(source, label, names, source.label_flag, hint)
    texts: list[str] = []
    if column is not None:
        values = frame[columns[names.index(column)]]
        empty = int(values.isna().sum())
        if empty:
            notes.append(
                f"{source.data}: {empty} cells of column {shown(column)} are empty (or NA, null, None); their caption "
                f"is {_EMPTY_CELL!r}, as in OpenCLIP's CSV reader"
            )
        texts = [str(value) for value in values.tolist()]
        quoted = sum(text[:1] == text[-1:] == '"' for text in texts)
        if quoted and len(source.separator) > 1:
            notes.append(
                f"{source.data}: {quoted} captions keep their quotes: {source.separator!r} has {len(source.separator)} "
                "characters, which pandas takes for a regular expression, in OpenCLIP too (--csv-separator); where a "
                "tab is meant, leave the flag out"
            )
    notes += _csv_notes(source, frame, names)
    cells = [frame[columns[names.index(label)]] for label in labels]
    ids = [[None if pd.isna(value) else str(value) for value in column.tolist()] for column in cells]
    return Samples(texts, _join_labels(source, labels, ids), column, notes)


def _csv_notes(source: Source, frame: Any, names: Sequence[str]) -> list[str]:
    """What pandas does without a word."""
    import pandas as pd

    notes = []
    if not isinstance(frame.index, pd.RangeIndex):
        notes.append(
            f"{source.data}: rows have more fields than the header; pandas takes the first ones for names of rows, so "
            f"that column {shown(names[0])} holds the field after them (as in OpenCLIP's CSV reader)"
        )
    texts = (frame.iloc[:, place] for place in range(len(names)))
    broken = sum("\n" in value or "\r" in value for column in texts if not pd.api.types.is_numeric_dtype(column)
                 for value in column.tolist() if isinstance(value, str))  # fmt: skip
    if broken:
        notes.append(
            f"{source.data}: {broken} cells hold line breaks: a stray quote? Every line up to the next quote is part "
            "of such a cell, as in OpenCLIP's CSV reader"
        )
    return notes


def _read_json(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    """VAST's annotations: a list of objects, or one object per line; a list of captions gives one sample each."""
    texts: list[str] = []
    ids: list[list[Optional[str]]] = [[] for _ in labels]
    column = None
    repeated = [0]
    for where, record in _json_records(source, repeated):
        if not isinstance(record, dict):
            hint = f" (jq -r '.[]' {shlex.quote(source.data)} > captions.txt)" if isinstance(record, str) else ""
            raise MMTSError(f"{source.data}: {where} is not an object with named fields, but {shown(record)}{hint}")
        names = list(record)
        values: list[Any] = [None]
        if captions:
            column = column or _pick(source, "json", names)
            _require(source, column, names, "--column", f"in {where}")
            values = record[column] if isinstance(record[column], list) else [record[column]]
            for value in values:
                if not isinstance(value, str):
                    raise MMTSError(f"{source.data}: {where}: field {shown(column)} is not text but {shown(value)}")
                _check_unicode(source, where, column, value)
            texts.extend(values)
        for label, target in zip(labels, ids):
            _require(source, label, names, source.label_flag, f"in {where}")
            value = record[label]
            if isinstance(value, (list, dict, float)):
                raise MMTSError(f"{source.data}: {where}: {shown(label)} is not a class id but {shown(value)}")
            if value is not None:
                value = str(value)
                _check_unicode(source, where, label, value)
            target.extend([value] * len(values))
    notes = []
    if repeated[0]:
        notes.append(f"{source.data}: {repeated[0]} objects name a field twice; the last one counts, as in json.load")
    return Samples(texts, _join_labels(source, labels, ids), column, notes)


def _check_unicode(source: Source, where: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MMTSError(
            f"{source.data}: {where}: field {shown(name)} holds half a character, {text[error.start]!a} without its "
            f"other half, which no tokenizer reads: {shown(text)}; mend or drop the record"
        ) from error


def _json_records(source: Source, repeated: list[int]) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record; ``repeated[0]`` counts the objects with two fields of one name."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        repeated[0] += len(found) != len(pairs)
        return found

    with _opened_text(source.data) as file:
        text = file.read()
    start = text.lstrip()[:1]
    if start == "[":
        for number, record in enumerate(json.loads(text, object_pairs_hook=object_of), 1):
            yield f"record {number}", record
        return
    for number, line in enumerate(io.StringIO(text), 1):  # splitlines() would cut at U+2028 inside a caption
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=object_of)
        except ValueError as error:
            if start == "{":
                _refuse_whole(source.data, text)
            raise MMTSError(
                f"{source.data}: line {number} is not JSON ({cause(error)}); expected a list of objects, or one object "
                "per line"
            ) from error
        if 2 * len(line) > len(text) and isinstance(record, dict) and line.strip() == text.strip():
            usual = _DEFAULT_COLUMNS["json"] if source.column is None else (source.column,)
            if not any(name in record for name in usual):
                _refuse_whole(source.data, text)
        yield f"line {number}", record


def _refuse_whole(path: str, text: str) -> None:
    """Raise an MMTSError if the text is one JSON object around all captions: what it holds, and how to get them out."""
    try:
        document = json.loads(text)
    except ValueError:
        return
    containers = any(isinstance(value, (dict, list)) for value in document.values())
    if not containers and len(document) <= _MANY_FIELDS:
        return  # one record
    where = _caption_path(document) or next(
        (path for path, kind in ((".[]", str), (".[][]", list)) if all(isinstance(x, kind) for x in document.values())),
        None,
    )
    way = f"; for its captions: jq -c '{where} | {{caption: .}}' {shlex.quote(path)} > captions.jsonl" if where else ""
    first, inside = next(iter(document.items()))
    fields = f", {shown(first)} an object of {_listed(list(inside))}" if isinstance(inside, dict) else ""
    raise MMTSError(
        f"{path}: is one JSON object of {_listed(list(document))}{fields}; expected a list of objects, or one object "
        f"per line{way}"
    )


def _caption_path(value: Any, path: str = "", named: bool = False, depth: int = 0) -> Optional[str]:
    """Where captions stand in a document, as a path of jq: below a field of a usual name, and many of them."""
    if isinstance(value, str):
        return path if named and "[]" in path else None
    if not value or not isinstance(value, (dict, list)) or depth == _DEEPEST:
        return None
    if isinstance(value, list):
        return _caption_path(value[0], (path or ".") + "[]", named, depth + 1)
    if isinstance(value.get("split"), str) and path:
        path += ' | select(.split == "train") | '
    for name in _TEXT_FIELDS:
        if name in value and (found := _caption_path(value[name], f"{path}.{name}", True, depth + 1)):
            return found
    one = next(iter(value))
    if (
        len(value) > 1
        and isinstance(value[one], dict)
        and all(isinstance(each, dict) and each.keys() & value[one].keys() for each in value.values())
    ):
        return _caption_path(value[one], (path or ".") + "[]", named, depth + 1)  # records by their ids
    for name, each in value.items():
        step = name if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) else json.dumps(name)
        if found := _caption_path(each, f"{path}.{step}", named, depth + 1):
            return found
    return None


def _parquet_below(folder: str) -> list[str]:
    """The Parquet files below a folder in the order of their names, without hidden and unfinished ones."""
    files = sorted(Path(folder).rglob("*.parquet"))
    return [str(file) for file in files if not any(part[0] in "._" for part in file.relative_to(folder).parts)]


def _parquet_files(data: str) -> list[str]:
    """A file, those below a folder, or those that a glob pattern names; both engines read the same.

    Raises:
        MMTSError: there is nothing there.
    """
    if os.path.isdir(data):
        files = _parquet_below(data)
        if not files:
            raise MMTSError(f"{data}: the folder holds no *.parquet file")
        return files
    files = [data] if os.path.exists(data) else sorted(glob.glob(data, recursive=True))
    if not files:
        raise MMTSError(f"{data}: no such file")
    return files


def _read_parquet(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    texts: list[Optional[str]] = []
    ids: list[list[Optional[str]]] = [[] for _ in labels]
    column, left_out = source.column, 0
    for file in _parquet_files(source.data):
        for batch in _parquet_batches(replace(source, column=column), file, labels, captions):
            column = batch.column
            left_out += batch.left_out
            texts += batch.captions
            for target, cells in zip(ids, batch.labels):
                target += cells
    empty = sum(text is None for text in texts)
    notes = [note for note in (_left_out(source, left_out),) if note]
    if empty:
        notes.append(
            f"{source.data}: {empty} cells of column {shown(column)} are empty; their caption is {_EMPTY_CELL!r}"
        )
    captions_read = [_EMPTY_CELL if text is None else text for text in texts]
    return Samples(captions_read, _join_labels(source, labels, ids), column, notes)


def failed_downloads(source: Source) -> Optional[str]:
    """What :func:`read_samples` says of rows that it leaves out, for an engine that reads :func:`units`."""
    if source.resolved_format() != "parquet":
        return None
    files = _parquet_files(source.data)
    return _left_out(source, sum(x.left_out for file in files for x in _parquet_batches(source, file, captions=False)))


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


def _parquet_batches(
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
        column = _pick(replace(source, data=path), "parquet", schema.names) if captions else None
        for label in labels:
            _require(replace(source, data=path), label, schema.names, source.label_flag)
        report = "status" in schema.names and "url" in schema.names and _is_text(schema.field("status").type)
        wanted = [*([] if column is None else [column]), *labels, *(["status"] if report else [])]
        for batch in file.iter_batches(_BATCH, row_groups=groups, columns=list(dict.fromkeys(wanted))):
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
        return [unit for file in _parquet_files(source.data) for unit in _row_group_runs(file)]
    if not os.path.exists(source.data):
        raise MMTSError(f"{source.data}: no such file")
    return [source.data]


def _row_group_runs(path: str) -> Iterator[str]:
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


def caption_batches(source: Source, unit: str) -> Iterator[list[str]]:
    """The captions of one of :func:`units`, some thousands at a time; the same as :func:`read_samples` gives."""
    kind = source.resolved_format()
    if kind == "webdataset":
        captions: list[str] = []
        for caption in _tar_captions(unit, source.column):
            if isinstance(caption, str):
                captions.append(caption)
            if len(captions) == _BATCH:
                yield captions
                captions = []
        if captions:
            yield captions
    elif kind == "parquet":
        path, _, groups = unit.rpartition("#")
        first, last = map(int, groups.split("-"))
        for batch in _parquet_batches(source, path, groups=range(first, last + 1)):
            yield [_EMPTY_CELL if text is None else text for text in batch.captions]
    else:
        yield read_samples(source).captions


def _read_text(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    with _opened_text(source.data) as file:
        lines = [line.rstrip("\n") for line in file]
    if source.format == "auto":
        _refuse_table(source.data, lines)
    return Samples(lines)


def _refuse_table(path: str, lines: Sequence[str]) -> None:
    """Raise a ConfigError where nearly every line is a row of a table: an image's name and its caption, or a tab."""
    named = [match[1] if (match := _NAMED_LINE.match(line)) else "\t" * ("\t" in line) for line in lines]
    rows = len(named) - named.count("")
    if not rows:
        return
    separator = Counter(filter(None, named)).most_common(1)[0][0]
    first = next(number for number, each in enumerate(named) if each)
    images = sum(map(bool, map(_NAMED_LINE.match, lines)))
    header = separator in lines[0] and not _NAMED_LINE.match(lines[0]) and images > 0
    if rows < _TABLE_LINES * (sum(bool(line.strip()) for line in lines) - (header and not named[0])):
        return
    column = lines[0].split(separator)[-1] if header else str(lines[first].count(separator))
    # Of two characters, so that quotes inside captions stay.
    flag = {"\t": "'\\t'", "|": "'\\|'", ",": ","}[separator]
    raise ConfigError(
        f"{path}: nearly every line ({rows} of {len(lines)}) is a row of a table, such as {shown(lines[first][:60])}: "
        f"its captions are read with --format csv{' --no-header' * (not header)} --column {shlex.quote(column)} "
        f"--separator {flag}; if the lines are captions as they stand, pass --format text"
    )


def _pick(source: Source, kind: str, names: Sequence[str], hint: str = "") -> str:
    """The caption column: the one asked for, else the first usual name that is there."""
    if source.column is not None:
        _require(source, source.column, names, "--column", hint)
        return source.column
    usual = _DEFAULT_COLUMNS[kind]
    for name in usual:
        if name in names:
            return name
    raise ConfigError(
        f"{source.data}: no column {' or '.join(map(repr, usual))}; found: {_listed(names)}. "
        f"Name the column of the captions with --column. {hint}".rstrip(". ")
    )


def _require(source: Source, name: str, names: Sequence[str], flag: str, hint: str = "") -> None:
    if name not in names:
        raise ConfigError(
            f"{source.data}: no column {shown(name)} ({flag}); found: {_listed(names)}. {hint}".rstrip(". ")
        )


def _csv_hint(source: Source, names: Sequence[str]) -> str:
    if not source.header:
        return "With --no-header, columns go by position: --column 0 is the first"
    if len(names) == 1:
        for other in (",", "\t", ";", "|"):
            if other != source.separator and other in names[0]:
                way = "leave --separator out, a tab is the default" if other == "\t" else f"pass --separator {other!r}"
                return f"The header has no {source.separator!r}: {way}"
    return "For a file without a header pass --no-header, and name columns by position (--column 0)"


def _listed(names: Sequence[str]) -> str:
    found = ", ".join(shown(name if len(name) <= 60 else name[:57] + "...") for name in names[:10])
    return found + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _join_labels(source: Source, names: Sequence[str], columns: Sequence[Sequence[Optional[str]]]) -> list[str]:
    joined = []
    for row, parts in enumerate(zip(*columns), 1):
        if None in parts:
            name = names[parts.index(None)]
            raise MMTSError(f"{source.data}: sample {row} has no {shown(name)} (empty, or NA); every sample needs one")
        joined.append("_".join(cast("tuple[str, ...]", parts)))
    return joined


def _read_webdataset(source: Source) -> Samples:
    """The captions of the samples that OpenCLIP keeps: those with ``.txt`` and an image. Images are never read."""
    from tqdm import tqdm

    captions: list[str] = []
    partial = undecodable = 0
    found: Counter[str] = Counter()
    for url in tqdm(shards(source.data), desc="reading", unit="tar", file=sys.stderr):
        for caption in _tar_captions(url, source.column, found):
            if caption is None:
                partial += 1
            elif isinstance(caption, bytes):
                undecodable += 1
            else:
                captions.append(caption)
    wanted, as_where = ("a .txt or an image", ", as OpenCLIP does") if source.column is None else (
        f"a .{source.column}", "")  # fmt: skip
    if partial and not captions and not undecodable:
        suffixes = ", ".join(f"{many} .{shown(suffix)[1:-1]}" for suffix, many in found.most_common(8))
        both = wanted.replace(" or ", " and ")
        raise MMTSError(
            f"{source.data}: none of {partial} samples has {both}; their members: {suffixes}. Name the suffix of the "
            "captions with --column SUFFIX (of a caption, not of an image; OpenCLIP itself trains on .txt only)"
        )
    notes = []
    if partial:
        notes.append(f"{source.data}: {partial} samples without {wanted} are left out{as_where}")
    if undecodable:
        notes.append(f"{source.data}: {undecodable} captions are not UTF-8 and are left out, as OpenCLIP does")
    return Samples(captions, column=source.column, notes=notes)


def _tar_captions(
    url: str, column: Optional[str], found: Optional[Counter[str]] = None
) -> Iterator[Union[str, bytes, None]]:
    """For each sample its caption; bytes where it is not UTF-8, None where the caption or the image is missing.

    Args:
        column: the suffix of the member that holds the caption, with or without an image; default: OpenCLIP's rule.
        found: counts the suffixes.
    """
    suffix = "txt" if column is None else column.lower().lstrip(".")

    def text(archive: tarfile.TarFile, member: tarfile.TarInfo, its: str) -> Optional[bytes]:
        file = archive.extractfile(member) if its == suffix else None
        return file.read() if file else None

    for sample in tar_samples(url, text):
        if found is not None:
            found.update(sample.keys())
        caption = sample.get(suffix)
        if caption is None or (column is None and not sample.keys() & {"png", "jpg", "jpeg", "webp"}):
            yield None
            continue
        try:
            yield caption.decode("utf-8")
        except UnicodeDecodeError:
            yield caption


def shards(data: str) -> list[str]:
    """The tars of a WebDataset: brace patterns, several joined with ``::``, as OpenCLIP's ``--train-data``."""
    from braceexpand import braceexpand

    try:
        return [shard for part in data.split("::") for shard in braceexpand(part)]
    except ValueError as error:
        raise ConfigError(f"{data}: the braces of the shard pattern do not match: {error}") from error


class _StrictTarInfo(tarfile.TarInfo):
    """``tarfile`` takes a damaged or cut header, and a missing end mark, for the end; here they are errors.

    A member of negative size, which would send it back to where it was, is one, too.
    """

    @classmethod
    def frombuf(cls, *arguments: Any) -> _StrictTarInfo:
        member = super().frombuf(*arguments)
        if member.size < 0:
            raise tarfile.ReadError("a member of negative size")
        return member

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictTarInfo:
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if member.size < 0:  # by a header that overrides the one before
            raise tarfile.ReadError("a member of negative size")
        return member


def tar_samples(url: str, take: Callable[[tarfile.TarFile, tarfile.TarInfo, str], Any]) -> Iterator[dict[str, Any]]:
    """Members grouped as OpenCLIP's ``group_by_keys_nothrow`` does: ``{suffix: take(archive, member, suffix)}``.

    Raises:
        MMTSError: the tar is missing, cut or damaged.
    """
    key, sample = None, cast("dict[str, Any]", {})
    damaged = "cannot be read as a tar (truncated or damaged?)"
    with reading(url, damaged), closing(_open(url)) as stream, _tar(url, stream) as archive:
        for member in archive:
            if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):
                continue
            parts = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", member.name)  # webdataset's base_plus_ext
            if parts is None:
                continue
            prefix, suffix = parts[1], parts[2].lower()
            if prefix != key or suffix in sample:
                if sample:
                    yield sample
                key, sample = prefix, {}
            sample[suffix] = take(archive, member, suffix)
    if sample:
        yield sample


def _tar(url: str, stream: IO[bytes]) -> tarfile.TarFile:
    # Seeking skips the images of a local file; a pipe has to be read through.
    mode = "r|*" if _SCHEME.match(url) else "r:*"
    return tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictTarInfo)  # type: ignore[call-overload]


def _open(url: str) -> IO[bytes]:
    if not _SCHEME.match(url):
        if not os.path.exists(url):
            raise MMTSError(f"{url}: no such tar; quote the pattern, so that the shell leaves its braces alone")
        return open(url, "rb")
    try:
        from webdataset.gopen import gopen
    except ImportError as error:
        raise MMTSError(f"{url}: reading from a URL needs the package webdataset: pip install webdataset") from error
    try:
        return cast("IO[bytes]", gopen(url))
    except Exception as error:  # of any library that it opens URLs with
        raise ConfigError(f"{url}: webdataset cannot open it ({cause(error)}); use pipe:COMMAND") from error


def read_class_counts(path: str) -> tuple[list[str], np.ndarray, list[str]]:
    """A CSV ``class_id,count``, as the authors of MM-TS publish for EPIC-KITCHENS-100.

    Returns:
        The ids as text, ``[M]`` int64 counts above zero, and notes for the user.
    """
    import pandas as pd

    if not os.path.exists(path):
        raise MMTSError(f"{path}: no such file (--class-counts)")
    with _reading_text(path, "cannot be read as CSV"):
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [name for name in ("class_id", "count") if name not in frame.columns]
    if missing:
        raise MMTSError(
            f"{path}: no column {missing[0]!r}; --class-counts takes a CSV with the header class_id,count "
            f"(found: {_listed([str(name) for name in frame.columns])})"
        )
    if not isinstance(frame.index, pd.RangeIndex):
        raise MMTSError(f"{path}: its rows have more fields than the header {_listed(list(frame.columns))}")
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


def read_embeddings(
    path: str, tensor: Optional[str] = None, flag: str = "--embeddings", largest: float = LARGEST
) -> np.ndarray:
    """``[n, d]`` numbers from a ``.npy`` or ``.safetensors`` file, checked to be finite; nothing is unpickled.

    ``flag`` is the one that named the file, for messages; ``largest`` as in :func:`check_finite`.
    """
    file = Path(path)
    if not os.path.exists(path):
        raise MMTSError(f"{path}: no such file ({flag})")
    if file.suffix not in (".npy", ".safetensors"):
        raise ConfigError(f"{path}: {flag} takes a .npy or a .safetensors file")
    if tensor is not None and file.suffix == ".npy":
        raise ConfigError(f"{path}: --tensor names a tensor of a .safetensors file; a .npy file holds a single one")
    points = load_npy(path) if file.suffix == ".npy" else _load_safetensors(path, tensor)
    if points.ndim != 2 or 0 in points.shape:
        raise MMTSError(f"{path}: the shape is {list(points.shape)}, expected [samples, dimensions]")
    check_finite(points, path, largest)
    return points


def read_embedding_parts(path: str, tensor: Optional[str] = None) -> Rows:
    """:func:`read_embeddings` of a file, or of all ``.npy`` files of a folder in the order of their names."""
    if not Path(path).is_dir():
        return Rows(read_embeddings(path, tensor))
    files = sorted(Path(path).glob("*.npy"))
    if not files:
        raise MMTSError(f"{path}: the folder holds no .npy file (--embeddings)")
    parts = [read_embeddings(str(file), tensor) for file in files]
    for file, part in zip(files, parts):
        if part.shape[1] != parts[0].shape[1]:
            raise MMTSError(
                f"{file}: {part.shape[1]} dimensions, but {files[0].name} has {parts[0].shape[1]}; all parts must come "
                "from one encoder"
            )
    return Rows(parts)


def refuse_blank(captions: Sequence[str], source: str, keep: Optional[bool]) -> None:
    """Raise an MMTSError where captions are blank, unless they are to be kept."""
    blank = [number for number, caption in enumerate(captions, 1) if not caption.strip()]
    if blank and not keep:
        raise MMTSError(
            f"{source}: {len(blank)} samples have a blank caption (the first: sample {blank[0]}); drop them from the "
            "training set too, or pass --keep-blank to keep them as one caption"
        )


def load_npy(path: str) -> np.ndarray:
    """One array of numbers from a ``.npy`` file, mapped, not read; nothing is unpickled."""
    what = "cannot be read as .npy (truncated, pickled or foreign?); write it with numpy.save"
    with reading(path, what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that NumPy can read, but does not like
        points = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(points, np.ndarray) or points.dtype.kind not in "fiu":
        found = f"an array of {shown(points.dtype)}" if isinstance(points, np.ndarray) else "an .npz archive"
        raise MMTSError(f"{path}: holds {found}, expected one array of numbers")
    return points


def _load_safetensors(path: str, tensor: Optional[str]) -> np.ndarray:
    from safetensors import safe_open

    with reading(path, "cannot be read as safetensors (truncated or foreign?)"):
        with safe_open(path, framework="pt") as file:  # NumPy has no bfloat16
            names = list(file.keys())
            if tensor is None and len(names) != 1:
                raise ConfigError(f"{path}: holds {len(names)} tensors ({_listed(names)}); choose one with --tensor")
            if tensor is not None and tensor not in names:
                raise ConfigError(f"{path}: no tensor {shown(tensor)} (--tensor); found: {_listed(names)}")
            found = file.get_tensor(names[0] if tensor is None else tensor)
            if found.is_complex() or str(found.dtype) == "torch.bool":
                raise MMTSError(f"{path}: holds an array of {found.dtype}, expected one of numbers")
            return cast(np.ndarray, found.float().numpy())


def check_finite(points: np.ndarray, source: str, largest: float = np.inf) -> None:
    """Raise an MMTSError that names the first row that cannot be computed with (rows count from 0, as in NumPy).

    ``largest`` is the largest size of a number, where it is taken as it is and not scaled to a length of 1.
    """
    step = 65536  # the mask of a mapped file must not be as large as the file
    for start in range(0, len(points), step):
        block = np.asarray(points[start : start + step])
        if block.dtype.kind != "f":  # the size of the least whole number is no whole number
            block = block.astype(np.float64)
        with np.errstate(over="ignore"):  # the largest is infinite in half precision, and then bounds nothing
            good = (np.isfinite(block) & (np.abs(block) <= largest)).all(axis=1)
        if not good.all():
            row = int(np.argmin(good))
            what = "a number whose square is too large; scale the rows"
            if not np.isfinite(block[row]).all():
                what = "a NaN or an infinity; fix or drop it"
            raise MMTSError(f"{source}: row {start + row} (counting from 0) holds {what}")
        release(points)
