"""Which files a source names, one way for all formats.

A source is one or several parts joined by ``::``; a part is a file, a folder, a glob or brace pattern, or a URL that
fsspec opens (``s3://``, ``gs://``, ``hf://datasets/...``, ``https://``).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, MMTSError, listed, reading
from .opening import SCHEME, is_url, with_fsspec

_PATTERN = re.compile(r"[*?\[]")
_IN_FOLDERS = (".parquet", ".arrow", ".tar")
"""Of a folder, the files that are read, of the first of these that it holds any of."""


def parts_of(data: str) -> list[str]:
    """The parts that a source joins."""
    return data.split("::")


def expand(part: str) -> list[str]:
    """The files that a part names, in the order of their names; a file that is named as it is need not be there.

    Raises:
        ConfigError: its braces do not match, or it is a folder of nothing that is read.
        MMTSError: a pattern that matches nothing, or a URL that cannot be listed.
    """
    if SCHEME.match(part) and not is_url(part):
        return [part]  # pipe:COMMAND, whose text is a shell's
    if not is_url(part) and os.path.exists(part):
        return in_folder(part, _below(part)) if os.path.isdir(part) else [part]
    found: list[str] = []
    for each in _braces(part):
        if is_url(each):
            found += _remote(each)
        elif os.path.isdir(each):
            found += in_folder(each, _below(each))
        elif _PATTERN.search(each) and not os.path.exists(each):
            found += _globbed(each)
        else:
            found.append(each)
    return found


def _braces(part: str) -> list[str]:
    if "{" not in part:
        return [part]
    from braceexpand import braceexpand

    try:
        return list(braceexpand(part))
    except ValueError as error:
        raise ConfigError(f"{part}: the braces of the shard pattern do not match: {error}") from error


def _globbed(pattern: str) -> list[str]:
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise MMTSError(f"{pattern}: no such file")
    return found


def _below(folder: str) -> list[str]:
    """Files below a folder, by name, without hidden and unfinished ones."""
    with reading(folder, "cannot be read"):
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [str(file) for file in files if not any(part[0] in "._" for part in file.relative_to(folder).parts)]


def in_folder(folder: str, files: Sequence[str]) -> list[str]:
    """Of the files of a folder those that are read: Parquet, Arrow, tars, or texts beside images.

    Raises:
        ConfigError: there are none.
    """
    for suffix in _IN_FOLDERS:
        found = [file for file in files if file.endswith(suffix)]
        if found:
            return found
    texts = texts_beside(files)
    if texts:
        return texts
    names = sorted({os.path.relpath(file, folder).split(os.sep)[0] if not is_url(file) else file.rsplit("/", 1)[-1]
                    for file in files})  # fmt: skip
    raise ConfigError(
        f"{folder}: a folder without *.parquet files (it holds {listed(names) or 'nothing'}), nor *.arrow, *.tar, or "
        "images with a .txt beside each; name the file of the captions, or quote a pattern: 'FOLDER/*.jsonl'"
    )


def texts_beside(files: Sequence[str]) -> list[str]:
    """The ``.txt`` files that stand beside an image or a video of the same name."""
    images = {os.path.splitext(file)[0] for file in files if os.path.splitext(file)[1].lower() in IMAGES}
    return [file for file in files if file.endswith(".txt") and file[:-4] in images]


IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mp4", ".avi", ".mkv", ".mov", ".webm")


def _remote(url: str) -> list[str]:
    with reading(url, "cannot be listed"):
        system, path = with_fsspec(url)
        if _PATTERN.search(path):
            found = sorted(system.glob(path))
            if not found:
                raise MMTSError(f"{url}: no such file")
            return [system.unstrip_protocol(each) for each in found]
        if system.isdir(path):
            every = [system.unstrip_protocol(each) for each in sorted(system.find(path))]
            return in_folder(url, [each for each in every if not any(x[:1] in "._" for x in each.split("/")[3:])])
    return [url]
