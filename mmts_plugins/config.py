"""Flags, files and presets resolved to one checked configuration of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Optional, cast

from . import losses
from .errors import ConfigError, shown
from .fields import Field
from .losses import LossKind
from .options import COMMON, CONFIG_FILE, DEFAULT_OSCILLATIONS, Option, field_of, flag_of, flag_parser, split_flags
from .presets import presets
from .schedule import CosineSchedule

if TYPE_CHECKING:
    from .hosts.adapter import Adapter

__all__ = ["THIRDS", "Config", "flag_parser", "merge", "split_flags"]

logger = logging.getLogger(__name__)

THIRDS = ("head", "middle", "tail")
"""Of the training samples ranked by frequency, as logs and evaluations name them."""
SMALLEST_CALM_TEMPERATURE = 0.01  # a logit scale of 100, where CLIP clamps its own
SHIFTS = ("alpha", "shift_min", "shift_max")
"""What a preset sets."""


@dataclass(frozen=True)
class Config:
    """What a run does. Every field is a flag: ``shift_min`` is ``--mmts-shift-min``.

    Exactly one of ``num_oscillations`` (full cosine periods over the run) and ``period`` (optimizer steps) is set.
    ``own`` holds the fields that only some hosts know.
    """

    loss: str
    alpha: float
    shift_min: float
    shift_max: float
    clusters: Optional[str] = None
    preset: Optional[str] = None
    num_oscillations: Optional[float] = DEFAULT_OSCILLATIONS
    period: Optional[float] = None
    start_phase: float = 0.0
    no_schedule: bool = False
    no_shifts: bool = False
    mean_matched: bool = False
    shuffle_shifts: Optional[int] = None
    missing: str = "tail"
    diagnostics_every: int = 100
    own: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in of_options(COMMON).items():
            object.__setattr__(self, name, known.check(flag_of(name), getattr(self, name)))
        if self.loss == "mmts":
            raise ConfigError(
                f"--loss is 'mmts', which each host reads as one of {', '.join(losses.names())}: say which"
            )
        kind = self.kind
        if self.shift_min > self.shift_max:
            raise ConfigError(f"--mmts-shift-min {self.shift_min} is above --mmts-shift-max {self.shift_max}")
        if (self.num_oscillations is None) == (self.period is None):
            raise ConfigError("give either --mmts-num-oscillations or --mmts-period, not both and not neither")
        if self.mean_matched and not self.no_shifts:
            raise ConfigError("--mmts-mean-matched says which shift all samples get: it goes with --mmts-no-shifts")
        if self.shuffle_shifts is not None and self.no_shifts:
            raise ConfigError("--mmts-shuffle-shifts: --mmts-no-shifts leaves no shifts to shuffle; drop one of them")
        if kind.forbids(self.lowest):
            must = "must not be negative" if kind.is_margin else "must stay above zero"
            raise ConfigError(
                f"the lowest {kind.number} of the run is {self.lowest:g} (shift_min {self._lowest_shift:g} - alpha/2): "
                f"it {must}; raise --mmts-shift-min or lower --mmts-alpha"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """From all fields in one mapping, :attr:`own` ones among them."""
        common = {each.name for each in COMMON}
        own = {name: value for name, value in values.items() if name not in common}
        return cls(**{name: value for name, value in values.items() if name in common}, own=own)

    @property
    def kind(self) -> LossKind:
        return losses.kind(self.loss)

    @property
    def values(self) -> dict[str, Any]:
        """All fields in one mapping."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "own"} | dict(self.own)

    @property
    def _lowest_shift(self) -> float:
        if self.no_shifts and not self.mean_matched:
            return (self.shift_min + self.shift_max) / 2
        return self.shift_min  # the table's mean, which is not known here, is not below it

    @property
    def reads_table(self) -> bool:
        """Whether any temperature depends on the table."""
        return not self.no_shifts or self.mean_matched

    @property
    def lowest(self) -> float:
        """The lowest temperature (or margin) that any sample can get at any step."""
        return self._lowest_shift - (0.0 if self.no_schedule else self.alpha / 2)

    @property
    def amplitude(self) -> float:
        """``alpha``, or zero under ``--mmts-no-schedule``."""
        return 0.0 if self.no_schedule else self.alpha

    def schedule(self, total_steps: int) -> CosineSchedule:
        """Eq. 7 for a run of ``total_steps`` optimizer steps."""
        return CosineSchedule(self.amplitude, self.period_steps(total_steps), self.start_phase)

    def period_steps(self, total_steps: int) -> float:
        """T of Eq. 7 for a run of ``total_steps`` optimizer steps."""
        if self.num_oscillations is not None:
            return total_steps / self.num_oscillations
        return cast(float, self.period)  # exactly one of them is set

    def publish(self, args: Any) -> None:
        """Onto a host's parsed arguments, as plain values: into whatever it prints, saves or sends of them."""
        for name, value in self.values.items():
            setattr(args, "loss" if name == "loss" else f"mmts_{name}", value)

    def warnings(self) -> list[str]:
        """Temperatures so low that half precision and training suffer, or values meant for another kind of loss."""
        found = []
        if not self.kind.is_margin and self.lowest < SMALLEST_CALM_TEMPERATURE:
            found.append(
                f"the lowest temperature of the run is {self.lowest:.4g}, a logit scale of {1 / self.lowest:.0f}; CLIP "
                "stops at 100"
            )
        if self.preset is not None:
            meant = presets()[self.preset].loss
            if losses.kind(meant).number != self.kind.number:
                found.append(f"preset {self.preset} was chosen for {meant}, not {self.loss}")
        return found


