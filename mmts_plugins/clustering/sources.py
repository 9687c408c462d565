"""Reading what a table is made from: captions and labels (CSV, JSON, text, Parquet, WebDataset), counts, embeddings."""

from __future__ import annotations

import json
import lzma
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Optional, Union, cast

import numpy as np

from ..errors import ConfigError, MMTSError
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
_DEFAULT_COLUMNS = {
    "csv": ("title",),  # OpenCLIP's --csv-caption-key
    "json": ("desc", "caption"),  # VAST's annotations
    "parquet": ("title", "caption", "text", "desc"),
}
_BATCH = 65_536  # captions
_UNIT = 500_000  # rows of a Parquet file that an engine reads as one part
_EMPTY_CELL = "nan"  # str() of what pandas makes of it, and so what OpenCLIP trains on
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # two letters at least: C:\ is a drive


@dataclass(frozen=True)
class Source:
    """Where the samples are and how to read them: the input flags of ``mmts cluster``."""

    data: str
    format: str = "auto"
    column: Optional[str] = None
    separator: str = "\t"
    header: bool = True
    label_flag: str = "--label-column"

    def resolved_format(self) -> str:
        """The format, by the file's extension where it is ``auto``."""
        if self.format != "auto":
            return self.format
        first = self.data.split("::")[0]
        if _SCHEME.match(first) or first.endswith(".tar.gz"):
            return "webdataset"
        suffix = Path(first).suffix.lower()
        if suffix not in _FORMAT_OF_SUFFIX:
            raise ConfigError(
                f"{self.data}: the extension {suffix!r} does not tell the format; pass --format "
                f"{'|'.join(FORMATS[1:])} (extensions that do: {' '.join(_FORMAT_OF_SUFFIX)})"
            )
        return _FORMAT_OF_SUFFIX[suffix]


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
    if labels and kind in ("text", "webdataset"):
        raise ConfigError(f"{source.data}: {source.label_flag} needs named columns (CSV, JSON or Parquet), not {kind}")
    if kind == "webdataset":
        samples = _read_webdataset(source)
    else:
        if not Path(source.data).exists():
            raise MMTSError(f"{source.data}: no such file")
        reader = {"csv": _read_csv, "json": _read_json, "parquet": _read_parquet, "text": _read_text}[kind]
        try:
            samples = reader(source, labels, captions)
        except (OSError, ValueError) as error:  # pandas, json, Arrow and the text decoder all raise ValueErrors
            raise MMTSError(f"{source.data}: cannot be read as {kind}: {error}") from error
    if not samples.captions and not samples.labels:
        raise MMTSError(f"{source.data}: holds no samples (read as {kind})")
    blank = sum(not caption.strip() for caption in samples.captions)
    if blank:
        samples.notes.append(f"{source.data}: {blank} samples have a blank caption; they are kept, as one caption")
    return samples


