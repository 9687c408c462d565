"""Where a run's temperatures will go, before it runs: the shifts of its table's thirds, the extremes in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from . import losses
from ._files import PathLike
from .config import Config
from .data.classes import load_table
from .errors import ConfigError, TableError, shown
from .losses import LossKind
from .presets import presets
from .record import says_something
from .schedule import CosineSchedule
from .tables import CAPTION, ClusterTable, Table, cluster_shift
from .temperature import mean_shift

if TYPE_CHECKING:
    from .hosts.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Preview:
    """A schedule and the shifts it meets. Unlike :class:`Config` it may break a guard: plots show where.

    Attributes:
        values: fields of :class:`Config`, such as :func:`mmts_plugins.config.merge` returns.
        total_steps: optimizer steps of the run, at least 1.
        table: of the run, shuffled where it is to be; ``None`` where it is not known.
        name: for labels.

    Raises:
        ConfigError: ``total_steps`` is below 1, or the amplitude or the period cannot be used.
    """

    values: dict[str, Any]
    total_steps: int
    table: Optional[Table] = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ConfigError(f"--total-steps is {self.total_steps}: a run has at least one optimizer step")
        _ = self.schedule

    @classmethod
    def of_preset(cls, name: str, total_steps: int, table: Optional[Table] = None, **changes: float) -> Preview:
        """A preset of the paper with some of its values changed.

        Raises:
            ConfigError: there is no such preset.
        """
        known = presets()
        if name not in known:
            raise ConfigError(f"unknown preset {shown(name)}; choose from {', '.join(known)}")
        return cls({**known[name]._asdict(), "preset": name, **changes}, total_steps, table, name)

    @cached_property
    def schedule(self) -> CosineSchedule:
        """Eq. 7 of this run."""
        values = self._all
        amplitude = 0.0 if values["no_schedule"] else values["alpha"]
        period = values["period"]
        if period is None:
            period = self.total_steps / values["num_oscillations"]
        return CosineSchedule(amplitude, period, values["start_phase"])

    @property
    def kind(self) -> LossKind:
        """The loss that it schedules."""
        return losses.kind(self.values["loss"])

    @cached_property
    def shifts(self) -> dict[str, float]:
        """Shifts from the lowest to the highest, by what they belong to.

        With a table: of its rarest key, of the tail, middle and head third of its training samples (means), and of its
        most common key. Without one: of the rarest, the middling and the most common concept. Under
        ``--mmts-no-shifts``: of all.
        """
        low, high = self.values["shift_min"], self.values["shift_max"]
        if self._all["mean_matched"]:
            if self.table is None:
                raise ConfigError("mean_matched: which shift all samples have is not known without the table")
            return {"all": mean_shift(self.table, low, high)}
        if self._all["no_shifts"]:
            return {"all": (low + high) / 2}
        if self.table is None:
            return {"rarest": low, "middle": (low + high) / 2, "most common": high}
        about = self.table.summary
        frequencies = np.array([about.low, about.tail, about.middle, about.head, about.high])
        shifts = cluster_shift(frequencies, low, high).tolist()
        return dict(zip(("rarest", "tail", "middle", "head", "most common"), shifts))

    @cached_property
    def extremes(self) -> dict[str, int]:
        """Steps: the first, the deepest, the highest after it, and the last."""
        # Rounded, so that of equal extremes the first is taken and not the luckiest in its last bit.
        base = self.base(np.arange(self.total_steps)).round(9)
        trough = int(base.argmin())
        return {"start": 0, "trough": trough, "peak": trough + int(base[trough:].argmax()), "end": self.total_steps - 1}

    def base(self, steps: np.ndarray) -> np.ndarray:
        """``tau_base`` of Eq. 7 at many steps."""
        return self.schedule.alpha * np.cos(2.0 * np.pi * (steps / self.schedule.period + self.schedule.start)) / 2.0

    @property
    def problem(self) -> Optional[str]:
        """The guard that these values break, as a run would say it at its start; ``None`` where it would start."""
        try:
            Config.of(self._all)
        except ConfigError as error:
            return str(error)
        return None

    @cached_property
    def _all(self) -> dict[str, Any]:
        values = {field.name: field.default for field in fields(Config) if field.default is not MISSING} | self.values
        if self.values.get("period") is not None:
            values["num_oscillations"] = None
        return values


def read_table(path: PathLike) -> ClusterTable:
    """A cluster table, or the ``class_id,count`` CSV that some hosts take in its place.

    Raises:
        TableError: it cannot be read as what its name says.
    """
    return load_table(str(path))


def named_table(record: dict[str, Any], beside: PathLike) -> tuple[Optional[ClusterTable], str]:
    """The table of a run from its ``mmts.yaml``.

    Args:
        record: the file's content.
        beside: the file; the table's path is tried from the current folder, and from this file's folder upwards.

    Returns:
        The table and nothing, or ``None`` and why it is not there. A table whose content is not what the run recorded
        is not taken.
    """
    name = record.get("clusters")
    if record.get("no_shifts") and not record.get("mean_matched"):
        return None, "the run uses no shifts"
    if name is None:
        return None, "the run counted its classes in its own annotation file"
    folders = [Path(), *Path(beside).resolve().parents][:5]
    found = next((path for folder in folders if (path := folder / name).exists()), None)
    if found is None:
        return None, f"{name} is not found from here"
    seed = record.get("shuffle_shifts")
    try:
        table = read_table(found)
        if record.get("table_hash") is not None and not table.has_hash(record["table_hash"]):
            return None, f"{found} has another content hash than the run's table ({record['table_hash']})"
        return table if seed is None else table.shuffled(seed), ""
    except TableError as error:
        return None, str(error)


def adapter_of(host: str) -> Adapter:
    """The conventions of a host.

    Raises:
        ConfigError: there is no such host; those that are known are named.
    """
    from .hosts.registry import adapters

    known = {adapter.name: adapter for adapter in adapters()}
    if host not in known:
        raise ConfigError(f"--host {shown(host)} has no adapter; choose from {', '.join(sorted(known))}")
    return known[host]


def describe(preview: Preview, adapter: Adapter) -> str:
    """What ``mmts schedule`` prints: the configuration, the table, and the temperatures at the extremes."""
    return "\n".join([*_facts(preview, adapter), "", *_temperatures(preview)])


def _facts(preview: Preview, adapter: Adapter) -> list[str]:
    table = preview.table
    elsewhere = ("clusters", "num_oscillations", "period")
    facts = [("host", adapter.name)]
    facts += [
        (name, _shown(value))
        for name, value in preview.values.items()
        if name not in elsewhere and says_something(name, value)
    ]
    if table is not None:
        things = "captions" if table.kind == CAPTION else "classes"
        facts += [
            ("clusters", table.source),
            ("", f"{len(table):,} {things} in {table.clusters:,} clusters, {table.samples:,} samples"),
            ("", f"frequency {table.summary.low:g} to {table.summary.high:g}, hash {table.content_hash}"),
        ]
    elif not preview.values["no_shifts"]:
        given = preview.values.get("clusters")
        counted = f"counted in the run's {adapter.counted_in}; give it here too to see the thirds"
        facts.append(("clusters", f"{given}, not looked at" if given else counted))
    steps, period = preview.total_steps, preview.schedule.period
    if preview.schedule.alpha:
        facts.append(("period", f"{period:g} steps: {steps / period:g} periods over {steps:,} steps"))
    else:
        facts.append(("period", f"none: the schedule is flat over {steps:,} steps"))
    width = max(len(name) for name, _ in facts)
    return [f"{name:<{width}}  {value}" for name, value in facts]


def _temperatures(preview: Preview) -> list[str]:
    names = list(preview.shifts)
    head = [preview.kind.number, "step", "base", *names]
    rows: list[Sequence[str]] = [head]
    for name, step in preview.extremes.items():
        base = preview.schedule.offset(step)
        rows.append([name, f"{step:,}", f"{base:+.4f}", *(f"{base + preview.shifts[each]:.4f}" for each in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    ]


def _shown(value: Any) -> str:
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
