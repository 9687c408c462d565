"""Text files of any usual compression, and what is said of those in another encoding."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, TextIO

from ..errors import MMTSError, cause, reading


@contextmanager
def reading_text(path: str, what: str, kind: type[MMTSError] = MMTSError) -> Iterator[None]:
    """:func:`reading`, and how to convert a file of another encoding."""
    with reading(path, what, kind):
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
            raise kind(f"{path}: {what}: it is not UTF-8 text ({cause(error)}); {way}") from error


def opened_text(path: str, newline: Optional[str] = None) -> TextIO:
    """A text file, also through gzip, bzip2, xz and Zstandard, which are told by their first bytes.

    ``newline`` as for ``open``.
    """
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
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)