def _read_csv(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    """As OpenCLIP's CsvDataset: ``pandas.read_csv(file, sep=sep)``, types inferred over the file, then ``str(value)``.

    A column of numbers therefore loses leading zeros here exactly as it does in training.
    """
    import pandas as pd

    options: dict[str, Any] = {"sep": source.separator, "header": "infer" if source.header else None}
    head = pd.read_csv(source.data, nrows=1, **options)
    names = [str(name) for name in head.columns]
    hint = _csv_hint(source, names)
    column = _pick(source, "csv", names, hint) if captions else None
    for label in labels:
        _require(source, label, names, source.label_flag, hint)
    wanted = [head.columns[names.index(name)] for name in dict.fromkeys([*([column] if column else []), *labels])]
    # Rows one field longer than the header make pandas take the first field as the index; usecols would undo that.
    usecols = wanted if isinstance(head.index, pd.RangeIndex) else None
    label_names = [head.columns[names.index(label)] for label in labels]
    frame = pd.read_csv(
        source.data,
        usecols=usecols,
        dtype={name: str for name in label_names if str(name) != column},  # ids stay as written
        **options,
    )
    notes = []
    texts: list[str] = []
    if column:
        values = frame[head.columns[names.index(column)]]
        empty = int(values.isna().sum())
        if empty:
            notes.append(
                f"{source.data}: {empty} cells of column {column!r} are empty (or NA, null, None); their caption is "
                f"{_EMPTY_CELL!r}, as in OpenCLIP's CSV reader"
            )
        texts = [str(value) for value in values.tolist()]
    ids = [[None if pd.isna(value) else str(value) for value in frame[name].tolist()] for name in label_names]
    return Samples(texts, _join_labels(source, labels, ids), column, notes)


def _read_json(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    """VAST's annotations: a list of objects, or one object per line; a list of captions gives one sample each."""
    texts: list[str] = []
    ids: list[list[Optional[str]]] = [[] for _ in labels]
    column = None
    for where, record in _json_records(source.data):
        if not isinstance(record, dict):
            raise MMTSError(f"{source.data}: {where} is not an object with named fields, but {_short(record)}")
        names = list(record)
        values: list[Any] = [None]
        if captions:
            column = column or _pick(source, "json", names)
            _require(source, column, names, "--column", f"in {where}")
            values = record[column] if isinstance(record[column], list) else [record[column]]
            for value in values:
                if not isinstance(value, str):
                    raise MMTSError(f"{source.data}: {where}: field {column!r} is not text but {_short(value)}")
            texts.extend(values)
        for label, target in zip(labels, ids):
            _require(source, label, names, source.label_flag, f"in {where}")
            value = record[label]
            if isinstance(value, (list, dict, float)):
                raise MMTSError(f"{source.data}: {where}: {label!r} is not a class id but {_short(value)}")
            target.extend([None if value is None else str(value)] * len(values))
    return Samples(texts, _join_labels(source, labels, ids), column)


def _json_records(path: str) -> Iterator[tuple[str, Any]]:
    text = Path(path).read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] == "[":
        for number, record in enumerate(json.loads(text), 1):
            yield f"record {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028 inside a caption
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise MMTSError(
                    f"{path}: line {number} is not JSON ({error}); expected a list of objects, or one object per line"
                ) from error


def _read_parquet(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    import pyarrow as pa
    from pyarrow import dataset

    table = dataset.dataset(source.data, format="parquet")
    names = table.schema.names
    column = _pick(source, "parquet", names) if captions else None
    for label in labels:
        _require(source, label, names, source.label_flag)

    def values(name: str) -> list[Optional[str]]:
        cells = table.to_table(columns=[name]).column(0)
        try:
            return cast("list[Optional[str]]", cells.cast(pa.large_string()).to_pylist())
        except pa.ArrowException as error:
            raise MMTSError(f"{source.data}: column {name!r} holds {cells.type}, not text") from error

    texts = values(column) if column else []
    empty = sum(text is None for text in texts)
    notes = []
    if empty:
        notes.append(f"{source.data}: {empty} cells of column {column!r} are empty; their caption is {_EMPTY_CELL!r}")
    captions_read = [_EMPTY_CELL if text is None else text for text in texts]
    return Samples(captions_read, _join_labels(source, labels, [values(label) for label in labels]), column, notes)


def units(source: Source) -> list[str]:
    """What engines read in parallel: runs of row groups of Parquet files (``FILE#first-last``), or tars.

    Any other format is one unit.

    Raises:
        MMTSError: there is nothing there.
    """
    kind = source.resolved_format()
    if kind == "webdataset":
        return shards(source.data)
    if not Path(source.data).exists():
        raise MMTSError(f"{source.data}: no such file")
    if kind != "parquet":
        return [source.data]
    whole = Path(source.data)
    files = sorted(whole.rglob("*.parquet")) if whole.is_dir() else [whole]
    if not files:
        raise MMTSError(f"{source.data}: the folder holds no *.parquet file")
    return [unit for file in files for unit in _row_group_runs(str(file))]


def _row_group_runs(path: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise MMTSError(f"{path}: cannot be read as parquet (truncated?): {error}") from error
    first, rows = 0, 0
    for group in range(footer.num_row_groups):
        rows += footer.row_group(group).num_rows
        if rows >= _UNIT or group == footer.num_row_groups - 1:
            yield f"{path}#{first}-{group}"
            first, rows = group + 1, 0


def caption_batches(source: Source, unit: str) -> Iterator[list[str]]:
    """The captions of one of :func:`units`, some thousands at a time; the same as :func:`read_samples` gives."""
    kind = source.resolved_format()
    if kind == "webdataset":
        captions: list[str] = []
        for caption in _tar_captions(unit):
            if isinstance(caption, str):
                captions.append(caption)
            if len(captions) == _BATCH:
                yield captions
                captions = []
        if captions:
            yield captions
    elif kind == "parquet":
        yield from _parquet_batches(source, unit)
    else:
        yield read_samples(source).captions


def _parquet_batches(source: Source, unit: str) -> Iterator[list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, _, groups = unit.rpartition("#")
    first, last = map(int, groups.split("-"))
    try:
        with pq.ParquetFile(path) as file:
            column = _pick(source, "parquet", file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH, row_groups=range(first, last + 1), columns=[column]):
                cells = batch.column(0).cast(pa.large_string()).to_pylist()
                yield [_EMPTY_CELL if text is None else text for text in cells]
    except (pa.ArrowException, OSError) as error:
        raise MMTSError(f"{unit}: cannot be read as parquet (truncated, or captions that are no text?): {error}") from (
            error
        )


def _read_text(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    with open(source.data, encoding="utf-8-sig") as file:
        return Samples([line.rstrip("\n") for line in file])


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
        raise ConfigError(f"{source.data}: no column {name!r} ({flag}); found: {_listed(names)}. {hint}".rstrip(". "))


def _csv_hint(source: Source, names: Sequence[str]) -> str:
    if not source.header:
        return "With --no-header, columns go by position: --column 0 is the first"
    if len(names) == 1:
        for other in (",", "\t", ";", "|"):
            if other != source.separator and other in names[0]:
                return f"The header has no {source.separator!r}: pass --separator {other!r}"
    return "For a file without a header pass --no-header, and name columns by position (--column 0)"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name if len(name) <= 60 else name[:57] + "...") for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _join_labels(source: Source, names: Sequence[str], columns: Sequence[Sequence[Optional[str]]]) -> list[str]:
    joined = []
    for row, parts in enumerate(zip(*columns), 1):
        if None in parts:
            name = names[parts.index(None)]
            raise MMTSError(f"{source.data}: sample {row} has no {name!r} (empty, or NA); every sample needs one")
        joined.append("_".join(cast("tuple[str, ...]", parts)))
    return joined


def _read_webdataset(source: Source) -> Samples:
    """The captions of the samples that OpenCLIP keeps: those with ``.txt`` and an image. Images are never read."""
    from tqdm import tqdm

    captions: list[str] = []
    partial = undecodable = 0
    for url in tqdm(shards(source.data), desc="reading", unit="tar", file=sys.stderr):
        for caption in _tar_captions(url):
            if caption is None:
                partial += 1
            elif isinstance(caption, bytes):
                undecodable += 1
            else:
                captions.append(caption)
    notes = []
    if partial:
        notes.append(f"{source.data}: {partial} samples without a .txt or an image are left out, as OpenCLIP does")
    if undecodable:
        notes.append(f"{source.data}: {undecodable} captions are not UTF-8 and are left out, as OpenCLIP does")
    return Samples(captions, notes=notes)


def _tar_captions(url: str) -> Iterator[Union[str, bytes, None]]:
    """For each sample its caption; bytes where it is not UTF-8, None where the caption or the image is missing."""
    for sample in tar_samples(url, _text):
        caption = sample.get("txt")
        if caption is None or not sample.keys() & {"png", "jpg", "jpeg", "webp"}:
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
    """``tarfile`` takes a damaged or cut header, and a missing end mark, for the end; here they are errors."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> Optional[bytes]:
    file = archive.extractfile(member) if suffix == "txt" else None
    return file.read() if file else None


def tar_samples(url: str, take: Callable[[tarfile.TarFile, tarfile.TarInfo, str], Any]) -> Iterator[dict[str, Any]]:
    """Members grouped as OpenCLIP's ``group_by_keys_nothrow`` does: ``{suffix: take(archive, member, suffix)}``.

    Raises:
        MMTSError: the tar is missing, cut or damaged.
    """
    key, sample = None, cast("dict[str, Any]", {})
    try:
        with closing(_open(url)) as stream, _tar(url, stream) as archive:
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
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise MMTSError(f"{url}: cannot be read as a tar (truncated or damaged?): {error}") from error
    if sample:
        yield sample


def _tar(url: str, stream: IO[bytes]) -> tarfile.TarFile:
    # Seeking skips the images of a local file; a pipe has to be read through.
    mode = "r|*" if _SCHEME.match(url) else "r:*"
    return tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictTarInfo)  # type: ignore[call-overload]


def _open(url: str) -> IO[bytes]:
    if not _SCHEME.match(url):
        if not Path(url).exists():
            raise MMTSError(f"{url}: no such tar; quote the pattern, so that the shell leaves its braces alone")
        return open(url, "rb")
    try:
        from webdataset.gopen import gopen
    except ImportError as error:
        raise MMTSError(f"{url}: reading from a URL needs the package webdataset: pip install webdataset") from error
    try:
        return cast("IO[bytes]", gopen(url))
    except ValueError as error:
        raise ConfigError(f"{url}: webdataset cannot open it ({error}); use pipe:COMMAND") from error


def read_class_counts(path: str) -> tuple[list[str], np.ndarray, list[str]]:
    """A CSV ``class_id,count``, as the authors of MM-TS publish for EPIC-KITCHENS-100.

    Returns:
        The ids as text, ``[M]`` int64 counts above zero, and notes for the user.
    """
    import pandas as pd

    if not Path(path).exists():
        raise MMTSError(f"{path}: no such file (--class-counts)")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise MMTSError(f"{path}: cannot be read as CSV: {error}") from error
    missing = [name for name in ("class_id", "count") if name not in frame.columns]
    if missing:
        raise MMTSError(
            f"{path}: no column {missing[0]!r}; --class-counts takes a CSV with the header class_id,count "
            f"(found: {_listed([str(name) for name in frame.columns])})"
        )
    ids, counts = frame["class_id"].tolist(), []
    for row, (name, count) in enumerate(zip(ids, frame["count"].tolist()), 2):
        if not re.fullmatch(r"[0-9]+", count):
            raise MMTSError(f"{path}: line {row}: the count of class {name!r} is {count!r}, not a whole number")
        counts.append(int(count))
    twice = frame["class_id"][frame["class_id"].duplicated()]
    if len(twice):
        raise MMTSError(f"{path}: class {twice.iloc[0]!r} occurs more than once")
    present = [index for index, count in enumerate(counts) if count]
    if not present:
        raise MMTSError(f"{path}: holds no class with a count above zero")
    notes = []
    if len(present) < len(ids):
        notes.append(f"{path}: {len(ids) - len(present)} classes have no sample (count 0) and are left out")
    return [ids[index] for index in present], np.array([counts[index] for index in present], np.int64), notes


def read_embeddings(path: str, tensor: Optional[str] = None, flag: str = "--embeddings") -> np.ndarray:
    """``[n, d]`` numbers from a ``.npy`` or ``.safetensors`` file, checked to be finite; nothing is unpickled.

    ``flag`` is the one that named the file, for messages.
    """
    file = Path(path)
    if not file.exists():
        raise MMTSError(f"{path}: no such file ({flag})")
    if file.suffix not in (".npy", ".safetensors"):
        raise ConfigError(f"{path}: {flag} takes a .npy or a .safetensors file")
    if tensor is not None and file.suffix == ".npy":
        raise ConfigError(f"{path}: --tensor names a tensor of a .safetensors file; a .npy file holds a single one")
    points = load_npy(path) if file.suffix == ".npy" else _load_safetensors(path, tensor)
    if points.ndim != 2 or 0 in points.shape:
        raise MMTSError(f"{path}: the shape is {list(points.shape)}, expected [samples, dimensions]")
    check_finite(points, path)
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
    try:
        points = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MMTSError(
            f"{path}: cannot be read as .npy (truncated, pickled or foreign?); write it with numpy.save: {error}"
        ) from error
    if not isinstance(points, np.ndarray) or points.dtype.kind not in "fiu":
        what = f"an array of {points.dtype}" if isinstance(points, np.ndarray) else "an .npz archive"
        raise MMTSError(f"{path}: holds {what}, expected one array of numbers")
    return points


def _load_safetensors(path: str, tensor: Optional[str]) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # NumPy has no bfloat16
            names = list(file.keys())
            if tensor is None and len(names) != 1:
                raise ConfigError(f"{path}: holds {len(names)} tensors ({_listed(names)}); choose one with --tensor")
            if tensor is not None and tensor not in names:
                raise ConfigError(f"{path}: no tensor {tensor!r} (--tensor); found: {_listed(names)}")
            return cast(np.ndarray, file.get_tensor(tensor or names[0]).float().numpy())
    except (SafetensorError, OSError) as error:
        raise MMTSError(f"{path}: cannot be read as safetensors (truncated or foreign?): {error}") from error


def check_finite(points: np.ndarray, source: str) -> None:
    """Raise an MMTSError that names the first row with a NaN or an infinity (rows count from 0, as in NumPy)."""
    step = 65536  # the mask of a mapped file must not be as large as the file
    for start in range(0, len(points), step):
        finite = np.isfinite(points[start : start + step]).all(axis=1)
        release(points)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise MMTSError(f"{source}: row {row} (counting from 0) holds a NaN or an infinity; fix or drop it")
