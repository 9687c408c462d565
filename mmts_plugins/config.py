"""Flags, presets and ``mmts.yaml``: one resolved, checked configuration for a run."""

from __future__ import annotations

import argparse
import difflib
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, Optional

import yaml

from ._files import PathLike, replacing
from .errors import ConfigError
from .presets import INFONCE, MAX_MARGIN, PRESETS

logger = logging.getLogger(__name__)

LOSSES = ("mmts", INFONCE, MAX_MARGIN)
MISSING = ("error", "tail", "mean")
DISTRIBUTIONS = ("noun", "verb", "verb_noun")
CLUSTER_OF = ("segment", "caption")
KEYS = ("caption", "id")
ITM_TEMPERATURES = ("mmts", "host")
FILE_NAME = "mmts.yaml"
LOG_NAME = "mmts.jsonl"
THIRDS = ("head", "mid", "tail")
"""Of the training samples ranked by frequency, as logs and evaluations name them."""
DEFAULT_OSCILLATIONS = 5.0
SMALLEST_CALM_TEMPERATURE = 0.01  # a logit scale of 100, where CLIP clamps its own


@dataclass(frozen=True)
class Config:
    """What a run does. Every field is a flag: ``shift_min`` is ``--mmts-shift-min``.

    Exactly one of ``num_oscillations`` (full cosine periods over the run) and ``period`` (optimizer steps) is set.
    """

    loss: str
    alpha: float
    shift_min: float
    shift_max: float
    clusters: Optional[str] = None
    preset: Optional[str] = None
    num_oscillations: Optional[float] = DEFAULT_OSCILLATIONS
    period: Optional[float] = None
    no_schedule: bool = False
    no_shifts: bool = False
    missing: str = "tail"
    distribution: Optional[str] = None
    cluster_of: Optional[str] = None
    key: Optional[str] = None
    itm_temperature: Optional[str] = None
    diagnostics_every: int = 100

    def __post_init__(self) -> None:
        for name in ("alpha", "shift_min", "shift_max", "num_oscillations", "period"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{_flag(name)} is {value}: it must be a finite number")
        if self.alpha < 0:
            raise ConfigError(f"--mmts-alpha is {self.alpha}: it must be zero or above")
        if self.shift_min > self.shift_max:
            raise ConfigError(f"--mmts-shift-min {self.shift_min} is above --mmts-shift-max {self.shift_max}")
        for name in ("num_oscillations", "period"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{_flag(name)} is {value}: it must be above zero")
        if (self.num_oscillations is None) == (self.period is None):
            raise ConfigError("give either --mmts-num-oscillations or --mmts-period, not both")
        if self.diagnostics_every < 0:
            raise ConfigError(f"--mmts-diagnostics-every is {self.diagnostics_every}: it must be zero (off) or above")
        if self.clusters is None and self.distribution is None and not self.no_shifts:
            raise ConfigError(
                "--loss mmts needs the cluster table of the training captions: --mmts-clusters FILE "
                "(make it with: mmts cluster CAPTIONS -o FILE), or --mmts-no-shifts for the schedule alone"
            )
        lowest = self.lowest
        what = f"the lowest temperature of the run is {lowest:g} (shift_min {self._lowest_shift:g} - alpha/2)"
        if self.loss == INFONCE and lowest <= 0:
            raise ConfigError(f"{what}: it must stay above zero; raise --mmts-shift-min or lower --mmts-alpha")
        if self.loss == MAX_MARGIN and lowest < 0:
            raise ConfigError(
                f"{what.replace('temperature', 'margin')}: it must not be negative; "
                "raise --mmts-shift-min or lower --mmts-alpha"
            )

    @property
    def _lowest_shift(self) -> float:
        return (self.shift_min + self.shift_max) / 2 if self.no_shifts else self.shift_min

    @property
    def lowest(self) -> float:
        """The lowest temperature (or margin) that any sample can get at any step."""
        return self._lowest_shift - (0.0 if self.no_schedule else self.alpha / 2)

    @property
    def amplitude(self) -> float:
        """``alpha``, or zero under ``--mmts-no-schedule``."""
        return 0.0 if self.no_schedule else self.alpha

    def period_steps(self, total_steps: int) -> float:
        """T of Eq. 7 for a run of ``total_steps`` optimizer steps."""
        if self.period is not None:
            return self.period
        assert self.num_oscillations is not None
        return total_steps / self.num_oscillations

    def publish(self, args: Any) -> None:
        """Onto a host's parsed arguments, as plain values: into whatever it prints, saves or sends of them."""
        for name, value in vars(self).items():
            setattr(args, "loss" if name == "loss" else f"mmts_{name}", value)

    def warnings(self) -> list[str]:
        """Temperatures so low that half precision and training suffer, or values meant for the other loss."""
        found = []
        if self.loss == INFONCE and self.lowest < SMALLEST_CALM_TEMPERATURE:
            found.append(
                f"the lowest temperature of the run is {self.lowest:.4g}, a logit scale of {1 / self.lowest:.0f}; CLIP "
                "stops at 100"
            )
        if self.preset is not None and PRESETS[self.preset].loss != self.loss:
            found.append(f"preset {self.preset!r} was chosen for {PRESETS[self.preset].loss}, not {self.loss}")
        return found


def _flag(field_name: str) -> str:
    return "--loss" if field_name == "loss" else "--mmts-" + field_name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def flag_parser() -> argparse.ArgumentParser:
    """The flags, the same in every host. Never abbreviates: a host's parser may, and would swallow ours."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS, usage=argparse.SUPPRESS)
    group = parser.add_argument_group(
        "MM-TS (mmts-plugins)", "per-sample temperature and margin schedules; without --loss nothing changes"
    )
    group.add_argument(
        "--loss",
        metavar="{" + ",".join(LOSSES) + "}",
        help="schedule the contrastive loss: mmts is the host's own family (InfoNCE in OpenCLIP and VAST, max-margin "
        "in AVION)",
    )
    group.add_argument(
        "--mmts-clusters", metavar="FILE", help="cluster table of the training captions, made by: mmts cluster"
    )
    group.add_argument(
        "--mmts-preset",
        metavar="NAME",
        help=f"the paper's alpha and shifts: {', '.join(PRESETS)}; the host has a default",
    )
    group.add_argument(
        "--mmts-distribution",
        choices=DISTRIBUTIONS,
        help="AVION: the class whose count is a sample's frequency (default: noun); without --mmts-clusters it is "
        "counted in --train-metadata",
    )
    group.add_argument(
        "--mmts-cluster-of",
        choices=CLUSTER_OF,
        help="AVION: whose frequency a sample has: the video's own segment (default in fine-tuning) or the caption "
        "drawn for it (always in pre-training)",
    )
    group.add_argument("--mmts-alpha", type=float, metavar="A", help="peak-to-peak amplitude of the cosine (Eq. 7)")
    group.add_argument("--mmts-shift-min", type=float, metavar="S", help="shift of the rarest concept (Eq. 6)")
    group.add_argument("--mmts-shift-max", type=float, metavar="S", help="shift of the most common concept (Eq. 6)")
    group.add_argument(
        "--mmts-num-oscillations",
        type=float,
        metavar="N",
        help=f"full cosine periods over the run (default: {DEFAULT_OSCILLATIONS:g})",
    )
    group.add_argument(
        "--mmts-period", type=float, metavar="STEPS", help="length of a period in optimizer steps, instead of a number"
    )
    group.add_argument(
        "--mmts-config", metavar="FILE", help="a saved mmts.yaml; flags beat it, and it beats the preset"
    )
    group.add_argument("--mmts-no-schedule", action="store_true", help="ablation: shifts only (the paper's ICS)")
    group.add_argument(
        "--mmts-no-shifts", action="store_true", help="ablation: schedule only (the paper's TS), at the mid shift"
    )
    group.add_argument(
        "--mmts-missing",
        choices=MISSING,
        help="what a caption absent from the table gets: the tail's shift (default), the mean shift, or an error",
    )
    group.add_argument(
        "--mmts-diagnostics-every",
        type=int,
        metavar="STEPS",
        help="how often to measure losses of head, middle and tail, alignment, uniformity, equilibrium and modality "
        "gap (default: 100; 0: never)",
    )
    group.add_argument(
        "--mmts-key",
        choices=KEYS,
        help="VAST: what the keys of --mmts-clusters are, captions (default) or clip ids (for classes or visual "
        "features of each clip)",
    )
    group.add_argument(
        "--mmts-itm-temperature",
        choices=ITM_TEMPERATURES,
        help="VAST: the temperature that draws hard negatives for the matching head: each row's own (default with "
        "InfoNCE), or the host's",
    )
    group.add_argument(
        "--mmts-allow-config-change",
        action="store_true",
        help="on resume, go on although mmts.yaml beside the checkpoint differs",
    )
    return parser


def split_flags(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take our flags out of a command line.

    Returns:
        The flags given (``loss``, ``mmts_alpha``, ...; only those present), and what is left for the host.

    Raises:
        ConfigError: a value of the wrong type, or a misspelt ``--mmts-*`` flag.
    """
    parser = flag_parser()
    given, rest = parser.parse_known_args(list(argv))
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in rest:
        name = argument.split("=")[0]
        if name.startswith("--mmts"):
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"unknown flag {name}" + (f"; did you mean {close[0]}?" if close else f"; known: {known}")
            )
    return vars(given), rest


def resolve(
    flags: dict[str, Any], family: str, default_presets: dict[str, str], defaults: Optional[dict[str, Any]] = None
) -> Config:
    """Flags over the config file over the preset, checked; what :meth:`Config.warnings` finds is logged.

    Args:
        flags: from :func:`split_flags`.
        family: what ``--loss mmts`` means in this host, ``mmts-infonce`` or ``mmts-max-margin``.
        default_presets: for each of the two losses, the preset of a run that names none.
        defaults: of other fields, where this host's differ from :class:`Config`'s. A field that only some hosts know
            must be among them.

    Raises:
        ConfigError: naming the flag or the field of the file.
    """
    config = Config(**merge(flags, family, default_presets, defaults))
    for warning in config.warnings():
        logger.warning("MM-TS: %s", warning)
    return config


def merge(
    flags: dict[str, Any], family: str, default_presets: dict[str, str], defaults: Optional[dict[str, Any]] = None
) -> dict[str, Any]:
    """The fields of the :class:`Config` that :func:`resolve` makes, before it is made (and so before its guards).

    Raises:
        ConfigError: naming the flag or the field of the file.
    """
    values: dict[str, Any] = load_file(flags["mmts_config"]) if "mmts_config" in flags else {}
    given = {name.replace("mmts_", "", 1): value for name, value in flags.items()}
    if "period" in given and "num_oscillations" in given:
        raise ConfigError("give either --mmts-num-oscillations or --mmts-period, not both")
    for one, other in (("period", "num_oscillations"), ("num_oscillations", "period")):
        if one in given:
            values.pop(other, None)
    if "preset" in given and {"alpha", "shift_min", "shift_max"} & set(values):
        logger.warning("MM-TS: %s sets its own alpha and shifts; they beat --mmts-preset", flags["mmts_config"])
    values.update({name: given[name] for name in given if name in {f.name for f in fields(Config)}})
    loss = values.get("loss")
    if loss is None:
        raise ConfigError(f"--mmts-* flags are given but not --loss; choose from {', '.join(LOSSES)}")
    if loss not in LOSSES:
        raise ConfigError(f"unknown --loss {loss!r}; choose from {', '.join(LOSSES)}")
    values["loss"] = loss = family if loss == "mmts" else loss
    preset = values.setdefault("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"unknown --mmts-preset {preset!r}; choose from {', '.join(PRESETS)}")
    for name in ("key", "itm_temperature"):
        if values.get(name) is not None and name not in (defaults or {}):
            raise ConfigError(f"{_flag(name)} is for VAST and means nothing in this host; leave it out")
    base = PRESETS[preset or default_presets[loss]]
    if preset is None and not {"alpha", "shift_min", "shift_max"} & set(values):
        values["preset"] = default_presets[loss]
    for name in ("alpha", "shift_min", "shift_max"):
        values.setdefault(name, getattr(base, name))
    if values.get("period") is not None:
        values["num_oscillations"] = None
    for name, host in _ONE_HOSTS.items():
        if values.get(name) is not None and name not in (defaults or {}):
            raise ConfigError(f"{_flag(name)} is for {host}, and means nothing here; leave it out")
    for name, default in (defaults or {}).items():
        if values.get(name) is None:
            values[name] = default
    return values


_ONE_HOSTS = {"distribution": "AVION", "cluster_of": "AVION", "key": "VAST", "itm_temperature": "VAST"}
_NUMBERS = {"alpha", "shift_min", "shift_max", "num_oscillations", "period", "diagnostics_every"}
_FLAGS = {"no_schedule", "no_shifts"}
_CHOICES = {
    "missing": MISSING,
    "distribution": DISTRIBUTIONS,
    "cluster_of": CLUSTER_OF,
    "key": KEYS,
    "itm_temperature": ITM_TEMPERATURES,
}


def load_file(path: PathLike) -> dict[str, Any]:
    """The fields of :class:`Config` that a saved ``mmts.yaml`` sets.

    Raises:
        ConfigError: unreadable, or a field that does not exist or has the wrong type.
    """
    record = read_record(path)
    names = {f.name for f in fields(Config)}
    values = {}
    for name, value in record.items():
        if name in names:
            if value is not None and (
                (name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, (int, float))))
                or (name in _FLAGS and not isinstance(value, bool))
                or (name not in _NUMBERS | _FLAGS and not isinstance(value, str))
            ):
                raise ConfigError(f"{path}: field {name!r} has the wrong type: {value!r}")
            optional = (None,) if name != "missing" else ()
            if name in _CHOICES and value not in (*_CHOICES[name], *optional):
                raise ConfigError(f"{path}: field {name!r} is {value!r}; choose from {', '.join(_CHOICES[name])}")
            values[name] = value
        elif name not in RECORDED:
            close = difflib.get_close_matches(name, sorted(names), n=1)
            raise ConfigError(f"{path}: unknown field {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if values.get("num_oscillations") is not None:
        values.pop("period", None)  # a record holds the period that the oscillations came to in its own run
    return values


RECORDED = ("total_steps", "table_hash", "host", "host_version", "mmts_plugins")
_NOT_COMPARED = ("clusters", "preset", "num_oscillations", "total_steps", "diagnostics_every", "mmts_plugins")


def record(config: Config, total_steps: int, table_hash: Optional[str], host: str, host_version: str) -> dict[str, Any]:
    """What is written as ``mmts.yaml`` beside the checkpoints: the config, its period in steps, and its sources."""
    from . import __version__

    return {
        **asdict(config),
        "period": config.period_steps(total_steps),
        "total_steps": total_steps,
        "table_hash": table_hash,
        "host": host,
        "host_version": host_version,
        "mmts_plugins": __version__,
    }


def write_record(path: PathLike, values: dict[str, Any]) -> None:
    """Write ``mmts.yaml``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(
            "# written by mmts-plugins; compared on resume\n" + yaml.safe_dump(values, sort_keys=False)
        )


def read_record(path: PathLike) -> dict[str, Any]:
    """Read an ``mmts.yaml``.

    Raises:
        ConfigError: it cannot be read or is not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot read the MM-TS config: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not an MM-TS config (expected fields such as 'alpha: 0.04')")
    return values


def check_resume(saved_path: PathLike, values: dict[str, Any], allow_change: bool, source: str = "") -> None:
    """Compare this run's record with the one of the checkpoint it resumes; ``source`` is where a copy came from.

    Raises:
        ConfigError: naming every field that differs, unless ``allow_change``.
    """
    if not Path(saved_path).exists():
        problem = f"{source or saved_path} does not exist: the checkpoint was not trained with MM-TS"
    else:
        saved = read_record(saved_path)
        different = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in values.items()
            if name not in _NOT_COMPARED and saved.get(name) != value
        ]
        if not different:
            return
        problem = f"{source or saved_path}: the resumed run differs: " + "; ".join(different)
    if not allow_change:
        raise ConfigError(problem + ". Go on anyway with --mmts-allow-config-change")
    logger.warning("MM-TS: %s (allowed by --mmts-allow-config-change)", problem)
