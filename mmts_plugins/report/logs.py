"""Reading a training run's folder, of any host: what it was told, what it logged, what it scored.

Ours is read here, the host's own by its adapter (:meth:`.Adapter.read_log`). What cannot be read becomes a note for the
reader of the report, never a guess; see :mod:`mmts_plugins.hosts.logs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from .._files import PathLike
from ..config import THIRDS
from ..errors import ConfigError, one_line, reading, shown
from ..hosts.logs import LARGEST, RunFolder, diverged, is_number, lines, parsed
from ..hosts.registry import adapters
from ..record import FILE_NAME, LOG_NAME, read_record

_LAST_STEP = 2**53
_MIDDLE = re.compile("_mid$")  # as it was called until 0.1
_NOT_SERIES = ("step", "total_steps", "epoch", "phase")


def record_beside(checkpoint: Path) -> Path:
    """Where the record of the run that wrote ``folder/checkpoints/NAME`` is: ``folder``, or of older runs beside it."""
    above = checkpoint.parent.parent / FILE_NAME
    return above if above.is_file() else checkpoint.parent / FILE_NAME


@dataclass(frozen=True)
class Score:
    """A number with the bounds of its interval, where there is one."""

    value: float
    low: Optional[float] = None
    high: Optional[float] = None

    @classmethod
    def of(cls, entry: Any) -> Optional[Score]:
        """From ``{"value", "low", "high"}`` or a bare number; ``None`` where there is no number."""
        value, low, high = (entry.get(name) for name in ("value", "low", "high")) if isinstance(entry, dict) else (
            entry, None, None)  # fmt: skip
        if not is_number(value):
            return None
        if is_number(low) and is_number(high) and low <= high:
            return cls(float(value), float(low), float(high))
        return cls(float(value))


@dataclass(frozen=True)
class Metric:
    """A metric, by thirds of the concepts' frequency too where it was measured (``head``, ``middle``, ``tail``)."""

    score: Score
    thirds: dict[str, Score]
    source: str


@dataclass(frozen=True, eq=False)
class TrainingLog:
    """A run as its folder tells it.

    Attributes:
        name: for labels.
        record: the content of ``mmts.yaml``, single values; empty for a run without us.
        record_path: of that file.
        series: from a name (``loss``, ``tau_head``, ...) to ``[n, 2]``: per cent of the run, and value.
        steps: ``[n]`` the steps of ``series["tau_base"]``.
        metrics: final scores by name.
        settings: the host's own arguments, where it writes them down.
        notes: what is missing or could not be read, as sentences.
    """

    name: str
    record: dict[str, Any]
    record_path: Optional[Path]
    series: dict[str, np.ndarray]
    steps: np.ndarray
    metrics: dict[str, Metric]
    settings: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def host(self) -> str:
        """The host and its version, as far as they are known."""
        return one_line(f"{self.record.get('host', 'unknown')} {self.record.get('host_version') or ''}")


def read_run(path: PathLike) -> TrainingLog:
    """Read a run: the folder that holds ``mmts.yaml``, or the one above or below it.

    Raises:
        ConfigError: nothing in there is a run's, or its ``mmts.yaml`` is damaged.
    """
    given = Path(path)
    inner = list(dict.fromkeys(name for adapter in adapters() for name in adapter.log_folders))
    with reading(given, "cannot be read as a training run", ConfigError):
        folder = given.parent if given.is_file() else given
        # Older runs have our mmts.yaml among the host's files, in a folder of the run's.
        for base in (folder.parent, folder) if folder.name in inner else (folder, folder.parent):
            log = _read(base, inner, given)
            if log is not None:
                return log
        found = sorted(child.name for child in folder.iterdir())[:6]
    logs = "; ".join(f"{adapter.title} ({', '.join(adapter.log_files)})" for adapter in adapters() if adapter.log_files)
    raise ConfigError(
        f"{given}: not a training run: no {FILE_NAME}, and no log of a host ({logs}) in it (found: "
        f"{', '.join(found) or 'nothing'})"
    )


