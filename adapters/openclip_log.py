"""What OpenCLIP writes of a training run: ``out.log``, ``params.txt`` and ``results.jsonl``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from ..errors import one_line
from ..hosts.logs import HostLog, RunFolder, diverged, is_number

FILES = ("out.log", "results.jsonl")

_LINE = re.compile(
    r"Train Epoch: (\d{1,9}) \[.*?\((\d{1,3})%\)\].*?Logit Scale: ([\d.einaf+-]+).* Loss: ([\d.einaf+-]+) \(", re.ASCII
)
_LONGEST_LINE = 10_000  # a longer one is not its progress, and would keep the pattern busy


class Progress(NamedTuple):
    """What one line of the training log says; numbers may be NaN or infinite."""

    epochs: float
    logit_scale: float
    loss: float


def parse_progress(line: str) -> Optional[Progress]:
    """The progress that a line of ``out.log`` reports, ``None`` for any other line."""
    match = _LINE.search(line) if len(line) <= _LONGEST_LINE else None
    if match is None:
        return None
    epoch, percent, scale, loss = match.groups()
    try:
        return Progress(int(epoch) + int(percent) / 100, float(scale), float(loss))
    except ValueError:  # dots and letters, but no number
        return None


def read_log(run: RunFolder) -> HostLog:
    """What these files tell; where they are not there, nothing."""
    pairs = (line.split(": ", 1) for line in run.lines("params.txt") if ": " in line)
    settings = {one_line(name): one_line(value) for name, value in pairs}
    results = run.objects("results.jsonl")
    scores = [(name, value, "results.jsonl") for name, value in results[-1].items()] if results else []
    return HostLog(_series(run.lines("out.log"), settings, run.notes), settings, scores)


def _series(lines: Sequence[str], settings: dict[str, str], notes: list[str]) -> dict[str, np.ndarray]:
    found: list[Progress] = []
    for line in lines:
        seen = parse_progress(line)
        if seen is None:
            continue
        while found and found[-1].epochs > seen.epochs:  # resumed from there: what was trained after it is lost
            found.pop()
        found.append(seen)
    if not found:
        return {}
    asked = settings.get("epochs", "")
    epochs = max(found[-1].epochs, int(asked) if re.fullmatch("[0-9]{1,9}", asked) else 0)
    bad = [seen for seen in found if diverged(seen.loss) or diverged(seen.logit_scale)]
    if bad:
        notes.append(f"the loss is not a finite number from epoch {bad[0].epochs:g} on: the training diverged")
    scaled = [seen for seen in found if is_number(seen.logit_scale) and seen.logit_scale > 0]
    values: dict[str, list[tuple[float, float]]] = {
        "loss": [(seen.epochs, seen.loss) for seen in found],
        "learned_temperature": [(seen.epochs, 1 / seen.logit_scale) for seen in scaled],
    }
    return {
        name: np.array([[100 * at / epochs if epochs else 100.0, value] for at, value in known])
        for name, each in values.items()
        if (known := [(at, value) for at, value in each if is_number(value)])
    }
