"""Reading a training run's folder, of any host: what it was told, what it logged, what it scored.

Tolerant by design: a run may have been killed, may have been trained without us, or may lack any of its files. What
cannot be read becomes a note for the reader of the report, never a guess.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from .._files import PathLike
from ..config import FILE_NAME, LOG_NAME, THIRDS, read_record
from ..errors import ConfigError

if TYPE_CHECKING:
    from typing import TypeGuard

_OPENCLIP_LINE = re.compile(r"Train Epoch: (\d+) \[.*?\((\d+)%\)\].*?Logit Scale: ([\d.]+).* Loss: ([\d.naif-]+) \(")
_NOT_SERIES = ("step", "total_steps", "epoch", "phase")


class Progress(NamedTuple):
    """What one line of OpenCLIP's training log says."""

    epochs: float
    logit_scale: float
    loss: float


def parse_progress(line: str) -> Optional[Progress]:
    """The progress that a line of OpenCLIP's log reports, or None for any other line."""
    match = _OPENCLIP_LINE.search(line)
    if match is None:
        return None
    epoch, percent, scale, loss = match.groups()
    return Progress(int(epoch) + int(percent) / 100, float(scale), float(loss))


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
        return cls(float(value), *((float(low), float(high)) if _is_number(low) and _is_number(high) else ()))


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
        record: the content of ``mmts.yaml``; empty for a run without us.
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
        return f"{self.record.get('host', 'unknown')} {self.record.get('host_version') or ''}".strip()


def read_run(path: PathLike) -> TrainingLog:
    """Read a run: the folder that holds ``mmts.yaml``, or the one above or below it.

    Raises:
        ConfigError: nothing in there is a run's, or its ``mmts.yaml`` is damaged.
    """
    given = Path(path)
    folder = given.parent if given.is_file() else given
    inside = folder.name == "checkpoints"  # OpenCLIP's, with our mmts.yaml but without its logs
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
    record = read_record(record_path) if record_path else {}
    settings = _settings(find("params.txt"))
    series, steps = _scheduled(find(LOG_NAME), record, notes)
    for name, values in {**_epochs(find("log.txt")), **_openclip(find("out.log"), settings)}.items():
        if name != "learned_temperature" or not record:  # ours sets the logged scale, it is not learned
            series.setdefault(name, values)
    metrics = _metrics(places, notes)
    if not (record or series or metrics):
        return None
    name = next((part for part in reversed(folder.resolve().parts) if part != "checkpoints"), str(given))
    if not record:
        notes.insert(0, f"no {FILE_NAME}: trained without MM-TS, or by another tool")
    elif find(LOG_NAME) is None:
        notes.append(f"no {LOG_NAME}: the temperatures that training logged cannot be compared with the schedule")
    if "loss" not in series:
        notes.append("no losses were found")
    if not metrics:
        notes.append("no metrics were found (mmts eval -o RUN/mmts_eval.json, or the host's own evaluation)")
    return TrainingLog(name, record, record_path, series, steps, metrics, settings, notes)


# -- files -------------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, notes: Optional[list[str]] = None) -> Iterator[dict[str, Any]]:
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            yield value
        elif line.strip():
            bad += 1
    if bad and notes is not None:
        notes.append(f"{path.name}: {bad} line(s) could not be read and were left out")


def _scheduled(path: Optional[Path], record: dict[str, Any], notes: list[str]) -> tuple[dict[str, np.ndarray], Any]:
    """Ours, from :data:`LOG_NAME`. A step may have several lines; of the same value the later counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in _json_lines(path, notes) if path else ():
        if _is_number(line.get("step")):
            by_step.setdefault(int(line["step"]), {}).update(line)
    if not by_step:
        return {}, np.empty(0)
    steps = sorted(by_step)
    diverged = [step for step in steps if isinstance(by_step[step].get("loss"), float)
                and not math.isfinite(by_step[step]["loss"])]  # fmt: skip
    if diverged:
        notes.append(f"the loss is not a finite number from step {diverged[0]} on: the training diverged")
    totals = [by_step[steps[-1]].get("total_steps"), record.get("total_steps"), steps[-1] + 1]
    total = next(total for total in totals if _is_number(total) and total > 0)
    series = {}
    for name in sorted({name for line in by_step.values() for name in line} - set(_NOT_SERIES)):
        known = [step for step in steps if _is_number(by_step[step].get(name))]
        if known:
            series[name] = np.array([[100 * step / total, by_step[step][name]] for step in known])
    return series, np.array([step for step in steps if _is_number(by_step[step].get("tau_base"))])


def _openclip(path: Optional[Path], settings: dict[str, str]) -> dict[str, np.ndarray]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path else []
    found = [seen for line in lines if (seen := parse_progress(line)) is not None]
    if not found:
        return {}
    epochs = max(found[-1].epochs, float(settings.get("epochs", 0) if settings.get("epochs", "").isdigit() else 0))
    share = [100 * seen.epochs / epochs if epochs else 100.0 for seen in found]
    return {
        "loss": np.array([share, [seen.loss for seen in found]]).T,
        "learned_temperature": np.array([share, [1 / seen.logit_scale for seen in found]]).T,
    }


def _epochs(path: Optional[Path]) -> dict[str, np.ndarray]:
    """AVION's ``log.txt``: one line of JSON for each epoch."""
    lines = [line for line in _json_lines(path) if _is_number(line.get("epoch"))] if path else []
    last = max((line["epoch"] for line in lines), default=0) + 1
    losses = [[100 * (line["epoch"] + 1) / last, line["train_loss"]] for line in lines
              if _is_number(line.get("train_loss"))]  # fmt: skip
    return {"loss": np.array(losses)} if losses else {}


def _settings(path: Optional[Path]) -> dict[str, str]:
    """OpenCLIP's ``params.txt``."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path else []
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def _metrics(places: Sequence[Path], notes: list[str]) -> dict[str, Metric]:
    """From ``mmts eval``, then what only the host's own evaluation says, of its last epoch."""
    metrics: dict[str, Metric] = {}

    def add(name: str, entry: Any, source: str) -> None:
        score = Score.of(entry)
        if score is not None and name not in metrics:
            thirds = {third: Score.of(entry.get(third)) for third in THIRDS} if isinstance(entry, dict) else {}
            metrics[name] = Metric(score, {third: each for third, each in thirds.items() if each is not None}, source)

    evaluations = [path for place in places for path in sorted(place.glob("mmts_eval*.json"))]
    for path in evaluations:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))["metrics"]
            items = list(values.items())
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            notes.append(f"{path.name}: not a result of mmts eval ({type(error).__name__}: {error}); left out")
            continue
        prefix = f"{path.stem.replace('mmts_eval', '').strip('_-') or 'eval'}: " if len(evaluations) > 1 else ""
        for name, entry in items:
            add(prefix + name, entry, path.name)
    for place in places:
        for name, prefix in (("results.jsonl", ""), ("log.txt", "test_")):
            lines = list(_json_lines(place / name)) if (place / name).is_file() else []
            for key, value in (lines[-1] if lines else {}).items():
                if key.startswith(prefix) and key not in ("epoch", "num_samples"):
                    add(key, value, name)
    return metrics


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
