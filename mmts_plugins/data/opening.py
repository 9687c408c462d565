"""How a file is opened: on a disk or by a URL, however compressed; and what is said of text in another encoding."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Optional, TextIO, cast

from ..errors import MMTSError, cause, reading

SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # two letters at least: C:\ is a drive
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Whether fsspec opens it, rather than the file system (or, for ``pipe:``, a command)."""
    return _URL.match(path) is not None


@contextmanager
def reading_text(path: str, what: str, kind: type[MMTSError] = MMTSError) -> Iterator[None]:
    """:func:`reading`, and how to convert a file of another encoding."""
    with reading(path, what, kind):
        try:
            yield
        except UnicodeDecodeError as error:
            with open_bytes(path) as file:
                start = file.read(2)
            encoding = "UTF-16" if start in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
            converted = shlex.quote(f"utf8{Path(path).suffix}")
            way = f"if it is {encoding}, convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {converted}"
            if start == b"\x1f\x8b":
                way = "it is compressed; name it .gz, or gunzip it"
            raise kind(f"{path}: {what}: it is not UTF-8 text ({cause(error)}); {way}") from error


_ZSTD = b"\x28\xb5\x2f\xfd"


@contextmanager
def decompressed(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """What a file holds, through gzip, bzip2, xz and Zstandard, which are told by their first bytes."""
    start = file.read(10)
    file.seek(0)
    if start.startswith(_ZSTD):
        import pyarrow as pa

        with pa.PythonFile(file, "r") as raw, pa.CompressedInputStream(raw, "zstd") as stream:
            yield io.BufferedReader(_Raw(stream))
        return
    # bzip2 has no first bytes that a text could not have, but for those of its first block.
    known = {b"\x1f\x8b": gzip.open, b"BZh" + start[3:4] + b"1AY&SY": bz2.open, b"\xfd7zXZ\0": lzma.open}
    opener: Any = next((opener for magic, opener in known.items() if start.startswith(magic)), None)
    yield file if opener is None else opener(file, "rb")


class _Raw(io.RawIOBase):
    """An Arrow stream as one of Python's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def opened_text(path: str, newline: Optional[str] = None) -> Iterator[TextIO]:
    """A text file or URL, also compressed; ``newline`` as for ``open``."""
    with open_bytes(path) as file, decompressed(file) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def with_fsspec(url: str, kind: type[MMTSError] = MMTSError) -> tuple[Any, str]:
    """The file system of a URL, and the path inside it.

    Raises:
        MMTSError: of the kind ``kind``: fsspec, or what it opens such URLs with, is not there.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise kind(f"{url}: reading from a URL needs fsspec: pip install fsspec") from error
    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # a protocol that nobody knows, or whose package is not there
        raise kind(f"{url}: cannot be opened: {cause(error)}") from error
    return system, str(path)


def open_bytes(path: str) -> IO[bytes]:
    """A file's bytes, as they are."""
    if not is_url(path):
        return open(path, "rb")
    system, inside = with_fsspec(path)
    return cast("IO[bytes]", system.open(inside, "rb"))


def start_of(path: str, many: int = 512) -> bytes:
    """The first bytes of what a file holds, decompressed; none where it is not there or cannot be read."""
    try:
        with open_bytes(path) as file, decompressed(file) as stream:
            return stream.read(many)
    except Exception:  # whoever reads it whole says what is wrong
        return b""


def first_lines(path: str, many: int) -> list[str]:
    """The first lines of a text file; none where it cannot be read as one."""
    try:
        with opened_text(path) as file:
            return [line.rstrip("\n") for line in islice(file, many)]
    except Exception:  # as above
        return []


def size_of(path: str) -> int:
    """Bytes of a file or URL, as it is stored; 0 where nobody says."""
    try:
        if not is_url(path):
            return os.path.getsize(path)
        system, inside = with_fsspec(path)
        return int(system.size(inside) or 0)
    except (OSError, MMTSError):
        return 0


def exists(path: str) -> bool:
    """Whether there is such a file, or URL."""
    if not is_url(path):
        return os.path.exists(path)
    system, inside = with_fsspec(path)
    return bool(system.exists(inside))
