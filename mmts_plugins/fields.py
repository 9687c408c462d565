"""What a value from outside may be: one description for flags, ``mmts.yaml``, plans, state files and metadata."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from .errors import ConfigError, MMTSError, shown

NUMBER, WHOLE, TEXT, SWITCH, TEXTS, WHOLES, MAPPING = (
    "a number",
    "a whole number",
    "text",
    "true or false",
    "a list of texts",
    "a list of whole numbers",
    "a mapping",
)
LARGEST_WHOLE = 2**53  # exact as a float, far above any count of steps
LONGEST_TEXT = 4096


@dataclass(frozen=True)
class Field:
    """One value.

    Attributes:
        kind: one of the constants of this module.
        null: whether ``None`` may stand for it.
        least, above, most: of a number; it is always finite.
        choices: of a text.
        empty: whether a text or a list may be empty.
        longest: of a text, in characters.
    """

    kind: str
    null: bool = False
    least: Optional[float] = None
    above: Optional[float] = None
    most: Optional[float] = None
    choices: Optional[Sequence[str]] = None
    empty: bool = False
    longest: int = LONGEST_TEXT

    def check(self, where: str, value: Any, error: type[MMTSError] = ConfigError) -> Any:
        """The value, if it may stand there; numbers come back as ``float`` or ``int``.

        Args:
            where: names the flag, or the file and its field.
            value: anything.
            error: what to raise.

        Raises:
            MMTSError: of the kind ``error``, in one line.
        """
        if value is None and self.null:
            return None
        if not _IS[self.kind](value):
            raise error(f"{where} is {shown(value)}: it must be {self.kind}")
        if self.kind in (NUMBER, WHOLE):
            return self._number(where, value, error)
        if self.kind == TEXT:
            _check_text(where, value, self.empty, error, self.longest)
            if self.choices is not None and value not in self.choices:
                close = difflib.get_close_matches(value[:80], self.choices, n=1)
                hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(self.choices)}"
                raise error(f"{where} is {shown(value)}; {hint}")
        if self.kind in (TEXTS, WHOLES) and not value and not self.empty:
            raise error(f"{where} is empty")
        if self.kind == TEXTS:
            for each in value:
                _check_text(f"an item of {where}", each, True, error)
        return value

    def _number(self, where: str, value: Any, error: type[MMTSError]) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
            raise error(f"{where} is {shown(value)}: too large")
        if not math.isfinite(value):
            raise error(f"{where} is {value}: it must be a finite number")
        if self.least is not None and value < self.least:
            raise error(f"{where} is {value}: it must be {self.least:g} or above")
        if self.above is not None and value <= self.above:
            raise error(f"{where} is {value}: it must be above {self.above:g}")
        if self.most is not None and value > self.most:
            raise error(f"{where} is {value}: it must be at most {self.most:g}")
        return int(value) if self.kind == WHOLE else float(value)


def _check_text(where: str, value: str, empty: bool, error: type[MMTSError], longest: int = LONGEST_TEXT) -> None:
    if not value.strip() and not empty:
        raise error(f"{where} is empty")
    if "\0" in value:
        raise error(f"{where} is {shown(value)}: it holds a NUL character")
    if len(value) > longest:
        raise error(f"{where} is {len(value)} characters long: {shown(value)}; at most {longest} are taken")
    try:
        value.encode()
    except UnicodeEncodeError:
        # surrogateescape: how Python holds names of files that are not UTF-8; those are fine
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise error(f"{where} is {shown(value)}: it holds half a character") from None


def check_mapping(
    source: object,
    values: Any,
    fields: Mapping[str, Field],
    required: Sequence[str] = (),
    error: type[MMTSError] = ConfigError,
    what: str = "field",
) -> dict[str, Any]:
    """Every value of a mapping checked; the mapping of those that are there.

    Raises:
        MMTSError: it is no mapping, a name is unknown or lacking, or a value may not stand there.
    """
    if not isinstance(values, Mapping):
        raise error(f"{source}: {shown(values)} is not a mapping of names to values")
    for name in values:
        if not isinstance(name, str) or name not in fields:
            close = difflib.get_close_matches(str(name)[:80], list(fields), n=1) if isinstance(name, str) else []
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields)}"
            raise error(f"{source}: unknown {what} {shown(name)}{hint}")
    for name in required:
        if name not in values:
            raise error(f"{source}: {what} {name!r} is missing")
    return {name: fields[name].check(f"{source}: {what} {name!r}", value, error) for name, value in values.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or (math.isfinite(value) and value == int(value)))


_IS = {
    NUMBER: _is_number,
    WHOLE: _is_whole,
    TEXT: lambda value: isinstance(value, str),
    SWITCH: lambda value: isinstance(value, bool),
    TEXTS: lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    WHOLES: lambda value: isinstance(value, list) and all(_is_whole(each) for each in value),
    MAPPING: lambda value: isinstance(value, dict),
}
