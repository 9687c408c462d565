"""Captions of a WebDataset, and its tars: samples are grouped as OpenCLIP groups them."""

from __future__ import annotations

import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import IO, Any, Optional, Union, cast

from ..errors import ConfigError, MMTSError, cause, reading, shown
from .source import SCHEME, Samples, Source


def read_webdataset(source: Source) -> Samples:
    """The captions of the samples that OpenCLIP keeps: those with ``.txt`` and an image. Images are never read."""
    from tqdm import tqdm

    captions: list[str] = []
    partial = undecodable = 0
    found: Counter[str] = Counter()
    for url in tqdm(shards(source.data), desc="reading", unit="tar", file=sys.stderr):
        for caption in tar_captions(url, source.column, found):
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


def tar_captions(
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
    mode = "r|*" if SCHEME.match(url) else "r:*"
    return tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictTarInfo)  # type: ignore[call-overload]


def _open(url: str) -> IO[bytes]:
    if not SCHEME.match(url):
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
