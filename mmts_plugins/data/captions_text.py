"""Captions of a text file: one per line, lines of a published form, or a text beside each image."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Optional

from ..errors import ConfigError, MMTSError, shown
from . import forms
from .opening import opened_text
from .source import Samples, Source

TELLING = 1000  # lines that tell a form
_NAMED_LINE = re.compile(
    r"[^\t,|]*\.(?:jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mkv|mov|webm|wav|mp3)(?:#\d+)?\s*([\t,|])", re.I
)


def read_text(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    """One caption per line; or of each line of a form its caption."""
    form = forms.lines_named(source.format)
    with opened_text(source.data) as file:
        lines = [line.rstrip("\n") for line in file]
    if form is None and source.format == "auto":
        form = telling(lines[:TELLING])
    if form is not None:
        return _read_lines(source, form, lines)
    if source.format == "auto":
        _refuse_table(source.data, lines)
    return Samples(lines, form="text")


def telling(lines: Sequence[str]) -> Optional[forms.Lines]:
    """The form that nearly all of these lines, the first in any case, are of."""
    for form in forms.LINES:
        rest = lines[1:] if form.header and lines and form.header.fullmatch(lines[0]) else lines
        full = [line for line in rest if line.strip()]
        if full and form.line.fullmatch(full[0]):
            many = sum(form.line.fullmatch(line) is not None for line in full)
            if many >= forms.LINE_SHARE * len(full) and len(full) > 1:
                return form
    return None


def _read_lines(source: Source, form: forms.Lines, lines: Sequence[str]) -> Samples:
    found = Samples([], column=None, form=form.name)
    rest = lines[1:] if form.header and lines and form.header.fullmatch(lines[0]) else lines
    odd = 0
    for line in rest:
        match = form.line.fullmatch(line)
        if match is None:
            odd += bool(line.strip())
            continue
        found.captions.append(match["caption"].strip())
        found.images.append(match["image"])
    if odd:
        if odd > (1 - forms.LINE_SHARE) * len(rest):
            raise MMTSError(f"{source.data}: {odd} of {len(rest)} lines are not {form.says} (--format {form.name})")
        found.left_out["other lines"] = odd
        found.notes.append(f"{source.data}: {odd} lines are not {form.says} and are left out")
    if source.format == "auto":
        found.notes.append(
            f"{source.data}: nearly every line is {form.says}: read as {form.title} (--format {form.name}); if the "
            "lines are captions as they stand, pass --format text"
        )
    return found


def read_pairs(source: Source, files: Sequence[str]) -> Samples:
    """A ``.txt`` beside each image: every line of it that is not blank is a caption."""
    found = Samples([], form="pairs")
    for file in files:
        with opened_text(file) as opened:
            lines = [line.strip() for line in opened if line.strip()]
        found.captions += lines
        found.images += [file[: -len(".txt")]] * len(lines)
        if not lines:
            found.left_out["texts without a caption"] = found.left_out.get("texts without a caption", 0) + 1
    return found


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
    if rows < forms.LINE_SHARE * (sum(bool(line.strip()) for line in lines) - (header and not named[0])):
        return
    column = lines[0].split(separator)[-1] if header else str(lines[first].count(separator))
    # Of two characters, so that quotes inside captions stay.
    flag = {"\t": "'\\t'", "|": "'\\|'", ",": ","}[separator]
    raise ConfigError(
        f"{path}: nearly every line ({rows} of {len(lines)}) is a row of a table, such as {shown(lines[first][:60])}: "
        f"its captions are read with --format csv{' --no-header' * (not header)} --column {shlex.quote(column)} "
        f"--separator {flag}; if the lines are captions as they stand, pass --format text"
    )
