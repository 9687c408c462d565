"""Reading a training run's folder, of any host: what it was told, what it logged, what it scored.

Tolerant by design: a run may have been killed, may have been trained without us, or may lack any of its files. What
cannot be read becomes a note for the reader of the report, never a guess. All text that comes out is printable and on
one line, and all numbers are finite, whatever the files hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from .._files import PathLike
from ..config import THIRDS
from ..errors import ConfigError, cause, one_line, reading, shown
from ..record import FILE_NAME, LOG_NAME, read_record

if TYPE_CHECKING:
    from typing import TypeGuard

_OPENCLIP_LINE = re.compile(
    r"Train Epoch: (\d{1,9}) \[.*?\((\d{1,3})%\)\].*?Logit Scale: ([\d.einaf+-]+).* Loss: ([\d.einaf+-]+) \(", re.ASCII
)
_LONGEST_LINE = 10_000  # of a host's log; a longer one is not its progress, and would keep the pattern busy
_LARGEST = 1e30  # no loss, temperature or metric is larger, and plots can still draw it
_LAST_STEP = 2**53
_NOT_SERIES = ("step", "total_steps", "epoch", "phase")


class Progress(NamedTuple):
    """What one line of OpenCLIP's training log says."""

    epochs: float
    logit_scale: float
    loss: float


def parse_progress(line: str) -> Optional[Progress]:
    """The progress that a line of OpenCLIP's log reports, None for any other line; it may be NaN or infinite."""
    match = _OPENCLIP_LINE.search(line) if len(line) <= _LONGEST_LINE else None
    if match is None:
        return None
    epoch, percent, scale, loss = match.groups()
    try:
        return Progress(int(epoch) + int(percent) / 100, float(scale), float(loss))
    except ValueError:  # dots and letters, but no number
        return None


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
        if not _is_number(value):
            return None
        if _is_number(low) and _is_number(high) and low <= high:
            return cls(float(value), float(low), float(high))
        return cls(float(value))


@dataclass(frozen=True)
class Metric:
    """A metric, by thirds of the concepts' frequency too where it was measured (``head``, ``mid``, ``tail``)."""

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
    with reading(given, "cannot be read as a training run", ConfigError):
        folder = given.parent if given.is_file() else given
        inside = folder.name == "checkpoints"  # OpenCLIP's, of which only older runs have our mmts.yaml inside
        for base in (folder.parent, folder) if inside else (folder, folder.parent):
            log = _read(base, given)
            if log is not None:
                return log
        found = sorted(child.name for child in folder.iterdir())[:6]
    raise ConfigError(
        f"{given}: not a training run: no {FILE_NAME}, and no log of OpenCLIP (out.log, results.jsonl) or AVION "
        f"(log.txt) in it (found: {', '.join(found) or 'nothing'})"
    )


def _read(folder: Path, given: Path) -> Optional[TrainingLog]:
    places = [folder, folder / "checkpoints"]
    notes: list[str] = []

    def find(name: str) -> Optional[Path]:
        return next((place / name for place in places if (place / name).is_file()), None)

    record_path = find(FILE_NAME)
    record = {one_line(str(name)): _single(value) for name, value in read_record(record_path).items()} if (
        record_path) else {}  # fmt: skip
    settings = _settings(_lines(find("params.txt"), notes))
    logs = [path for place in reversed(places) if (path := place / LOG_NAME).is_file()]  # the older place first
    series, steps = _scheduled(logs, record, notes)
    epochs = _epochs(_lines(find("log.txt"), notes))
    for name, values in {**epochs, **_openclip(_lines(find("out.log"), notes), settings, notes)}.items():
        if name != "learned_temperature" or not record:  # ours sets the logged scale, it is not learned
            series.setdefault(name, values)
    metrics = _metrics(places, notes)
    if not (record or series or metrics):
        return None
    name = next((part for part in reversed(folder.resolve().parts) if part != "checkpoints"), str(given))
    if not record:
        notes.insert(0, f"no {FILE_NAME}: trained without MM-TS, or by another tool")
    elif not logs:
        notes.append(f"no {LOG_NAME}: the temperatures that training logged cannot be compared with the schedule")
    if "loss" not in series:
        notes.append("no losses were found")
    if not metrics:
        notes.append("no metrics were found (mmts eval -o RUN/mmts_eval.json, or the host's own evaluation)")
    return TrainingLog(one_line(name) or "run", record, record_path, series, steps, metrics, settings, notes)


def _single(value: Any) -> Any:
    """A value of a record as it is, if it is a single one; else in a few words, for a page."""
    if value is None or isinstance(value, (bool, float, str)) or (isinstance(value, int) and abs(value) < _LARGEST):
        return value
    return shown(value)


# -- files -------------------------------------------------------------------------------------------------------------


def _lines(path: Optional[Path], notes: list[str]) -> list[str]:
    """Of a file that may be missing, of another encoding, or closed to us."""
    if path is None:
        return []
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        notes.append(f"{path.name}: cannot be read ({cause(error)}) and was left out")
        return []


