"""Reading what a model is evaluated on: images with one or several captions each, and class labels."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional, Union, cast

import numpy as np

from .. import errors
from ..data import source as data
from ..data.captions import looked_into, read_samples
from ..data.forms import FORMATS
from ..data.source import Source
from ..data.webdataset import tar_samples
from ..errors import ConfigError, MMTSError, cause, shown
from .model import TarImage

_USUAL_IMAGES = ("filepath", "image", "image_path", "file_name", "filename", "path")
_SURROGATE = re.compile("[\ud800-\udfff]")
_IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Reading:
    """Where the samples are and how to read them: the input flags of ``mmts eval``.

    Attributes:
        data: a file, or the tars of a WebDataset.
        format: one of :data:`..data.forms.FORMATS`.
        image_column, caption_column: of a file with columns, default: usual names; no caption column is read if
            ``captions`` is False.
        separator: of a CSV.
        match_column: images and captions with the same value here belong together; None: those of the same image.
        label_column: class of each row; several columns, joined by ``_``, with commas.
        image_root: where relative image paths start; None: the current folder, as in OpenCLIP.
        split: of a Karpathy file.
        captions_per_image: at most so many, the first ones; None: all.
        captions: whether captions are wanted.
    """

    data: str
    format: str = "auto"
    image_column: Optional[str] = None
    caption_column: Optional[str] = None
    separator: str = "\t"
    match_column: Optional[str] = None
    label_column: Optional[str] = None
    image_root: Optional[str] = None
    split: str = "test"
    captions_per_image: Optional[int] = None
    captions: bool = True


@dataclass(frozen=True)
class Row:
    """One caption of one image; without a caption, the image alone."""

    image: Union[Path, TarImage]
    caption: str = ""
    match: str = ""
    label: str = ""


@dataclass(frozen=True)
class Samples:
    """Distinct images and captions, in the order of their first appearance.

    Attributes:
        images: ``[N]``.
        captions: ``[M]``; empty if none were asked for.
        image_group, caption_group: ``[N]`` and ``[M]`` integers; an image and a caption with the same belong together.
        image_rows: ``[N]`` lists of captions, and ``image_labels`` their class, by which commonness is looked up.
        caption_labels: ``[M]`` the class of each caption's row; empty without a label column, like ``image_labels``.
        notes: what the user should know.
    """

    images: list[Union[Path, TarImage]]
    captions: list[str]
    image_group: np.ndarray
    caption_group: np.ndarray
    image_rows: list[list[int]]
    image_labels: list[str]
    caption_labels: list[str]
    notes: list[str] = field(default_factory=list)


def read(reading: Reading) -> Samples:
    """Read a set.

    Raises:
        ConfigError: a flag does not fit the file.
        MMTSError: the file is missing, damaged or empty.
    """
    with errors.reading(reading.data, "cannot be read as images and captions"):
        return _read(reading)


def _read(reading: Reading) -> Samples:
    kind, source = reading.format, Source(reading.data, reading.format, reading.caption_column, reading.separator)
    if kind == "auto":
        kind = source.resolved_format()
        if kind == "json" and _karpathy_images(reading.data) is not None:
            kind = "karpathy"
    if kind in ("karpathy", "webdataset") and reading.match_column:
        raise ConfigError(f"{reading.data}: --match-column needs a file with named columns, not {kind}")
    if reading.label_column and (kind == "karpathy" or (kind == "webdataset" and reading.label_column != "cls")):
        has = "has no labels" if kind == "karpathy" else "has its labels in cls"
        raise ConfigError(f"{reading.data}: --label-column {reading.label_column}: a {kind} set {has}")
    notes: list[str] = []
    if kind == "karpathy":
        rows: Iterable[Row] = _read_karpathy(reading, notes)
    elif kind == "webdataset":
        rows = _read_webdataset(reading, source, notes)
    else:
        rows = _read_form(reading, source, notes) or _read_columns(reading, source, notes)
    return _distinct(list(rows), reading, notes)


def _read_form(reading: Reading, source: Source, notes: list[str]) -> list[Row]:
    """The captions of a published form and the images that it names; nothing where it is none."""
    if reading.match_column or reading.label_column or reading.image_column or not reading.captions:
        return []
    if looked_into(source, source.resolved_format())[0] in ("csv", "parquet", "arrow"):
        return []
    found = read_samples(source)
    if not found.images:
        if found.form == "text":
            raise ConfigError(f"{reading.data}: a text file names no images; --format takes {', '.join(FORMATS[1:])}")
        return []
    notes.extend(found.notes)
    root = Path(reading.image_root or "")
    return [Row(root / image, caption, image) for image, caption in zip(found.images, found.captions)]


def _read_columns(reading: Reading, source: Source, notes: list[str]) -> Iterable[Row]:
    def column(names: Sequence[str], flag: str) -> data.Samples:
        return read_samples(replace(source, label_flag=flag), names, captions=reading.captions)

    found = _with_images(reading, column)
    notes.extend(found.notes)
    images, captions = found.labels, found.captions if reading.captions else [""] * len(found.labels)
    match = column([reading.match_column], "--match-column").labels if reading.match_column else images
    labels = [""] * len(images)
    if reading.label_column:
        labels = column(reading.label_column.split(","), "--label-column").labels
    root = Path(reading.image_root or "")
    for image, caption, same, label in zip(images, captions, match, labels):
        yield Row(root / image, caption, same, label)


def _with_images(reading: Reading, column: Callable[[Sequence[str], str], data.Samples]) -> data.Samples:
    """The captions, as labels the image of each: of the column that is named, else of the first usual one."""
    if reading.image_column is not None:
        return column([reading.image_column], "--image-column")
    problem: Optional[ConfigError] = None
    for name in _USUAL_IMAGES:
        try:
            return column([name], "--image-column")
        except ConfigError as error:
            problem = problem or error
    raise cast(ConfigError, problem)


def _karpathy_images(path: str) -> Optional[list[dict[str, Any]]]:
    """The list ``images`` of a Karpathy file; None for JSON of another form."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            if file.read(1) != "{":
                return None
            file.seek(0)
            document = json.load(file)
    except FileNotFoundError as error:
        raise MMTSError(f"{path}: no such file") from error
    except (OSError, ValueError):  # one object per line, or damaged: the reader of that form will say
        return None
    except (RecursionError, MemoryError) as error:
        raise MMTSError(f"{path}: cannot be read as JSON: {cause(error)}") from error
    images = document.get("images")
    captions_apart = isinstance(document.get("annotations"), list)  # as COCO has them
    return images if isinstance(images, list) and not captions_apart else None


def _read_karpathy(reading: Reading, notes: list[str]) -> Iterable[Row]:
    images = _karpathy_images(reading.data)
    if images is None:
        raise MMTSError(
            f"{reading.data}: not a Karpathy file: expected one JSON object with a list 'images' "
            "(dataset_flickr30k.json, dataset_coco.json)"
        )
    root = Path(reading.image_root or "")
    splits: set[str] = set()
    bare = 0
    for number, image in enumerate(images, 1):
        with errors.reading(reading.data, f"image {number} is not what Karpathy's files hold"):
            splits.add(str(image["split"]))
            if image["split"] != reading.split:
                continue
            path = root / image.get("filepath", "") / image["filename"]
            captions = [sentence["raw"] for sentence in image["sentences"]] if reading.captions else [""]
            wrong = next((caption for caption in captions if not isinstance(caption, str)), None)
            if wrong is not None:
                raise TypeError(f"a caption is {shown(wrong)}")
        bare += not captions
        yield from (Row(path, caption, str(path)) for caption in captions)
    if reading.split not in splits:
        raise ConfigError(
            f"{reading.data}: no split {shown(reading.split)} (--split); found: {', '.join(sorted(splits))}"
        )
    if bare:
        notes.append(f"{reading.data}: {bare} images have no caption and are left out")


def _read_webdataset(reading: Reading, source: Source, notes: list[str]) -> Iterable[Row]:
    """Samples of an image, ``.txt`` (one caption per line) and ``.cls`` (a class), as CLIP_benchmark's."""
    from tqdm import tqdm

    partial = 0
    tars = [file for part in source.parts for file in part.files]
    for url in tqdm(tars, desc="  tars", leave=False, disable=None):
        for number, sample in enumerate(tar_samples(url, lambda *member, url=url: _member(url, *member))):
            image = next((sample[suffix] for suffix in _IMAGES if suffix in sample), None)
            captions = [line.strip() for line in sample.get("txt", "").splitlines() if line.strip()]
            label = sample.get("cls", "").strip()
            if image is None or (reading.captions and not captions) or (reading.label_column and not label):
                partial += 1
                continue
            for caption in captions if reading.captions else [""]:
                yield Row(image, caption, f"{url}:{number}", label)
    if partial:
        notes.append(f"{reading.data}: {partial} samples lack an image, a .txt or a .cls and are left out")


def _member(url: str, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> Any:
    if suffix in _IMAGES:
        if not isinstance(archive.fileobj, io.BufferedReader):  # a pipe, or a decompressor: no offsets to come back to
            raise ConfigError(f"{url}: images are read from plain .tar files on a disk; fetch or decompress it first")
        return TarImage(url, member.offset_data, member.size, member.name)
    file = archive.extractfile(member) if suffix in ("txt", "cls") else None
    try:
        return file.read().decode("utf-8") if file else ""
    except UnicodeDecodeError as error:
        raise MMTSError(f"{url}: {member.name} is not UTF-8 text") from error


def _distinct(rows: list[Row], reading: Reading, notes: list[str]) -> Samples:
    if not rows:
        raise MMTSError(f"{reading.data}: holds no samples to evaluate")
    images: dict[Any, int] = {}
    groups: dict[str, int] = {}
    captions: dict[tuple[str, int, int], int] = {}
    image_group: list[int] = []
    image_labels: list[str] = []
    caption_labels: list[str] = []
    image_rows: list[list[int]] = []
    kept: list[int] = []
    for number, row in enumerate(rows):
        for text in (row.caption, row.label):
            if _SURROGATE.search(text):
                raise MMTSError(f"{reading.data}: {shown(text)} holds half a character, which no tokenizer takes")
        if row.image not in images:
            images[row.image] = len(images)
            image_group.append(groups.setdefault(row.match, len(groups)))
            image_labels.append(row.label)
            image_rows.append([])
        index = images[row.image]
        group = groups.setdefault(row.match, len(groups))
        if group != image_group[index] or row.label != image_labels[index]:
            what = "--match-column" if group != image_group[index] else "--label-column"
            raise MMTSError(f"{reading.data}: image {row.image} occurs with two values of {what}; it can have one")
        if not reading.captions or len(image_rows[index]) == reading.captions_per_image:
            continue
        # Captions that a group shares are one candidate; those of a single image stay as they are, repeated or not.
        key = (row.caption, group, -1 if reading.match_column else number)
        if key not in captions:
            captions[key] = len(captions)
            kept.append(group)
            caption_labels.append(row.label)
        image_rows[index].append(captions[key])
    labelled = reading.label_column is not None
    return Samples(
        images=list(images),
        captions=[caption for caption, _, _ in captions],
        image_group=np.array(image_group, np.int64),
        caption_group=np.array(kept, np.int64),
        image_rows=image_rows,
        image_labels=image_labels if labelled else [],
        caption_labels=caption_labels if labelled else [],
        notes=notes,
    )
