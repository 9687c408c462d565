"""Flags, presets and ``mmts.yaml``: one resolved, checked configuration for a run."""

from __future__ import annotations

import argparse
import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

import yaml

from ._files import PathLike, replacing, writing
from ._startup import means_us
from .errors import ConfigError, one_line, reading, shown
from .fields import NUMBER, SWITCH, TEXT, WHOLE, Field, check_mapping
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


_HIGHEST = 1e4  # of temperatures and margins: far above any that trains, and their sums stay exact
_TURNS = Field(NUMBER, null=True, above=0, least=1e-6, most=1e12)  # neither a step over T nor T overflows
FIELDS = {
    "loss": Field(TEXT, choices=LOSSES),
    "alpha": Field(NUMBER, least=0, most=_HIGHEST),
    "shift_min": Field(NUMBER, least=-_HIGHEST, most=_HIGHEST),
    "shift_max": Field(NUMBER, least=-_HIGHEST, most=_HIGHEST),
    "clusters": Field(TEXT, null=True),
    "preset": Field(TEXT, null=True, choices=tuple(PRESETS)),
    "num_oscillations": _TURNS,
    "period": _TURNS,
    "no_schedule": Field(SWITCH),
    "no_shifts": Field(SWITCH),
    "missing": Field(TEXT, choices=MISSING),
    "distribution": Field(TEXT, null=True, choices=DISTRIBUTIONS),
    "cluster_of": Field(TEXT, null=True, choices=CLUSTER_OF),
    "key": Field(TEXT, null=True, choices=KEYS),
    "itm_temperature": Field(TEXT, null=True, choices=ITM_TEMPERATURES),
    "diagnostics_every": Field(WHOLE, least=0),
}
"""What each field of :class:`Config` may be, as a flag, in ``mmts.yaml`` and in Python."""


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
        for name, field in FIELDS.items():
            object.__setattr__(self, name, field.check(_flag(name), getattr(self, name)))
        if self.loss == "mmts":
            raise ConfigError(f"--loss is 'mmts', which each host reads as {INFONCE} or {MAX_MARGIN}: say which")
        if self.shift_min > self.shift_max:
            raise ConfigError(f"--mmts-shift-min {self.shift_min} is above --mmts-shift-max {self.shift_max}")
        if (self.num_oscillations is None) == (self.period is None):
            raise ConfigError("give either --mmts-num-oscillations or --mmts-period, not both and not neither")
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
            found.append(f"preset {self.preset} was chosen for {PRESETS[self.preset].loss}, not {self.loss}")
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
        ConfigError: a value of the wrong type, a misspelt ``--mmts-*`` flag, or two losses of which one is ours.
    """
    known = {name: action for action in flag_parser()._actions for name in action.option_strings}
    flags: dict[str, Any] = {}
    losses: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--":  # what follows are no flags, to us as to the host
            rest += [word, *words]
            break
        if name not in known:
            if name.startswith("--mmts"):
                close = difflib.get_close_matches(name[:80], list(known), n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                raise ConfigError(f"unknown flag {one_line(name)}; {hint}")
            rest.append(word)
            continue
        action = known[name]
        if action.nargs == 0:
            if equals:
                raise ConfigError(f"{one_line(word)}: this flag takes no value")
            flags[action.dest] = True
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("-") and not _is_negative(value):
                raise ConfigError(f"{name} expects a value")
        flags[action.dest] = _value(name, action, value)
        if name == "--loss":
            losses.append(value)
    if len(set(losses)) > 1 and any(map(means_us, losses)):
        every = " and ".join(map(shown, dict.fromkeys(losses)))
        raise ConfigError(f"--loss is given several times, as {every}; give it once")
    return flags, rest


def _is_negative(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word == "-"
    return True


def _value(name: str, action: argparse.Action, text: str) -> Any:
    """A flag's text as what its field is. Whether a loss is one of ours is the host's adapter to say."""
    value: Any = text
    if action.type in (int, float):
        try:
            value = action.type(text)
        except ValueError:
            raise ConfigError(f"{name}: invalid {action.type.__name__} value: {shown(text)}") from None
    return Field(TEXT).check(name, value) if name == "--mmts-config" else _checked(_field(action.dest), value)


def _field(dest: str) -> str:
    return dest.replace("mmts_", "", 1)


def _checked(name: str, value: Any) -> Any:
    """The value of a flag; of a loss and a preset, which have messages of their own, only that it is text."""
    field = Field(TEXT) if name in ("loss", "preset") else FIELDS[name]
    return field.check(_flag(name), value)


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
    given = {_field(name): value for name, value in flags.items()}
    if "period" in given and "num_oscillations" in given:
        raise ConfigError("give either --mmts-num-oscillations or --mmts-period, not both")
    for one, other in (("period", "num_oscillations"), ("num_oscillations", "period")):
        if one in given:
            values.pop(other, None)
    if "preset" in given and {"alpha", "shift_min", "shift_max"} & set(values):
        logger.warning("MM-TS: %s sets its own alpha and shifts; they beat --mmts-preset", flags["mmts_config"])
    values.update({name: _checked(name, value) for name, value in given.items() if name in FIELDS})
    loss = values.get("loss")
    if loss is None:
        raise ConfigError(f"--mmts-* flags are given but not --loss; choose from {', '.join(LOSSES)}")
    if loss not in LOSSES:
        raise ConfigError(f"unknown --loss {shown(loss)}; choose from {', '.join(LOSSES)}")
    values["loss"] = loss = family if loss == "mmts" else loss
    preset = values.setdefault("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"unknown --mmts-preset {shown(preset)}; choose from {', '.join(PRESETS)}")
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
RECORDED = {
    "total_steps": Field(WHOLE, least=0),
    "table_hash": Field(TEXT, null=True),
    "host": Field(TEXT, empty=True),
    "host_version": Field(TEXT, empty=True),
    "mmts_plugins": Field(TEXT, empty=True),
}
"""What a record says beside the fields of :class:`Config`."""
_NOT_COMPARED = ("clusters", "preset", "num_oscillations", "total_steps", "diagnostics_every", "mmts_plugins")
_LARGEST_FILE = 2**16  # bytes; a record has some 600


def load_file(path: PathLike) -> dict[str, Any]:
    """The fields of :class:`Config` that a saved ``mmts.yaml`` sets.

    Raises:
        ConfigError: unreadable, or a field that does not exist or may not have this value.
    """
    checked = check_mapping(path, read_record(path), {**FIELDS, **RECORDED})
    values = {name: value for name, value in checked.items() if name in FIELDS}
    if values.get("num_oscillations") is not None:
        values.pop("period", None)  # a record holds the period that the oscillations came to in its own run
    return values


def record(config: Config, total_steps: int, table_hash: Optional[str], host: str, host_version: str) -> dict[str, Any]:
    """What is written as ``mmts.yaml`` in the run's folder: the config, its period in steps, and its sources."""
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
    """Write ``mmts.yaml``, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    with writing(path, "cannot be written", ConfigError), replacing(path) as temporary:
        text = "# written by mmts-plugins; compared on resume\n" + yaml.safe_dump(values, sort_keys=False)
        temporary.write_text(text, encoding="utf-8")


def read_record(path: PathLike) -> dict[str, Any]:
    """Read an ``mmts.yaml``.

    Raises:
        ConfigError: it cannot be read or is not a mapping.
    """
    with reading(path, "cannot read the MM-TS config", ConfigError):
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ConfigError(f"{path}: not an MM-TS config: longer than {_LARGEST_FILE} bytes")
        values = yaml.load(content.decode("utf-8-sig"), _Loader)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not an MM-TS config (expected fields such as 'alpha: 0.04')")
    return values


class _Loader(yaml.SafeLoader):
    """YAML as :func:`write_record` writes it: text, numbers in decimal, ``true``, ``null``, lists and mappings.

    Nothing that is read as something else than it looks like (``010`` is 8 in YAML, ``1:30`` is 90), nor what grows
    when it is read or shown (aliases), nor a second value for a name.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it holds an alias (*{self.peek_event().anchor}); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            seen: set[Any] = set()
            names = [self.construct_object(name) for name, _ in node.value]
            twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise yaml.YAMLError(f"{shown(twice)} stands there twice")
        return values


