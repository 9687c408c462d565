"""Captions of a WebDataset, and its tars: samples are grouped as OpenCLIP groups them."""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import IO, Any, NamedTuple, Optional, Union, cast

from ..errors import ConfigError, MMTSError, cause, reading, shown
from . import forms
from .opening import SCHEME, is_url, open_bytes
from .source import DEFAULT_COLUMNS, Samples, Source

_IMAGES = {"png", "jpg", "jpeg", "webp"}  # OpenCLIP's
_TELLING = 100  # samples of the first tar that tell where captions are


class Rule(NamedTuple):
    """Where the captions of a tar are.

    Attributes:
        suffix: of the member.
        path: of the caption inside it, where it is JSON.
        beside_images: only of samples with an image, as OpenCLIP trains on.
        note: how it was told, where nobody said.
    """

    suffix: str = "txt"
    path: tuple[forms.Step, ...] = ()
    beside_images: bool = True
    note: str = ""


def rule_of(source: Source, tar: str) -> Rule:
    """Where captions are: where ``--column`` says, else where the first samples of a tar have them.

    Raises:
        ConfigError: of a ``.json``, no field is named.
        MMTSError: the tar cannot be read.
    """
    if source.column is not None:
        inside = re.fullmatch(r"((?:.*\.)?json)\.(.+)", source.column, re.I)
        if inside is not None:
            return Rule(inside[1].lower().lstrip("."), tuple(forms.steps(inside[2])), False)
        if source.column.lower().endswith("json"):
            raise ConfigError(
                f"{source.data}: --column {source.column}: a .json holds fields, not a caption by itself; name one: "
                f"--column {source.column}.caption"
            )
        return Rule(source.column.lower().lstrip("."), (), False)
    bare, fields = False, ""

    def look(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> Optional[bytes]:
        file = archive.extractfile(member) if suffix == "json" else None
        return file.read() if file else None

    for sample in islice(tar_samples(tar, look), _TELLING):
        if "txt" in sample and sample.keys() & _IMAGES:
            return Rule()
        bare = bare or "txt" in sample
        fields = fields or _usual_field(sample.get("json"))
    if bare:
        return Rule(beside_images=False, note="no images are beside the .txt; image trainers leave such samples out")
    if fields:
        return Rule("json", (("field", fields),), False,
                    f"captions are the field {fields!r} of each .json (--column json.{fields}); trainers "
                    "of WebDatasets usually read the .txt")  # fmt: skip
    return Rule()


def _usual_field(content: Optional[bytes]) -> str:
    try:
        record = json.loads(content or b"null")
    except ValueError:
        return ""
    usual = DEFAULT_COLUMNS["json"]
    return next((name for name in usual if isinstance(record, dict) and isinstance(record.get(name), str)), "")


def read_webdataset(source: Source, files: Sequence[str]) -> Samples:
    """The captions of the samples that OpenCLIP keeps, or those that are named. Images are never read."""
    from tqdm import tqdm

    rule = _rule(source, files)
    result = Samples([], column=source.column, form="webdataset")
    captions = result.captions
    partial = undecodable = damaged = 0
    found: Counter[str] = Counter()
    for url in tqdm(files, desc="reading", unit="tar", file=sys.stderr):
        try:
            for caption in tar_captions(url, rule, found):
                if caption is None:
                    partial += 1
                elif isinstance(caption, bytes):
                    undecodable += 1
                else:
                    captions.append(caption)
        except ConfigError:
            raise
        except MMTSError as error:
            if not source.skip_damaged:
                raise _goes_on(error) from error
            damaged += 1
            result.notes.append(f"{error}: the rest of it is left out (--skip-damaged)")
    wanted, as_where = ("a .txt or an image", ", as in training") if rule.beside_images else (f"a .{rule.suffix}", "")
    if partial and not captions and not undecodable:
        suffixes = ", ".join(f"{many} .{shown(suffix)[1:-1]}" for suffix, many in found.most_common(8))
        both = wanted.replace(" or ", " and ")
        raise MMTSError(
            f"{source.data}: none of {partial} samples has {both}; their members: {suffixes}. Name the suffix of the "
            "captions with --column SUFFIX (of a caption, not of an image; trainers usually read the .txt)"
        )
    if rule.note:
        result.notes.append(f"{source.data}: {rule.note}")
    if partial:
        result.left_out[f"samples without {wanted}"] = partial
        result.notes.append(f"{source.data}: {partial} samples without {wanted} are left out{as_where}")
    if undecodable:
        result.left_out["captions that are not UTF-8"] = undecodable
        result.notes.append(f"{source.data}: {undecodable} captions are not UTF-8 and are left out, as in training")
    if damaged:
        result.left_out["damaged tars"] = damaged
    result.how["suffix"] = rule.suffix if not rule.path else source.column or f"{rule.suffix}.{rule.path[0][1]}"
    return result


def _goes_on(error: MMTSError) -> MMTSError:
    return MMTSError(f"{error} (--skip-damaged goes on with the next tar)")


def _rule(source: Source, files: Sequence[str]) -> Rule:
    """Of the first tar that can be read."""
    for file in files[:-1]:
        try:
            return rule_of(source, file)
        except ConfigError:
            raise
        except MMTSError as error:
            if not source.skip_damaged:
                raise _goes_on(error) from error
    return rule_of(source, files[-1])


def tar_captions(url: str, rule: Rule, found: Optional[Counter[str]] = None) -> Iterator[Union[str, bytes, None]]:
    """For each sample its caption; bytes where it is not UTF-8, None where the caption or the image is missing.

    Args:
        found: counts the suffixes.
    """

    def text(archive: tarfile.TarFile, member: tarfile.TarInfo, its: str) -> Optional[bytes]:
        file = archive.extractfile(member) if its == rule.suffix else None
        return file.read() if file else None

    for sample in tar_samples(url, text):
        if found is not None:
            found.update(sample.keys())
        caption = sample.get(rule.suffix)
        if caption is None or (rule.beside_images and not sample.keys() & _IMAGES):
            yield None
        elif rule.path:
            yield from _of_json(caption, rule)
        else:
            try:
                yield caption.decode("utf-8")
            except UnicodeDecodeError:
                yield caption


def _of_json(content: bytes, rule: Rule) -> Iterator[Union[str, bytes, None]]:
    try:
        record = json.loads(content)
    except ValueError:
        yield content
        return
    texts = [text for place in forms.walk(record, rule.path) for text in forms.texts(place) if isinstance(text, str)]
    if not texts:
        yield None
    yield from texts


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
    mode = "r|*" if SCHEME.match(url) and not is_url(url) else "r:*"
    return tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictTarInfo)  # type: ignore[call-overload]


def _open(url: str) -> IO[bytes]:
    if is_url(url) or not SCHEME.match(url):
        if not is_url(url) and not os.path.exists(url):
            raise MMTSError(f"{url}: no such tar; quote the pattern, so that the shell leaves its braces alone")
        return open_bytes(url)
    try:
        from webdataset.gopen import gopen
    except ImportError as error:
        raise MMTSError(f"{url}: reading from a pipe needs the package webdataset: pip install webdataset") from error
    try:
        return cast("IO[bytes]", gopen(url))
    except Exception as error:  # of any library that it opens URLs with
        raise ConfigError(f"{url}: webdataset cannot open it ({cause(error)}); use pipe:COMMAND") from error