def _read(folder: Path, inner: Sequence[str], given: Path) -> Optional[TrainingLog]:
    run = RunFolder([folder, *(folder / name for name in inner)])
    notes = run.notes
    record_path = run.find(FILE_NAME)
    record = {one_line(str(name)): _single(value) for name, value in read_record(record_path).items()} if (
        record_path) else {}  # fmt: skip
    logs = [path for place in reversed(run.places) if (path := place / LOG_NAME).is_file()]  # the older place first
    series, steps = _scheduled(logs, record, notes)
    metrics = _evaluated(run)
    settings: dict[str, str] = {}
    for adapter in adapters():
        host = adapter.read_log(run)
        settings = settings or host.settings
        for name, values in host.series.items():
            if name != "learned_temperature" or not record:  # ours sets the logged scale, it is not learned
                series.setdefault(name, values)
        for name, entry, source in host.scores:
            if name not in ("epoch", "num_samples"):
                _add(metrics, notes, name, entry, source)
    if not (record or series or metrics):
        return None
    name = next((part for part in reversed(folder.resolve().parts) if part not in inner), str(given))
    if not record:
        notes.insert(0, f"no {FILE_NAME}: trained without MM-TS, or by another tool")
    elif not logs:
        notes.append(f"no {LOG_NAME}: the temperatures that training logged cannot be compared with the schedule")
    if "loss" not in series:
        notes.append("no losses were found")
    if not metrics:
        notes.append("no metrics were found (mmts eval -o RUN/mmts_eval.json, or the host's own evaluation)")
    return TrainingLog(one_line(name) or "run", record, record_path, series, steps, metrics, settings,
                       list(dict.fromkeys(notes)))  # fmt: skip


def _single(value: Any) -> Any:
    """A value of a record as it is, if it is a single one; else in a few words, for a page."""
    if value is None or isinstance(value, (bool, float, str)) or (isinstance(value, int) and abs(value) < LARGEST):
        return value
    return shown(value)


def _logged(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a :data:`LOG_NAME`. A killed run left half a line, and its successor may have written on there."""
    bad = 0
    for line in lines(path, notes):
        value = parsed(line)
        if value is None and line.strip():
            bad += 1
            value = parsed(line[start:]) if (start := line.rfind('{"step"')) > 0 else None
        if value is None:
            continue
        step = value.get("step")
        if is_number(step) and 0 <= step <= _LAST_STEP and step == int(step):
            yield value
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} line(s) could not be read and were left out")


def _scheduled(paths: Sequence[Path], record: dict[str, Any], notes: list[str]) -> tuple[dict[str, np.ndarray], Any]:
    """Ours, from :data:`LOG_NAME`. A step may have several lines; of the same value the later counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for path in paths:
        for line in _logged(path, notes):
            by_step.setdefault(int(line["step"]), {}).update(line)
    if not by_step:
        return {}, np.empty(0)
    steps = sorted(by_step)
    bad = [step for step in steps if diverged(by_step[step].get("loss"))]
    if bad:
        notes.append(f"the loss is not a finite number from step {bad[0]} on: the training diverged")
    totals = [by_step[steps[-1]].get("total_steps"), record.get("total_steps"), 1]
    total = max(next(total for total in totals if is_number(total) and total > 0), steps[-1] + 1)
    points: dict[str, list[list[float]]] = {}
    for step in steps:
        for name, value in by_step[step].items():
            if name not in _NOT_SERIES and is_number(value):
                points.setdefault(one_line(_MIDDLE.sub("_middle", name)), []).append([100 * step / total, value])
    series = {name: np.array(points[name], np.float64) for name in sorted(points)}
    return series, np.array([step for step in steps if is_number(by_step[step].get("tau_base"))])


def _add(metrics: dict[str, Metric], notes: list[str], name: str, entry: Any, source: str) -> None:
    score, name, source = Score.of(entry), one_line(name), one_line(source)
    if score is not None and name not in metrics:
        thirds = {third: Score.of(_of_third(entry, third)) for third in THIRDS} if isinstance(entry, dict) else {}
        metrics[name] = Metric(score, {third: each for third, each in thirds.items() if each is not None}, source)
    elif diverged(entry):
        notes.append(f"{source}: {name} is not a finite number and was left out")


def _evaluated(run: RunFolder) -> dict[str, Metric]:
    """By ``mmts eval``."""
    metrics: dict[str, Metric] = {}
    evaluations = [path for place in run.places for path in sorted(place.glob("mmts_eval*.json"))]
    for path in evaluations:
        try:
            with reading(path.name, "not a result of mmts eval", ConfigError):
                items = list(json.loads(path.read_text(encoding="utf-8"))["metrics"].items())
        except ConfigError as error:
            run.notes.append(f"{error}; left out")
            continue
        prefix = f"{path.stem.replace('mmts_eval', '').strip('_-') or 'eval'}: " if len(evaluations) > 1 else ""
        for name, entry in items:
            _add(metrics, run.notes, prefix + name, entry, path.name)
    return metrics


def _of_third(entry: dict[str, Any], third: str) -> Any:
    return entry.get(third, entry.get("mid") if third == "middle" else None)