_DIGITS = r"[0-9]+\.[0-9]*|\.[0-9]+"
for _tag, _pattern, _first in (
    ("bool", "[Yy]es|YES|[Nn]o|NO|[Tt]rue|TRUE|[Ff]alse|FALSE|[Oo]n|ON|[Oo]ff|OFF", "yYnNtTfFoO"),
    ("int", "[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", rf"[-+]?(?:(?:{_DIGITS})(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)", "-+0123456789."),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def check_resume(
    saved_path: PathLike, values: dict[str, Any], allow_change: bool, table: Any = None, source: str = ""
) -> None:
    """Compare this run's record with the one of the checkpoint it resumes.

    Args:
        table: the run's, which knows its hash of format 1 too: a run recorded with that goes on.
        source: where the file is a copy, what it was copied from.

    Raises:
        ConfigError: naming every field that differs, unless ``allow_change``.
    """
    if not Path(saved_path).exists():
        problem = f"{source or saved_path} does not exist: the checkpoint was not trained with MM-TS"
    else:
        saved = read_record(saved_path)
        different = [
            f"{name} was {shown(saved.get(name))} and is {shown(value)}"
            for name, value in values.items()
            if name not in _NOT_COMPARED
            and saved.get(name) != value
            and not (name == "table_hash" and table is not None and table.has_hash(saved.get(name)))
        ]
        if not different:
            return
        problem = f"{source or saved_path}: the resumed run differs: " + "; ".join(different)
    if not allow_change:
        raise ConfigError(problem + ". Go on anyway with --mmts-allow-config-change")
    logger.warning("MM-TS: %s (allowed by --mmts-allow-config-change)", problem)