def _parsed(line: str) -> Optional[dict[str, Any]]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_lines(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The objects among lines of JSON."""
    return (value for line in lines if (value := _parsed(line)) is not None)


def _logged(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a :data:`LOG_NAME`. A killed run left half a line, and its successor may have written on there."""
    bad = 0
    for line in _lines(path, notes):
        value = _parsed(line)
        if value is None and line.strip():
            bad += 1
            value = _parsed(line[start:]) if (start := line.rfind('{"step"')) > 0 else None
        if value is None:
            continue
        step = value.get("step")
        if _is_number(step) and 0 <= step <= _LAST_STEP and step == int(step):
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
    diverged = [step for step in steps if _diverged(by_step[step].get("loss"))]
    if diverged:
        notes.append(f"the loss is not a finite number from step {diverged[0]} on: the training diverged")
    totals = [by_step[steps[-1]].get("total_steps"), record.get("total_steps"), 1]
    total = max(next(total for total in totals if _is_number(total) and total > 0), steps[-1] + 1)
    points: dict[str, list[list[float]]] = {}
    for step in steps:
        for name, value in by_step[step].items():
            if name not in _NOT_SERIES and _is_number(value):
                points.setdefault(one_line(name), []).append([100 * step / total, value])
    series = {name: np.array(points[name], np.float64) for name in sorted(points)}
    return series, np.array([step for step in steps if _is_number(by_step[step].get("tau_base"))])


def _openclip(lines: Sequence[str], settings: dict[str, str], notes: list[str]) -> dict[str, np.ndarray]:
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
    diverged = [seen for seen in found if _diverged(seen.loss) or _diverged(seen.logit_scale)]
    if diverged:
        notes.append(f"the loss is not a finite number from epoch {diverged[0].epochs:g} on: the training diverged")
    values: dict[str, list[tuple[float, float]]] = {
        "loss": [(seen.epochs, seen.loss) for seen in found],
        "learned_temperature": [
            (seen.epochs, 1 / seen.logit_scale)
            for seen in found
            if _is_number(seen.logit_scale) and seen.logit_scale > 0
        ],
    }
    return {
        name: np.array([[100 * at / epochs if epochs else 100.0, value] for at, value in known])
        for name, each in values.items()
        if (known := [(at, value) for at, value in each if _is_number(value)])
    }


def _epochs(lines: Sequence[str]) -> dict[str, np.ndarray]:
    """AVION's ``log.txt``: one line of JSON for each epoch."""
    found = [line for line in _json_lines(lines) if _is_number(line.get("epoch")) and line["epoch"] >= 0]
    last = max((line["epoch"] for line in found), default=0) + 1
    losses = [[100 * (line["epoch"] + 1) / last, line["train_loss"]] for line in found
              if _is_number(line.get("train_loss"))]  # fmt: skip
    return {"loss": np.array(losses, np.float64)} if losses else {}


def _settings(lines: Sequence[str]) -> dict[str, str]:
    """OpenCLIP's ``params.txt``."""
    pairs = (line.split(": ", 1) for line in lines if ": " in line)
    return {one_line(name): one_line(value) for name, value in pairs}


def _metrics(places: Sequence[Path], notes: list[str]) -> dict[str, Metric]:
    """From ``mmts eval``, then what only the host's own evaluation says, of its last epoch."""
    metrics: dict[str, Metric] = {}

    def add(name: str, entry: Any, source: str) -> None:
        score, name, source = Score.of(entry), one_line(name), one_line(source)
        if score is not None and name not in metrics:
            thirds = {third: Score.of(entry.get(third)) for third in THIRDS} if isinstance(entry, dict) else {}
            metrics[name] = Metric(score, {third: each for third, each in thirds.items() if each is not None}, source)
        elif _diverged(entry):
            notes.append(f"{source}: {name} is not a finite number and was left out")

    evaluations = [path for place in places for path in sorted(place.glob("mmts_eval*.json"))]
    for path in evaluations:
        try:
            with reading(path.name, "not a result of mmts eval", ConfigError):
                items = list(json.loads(path.read_text(encoding="utf-8"))["metrics"].items())
        except ConfigError as error:
            notes.append(f"{error}; left out")
            continue
        prefix = f"{path.stem.replace('mmts_eval', '').strip('_-') or 'eval'}: " if len(evaluations) > 1 else ""
        for name, entry in items:
            add(prefix + name, entry, path.name)
    for place in places:
        for name, prefix in (("results.jsonl", ""), ("log.txt", "test_")):
            lines = list(_json_lines(_lines(place / name, notes))) if (place / name).is_file() else []
            for key, value in (lines[-1] if lines else {}).items():
                if key.startswith(prefix) and key not in ("epoch", "num_samples"):
                    add(key, value, name)
    return metrics


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _diverged(value: Any) -> bool:
    """Whether it was to be a number, and is NaN, infinite, or beyond all that is meant."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_number(value)