def check_preset(name: str) -> None:
    """Raise :class:`ConfigError` where no host has a preset of this name."""
    if name not in presets():
        raise ConfigError(f"unknown --mmts-preset {shown(name)}; choose from {', '.join(presets())}")


def merge(flags: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Flags over the config file over the preset over the host's defaults: the fields of a :class:`Config`, before it
    is made (and so before its guards).

    Args:
        flags: from :func:`split_flags`.
        adapter: of the host.

    Raises:
        ConfigError: naming the flag or the field of the file.
    """
    from .record import load_file

    known = {option.name: option for option in (*COMMON, *adapter.options)}
    values: dict[str, Any] = load_file(flags[CONFIG_FILE], adapter.options) if CONFIG_FILE in flags else {}
    given = {field_of(name): value for name, value in flags.items()}
    if "period" in given and "num_oscillations" in given:
        raise ConfigError("give either --mmts-num-oscillations or --mmts-period, not both")
    for one, other in (("period", "num_oscillations"), ("num_oscillations", "period")):
        if one in given:
            values.pop(other, None)
    if "preset" in given and set(SHIFTS) & set(values):
        logger.warning("MM-TS: %s sets its own alpha and shifts; they beat --mmts-preset", flags[CONFIG_FILE])
    values.update({name: known[name].check(value) for name, value in given.items() if name in known})
    _refuse_foreign({**values, **given}, adapter)
    loss = values.get("loss")
    if loss is None:
        raise ConfigError(f"--mmts-* flags are given but not --loss; choose from {', '.join(losses.choices())}")
    if loss not in losses.choices():
        hint = f" ({adapter.loss_hint})" if adapter.loss_hint else ""
        raise ConfigError(f"unknown --loss {shown(loss)}; choose from {', '.join(losses.choices())}{hint}")
    values["loss"] = loss = adapter.loss if loss == "mmts" else losses.kind(loss).name
    preset = values.setdefault("preset", None)
    if preset is not None:
        check_preset(preset)
    default = adapter.default_preset(loss)
    base = presets()[preset or default]
    if preset is None and not set(SHIFTS) & set(values):
        values["preset"] = default
    for name in SHIFTS:
        values.setdefault(name, getattr(base, name))
    if values.get("period") is not None:
        values["num_oscillations"] = None
    for name in (*(option.name for option in adapter.options), *adapter.defaults):
        if values.get(name) is None:
            values[name] = adapter.defaults.get(name)
    return values


def _refuse_foreign(values: Mapping[str, Any], adapter: Adapter) -> None:
    from .hosts.registry import owned_options

    own = {option.name for option in (*COMMON, *adapter.options)}
    for name, (owner, option) in owned_options().items():
        if name not in own and values.get(name) is not None:
            raise ConfigError(f"{option.flag} is for {owner.title}, and means nothing here; leave it out")


def of_options(options: Sequence[Option]) -> dict[str, Field]:
    """What fields may be, by name, as :func:`mmts_plugins.fields.check_mapping` takes it."""
    found = {option.name: option.field for option in options}
    for name, known in (("loss", losses.choices()), ("preset", tuple(presets()))):
        if name in found:
            found[name] = replace(found[name], choices=known)
    return found
