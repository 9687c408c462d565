"""Tables behind a URL: copied once per node into the cache, and read from there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from .._files import PathLike, cache_folder, one_at_a_time, replacing_folder, writing
from ..data.opening import is_url, with_fsspec
from ..errors import TableError, reading

_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Copies of a process that has no cache, until it ends."""


def located(path: PathLike) -> Path:
    """The path of a table on this machine: itself, or the copy of what a URL (``s3://``, ``hf://``, ...) names.

    The first process of a node that asks copies it, the others wait; another content at the URL is copied anew.

    Raises:
        TableError: it cannot be read, or the copy not be written.
    """
    url = os.fspath(path)
    if not isinstance(url, str) or not is_url(url):
        return Path(path)
    with reading(url, "cannot be read as a cluster table", TableError):
        system, inside = with_fsspec(url, TableError)
        folder = bool(system.isdir(inside))
        files = sorted(each for each in system.find(inside) if each.endswith(".parquet")) if folder else [inside]
        if not files or not (folder or system.exists(inside)):
            raise TableError(f"{url}: no such cluster table")
        about = [(file, system.ukey(file)) for file in files]
    name = hashlib.blake2b(repr((url, about)).encode(), digest_size=16).hexdigest()
    kept = cache_folder("copies")
    if kept is None:
        _kept.append(tempfile.TemporaryDirectory(prefix="mmts-"))
        kept = Path(_kept[-1].name)
    copy = kept / name
    with one_at_a_time(copy):
        if not copy.is_dir():
            with (
                writing(copy, f"the copy of {url} cannot be written", TableError),
                replacing_folder(copy) as unfinished,
            ):
                _fetch(system, files, unfinished, url)
    return copy if folder else copy / Path(inside).name


def _fetch(system: Any, files: list[str], folder: Path, url: str) -> None:
    with reading(url, "cannot be copied", TableError):
        for file in files:
            system.get_file(file, str(folder / file.rsplit("/", 1)[-1]))
