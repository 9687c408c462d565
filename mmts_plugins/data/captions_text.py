"""Captions of a text file, one per line."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence

from ..errors import ConfigError, shown
from .source import Samples, Source
from .text import opened_text

_TABLE_LINES = 0.9  # of a text file's lines that look like rows of a table: then they are no captions
_NAMED_LINE = re.compile(
    r"[^\t,|]*\.(?:jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mkv|mov|webm|wav|mp3)(?:#\d+)?\s*([\t,|])", re.I
)


def read_text(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    with opened_text(source.data) as file:
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
