"""What the files of a training run's folder say: read tolerantly, with a note for whatever cannot be read.

A run may have been killed, trained without us, or lack any of its files. Text that comes out is on one line, numbers
are finite, whatever the files hold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from ..errors import cause

if TYPE_CHECKING:
    from typing import TypeGuard

LARGEST = 1e30  # no loss, temperature or metric is larger, and plots can still draw it


class HostLog(NamedTuple):
    """What a host's own files tell of a run.

    Attributes:
        series: from a name (``loss``, ``learned_temperature``) to ``[n, 2]``: per cent of the run, and value.
        settings: the host's own arguments, where it writes them down.
        scores: its last evaluation: name, value as the file has it, and the file's name.
    """

    series: dict[str, np.ndarray]
    settings: dict[str, str]
    scores: Sequence[tuple[str, Any, str]]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        places: the folder, then those inside it in which its files may lie too.
        notes: what could not be read, as sentences; readers add theirs.
    """

    places: Sequence[Path]
    notes: list[str] = field(default_factory=list)

    def find(self, name: str) -> Optional[Path]:
        """The file of this name; where several have it, the one nearest to the top."""
        return next((place / name for place in self.places if (place / name).is_file()), None)

    def lines(self, name: str) -> list[str]:
        """Of a file that may be missing, of another encoding, or closed to us."""
        path = self.find(name)
        return [] if path is None else lines(path, self.notes)

    def objects(self, name: str) -> list[dict[str, Any]]:
        """Of a file of JSON lines, those that are objects."""
        return [value for line in self.lines(name) if (value := parsed(line)) is not None]


def lines(path: Path, notes: list[str]) -> list[str]:
    """The lines of a file, whatever its encoding; none, and a note, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        notes.append(f"{path.name}: cannot be read ({cause(error)}) and was left out")
        return []


def parsed(line: str) -> Optional[dict[str, Any]]:
    """The object that a line of JSON holds; ``None`` where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number, of a size that means something."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def diverged(value: Any) -> bool:
    """Whether it was to be a number, and is NaN, infinite, or beyond all that is meant."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not is_number(value)
