"""The flags: one :class:`Option` for each, from which parser, help, checks, ``mmts.yaml`` and resume are derived."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Optional

from . import losses
from ._startup import means_us
from .errors import ConfigError, one_line, shown
from .fields import NUMBER, SWITCH, TEXT, WHOLE, Field

MISSING = ("error", "tail", "mean")
DEFAULT_OSCILLATIONS = 5.0

_HIGHEST = 1e4  # of temperatures and margins: far above any that trains, and their sums stay exact
_TURNS = Field(NUMBER, null=True, above=0, least=1e-6, most=1e12)  # neither a step over T nor T overflows


@dataclass(frozen=True)
class Option:
    """One flag, and the field of :class:`mmts_plugins.config.Config` and of ``mmts.yaml`` that it sets.

    Attributes:
        name: of the field; ``shift_min`` is the flag ``--mmts-shift-min``.
        field: what it may be. Choices, if any, are the flag's.
        help: a line of ``--help``.
        metavar: of the value, in ``--help``.
        compared: whether a resumed run must have the same.
    """

    name: str
    field: Field
    help: str
    metavar: str = ""
    compared: bool = True

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    def check(self, value: Any) -> Any:
        """The value, if the flag may have it.

        Raises:
            ConfigError: naming the flag.
        """
        return self.field.check(self.flag, value)


COMMON = (
    Option("loss", Field(TEXT), "schedule the contrastive loss; mmts is the host's own family", "LOSS"),
    Option("alpha", Field(NUMBER, least=0, most=_HIGHEST), "peak-to-peak amplitude of the cosine (Eq. 7)", "A"),
    Option("shift_min", Field(NUMBER, least=-_HIGHEST, most=_HIGHEST), "shift of the rarest concept (Eq. 6)", "S"),
    Option("shift_max", Field(NUMBER, least=-_HIGHEST, most=_HIGHEST), "shift of the most common concept (Eq. 6)", "S"),
    Option(
        "clusters",
        Field(TEXT, null=True),
        "cluster table of the training captions, made by: mmts cluster",
        "FILE",
        compared=False,
    ),
    Option("preset", Field(TEXT, null=True), "the paper's alpha and shifts", "NAME", compared=False),
    Option(
        "num_oscillations",
        _TURNS,
        f"full cosine periods over the run (default: {DEFAULT_OSCILLATIONS:g})",
        "N",
        compared=False,  # its period is
    ),
    Option("period", _TURNS, "length of a period in optimizer steps, instead of a number", "STEPS"),
    Option(
        "start_phase",
        Field(NUMBER, least=0, most=1),
        "where in its period the run starts: 0 at the cosine's top (default, the paper's), 0.5 at its bottom",
        "P",
    ),
    Option("no_schedule", Field(SWITCH), "ablation: shifts only (the paper's ICS)"),
    Option("no_shifts", Field(SWITCH), "ablation: schedule only (the paper's TS), at the middle shift"),
    Option(
        "mean_matched",
        Field(SWITCH),
        "control, with --mmts-no-shifts: every sample gets the mean shift of the table, not the middle of the range",
    ),
    Option(
        "shuffle_shifts",
        Field(WHOLE, null=True, least=0, most=2**32 - 1),
        "control: the table's frequencies go to the wrong captions, drawn with this seed",
        "SEED",
    ),
    Option(
        "missing",
        Field(TEXT, choices=MISSING),
        "what a caption absent from the table gets: the tail's shift (default), the mean shift, or an error",
    ),
    Option(
        "diagnostics_every",
        Field(WHOLE, least=0),
        "how often to measure losses of head, middle and tail, alignment, uniformity, equilibrium and modality gap "
        "(default: 100; 0: never)",
        "STEPS",
        compared=False,
    ),
)
"""What every host knows."""

CONFIG_FILE, ALLOW_CHANGE = "mmts_config", "mmts_allow_config_change"
"""Flags that are no field: they say where fields come from, and what a difference on resume means."""


def flag_of(name: str) -> str:
    return "--loss" if name == "loss" else "--mmts-" + name.replace("_", "-")


def _dest(name: str) -> str:
    return "loss" if name == "loss" else f"mmts_{name}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def flag_parser(own: Iterable[Option] = ()) -> argparse.ArgumentParser:
    """A parser of the flags that every host knows, and of a host's ``own``.

    It never abbreviates: a host's parser may, and would swallow ours.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS, usage=argparse.SUPPRESS)
    group = parser.add_argument_group(
        "MM-TS (mmts-plugins)", "per-sample temperature and margin schedules; without --loss nothing changes"
    )
    for option in (*COMMON, *own):
        _add(group, option)
    group.add_argument(
        "--mmts-config", metavar="FILE", help="a saved mmts.yaml; flags beat it, and it beats the preset"
    )
    group.add_argument(
        "--mmts-allow-config-change",
        action="store_true",
        help="on resume, go on although mmts.yaml beside the checkpoint differs",
    )
    return parser


def _add(group: Any, option: Option) -> None:
    field, extra = option.field, ""
    if option.name == "loss":
        extra = f"; one of {', '.join(losses.choices())}"
    elif option.name == "preset":
        from .presets import presets

        extra = f"; one of {', '.join(presets())}; the host has a default"
    given: dict[str, Any] = {"dest": _dest(option.name), "help": option.help + extra}
    if field.kind == SWITCH:
        group.add_argument(option.flag, action="store_true", **given)
        return
    if field.choices is not None:
        given["choices"] = tuple(field.choices)
    elif option.metavar:
        given["metavar"] = option.metavar
    kind = {NUMBER: float, WHOLE: int}.get(field.kind)
    group.add_argument(option.flag, **given, **({"type": kind} if kind else {}))


taken = False
"""Whether flags of ours were taken off a command line in this process: who asks for a schedule can see to it."""


def split_flags(argv: Sequence[str], own: Sequence[Option] = ()) -> tuple[dict[str, Any], list[str]]:
    """Take our flags out of a command line.

    Args:
        argv: the words after the program's name.
        own: the host's; flags of other hosts are taken too, so that whoever resolves them can say whose they are.

    Returns:
        The flags given (``loss``, ``mmts_alpha``, ...; only those present), and what is left for the host.

    Raises:
        ConfigError: a value of the wrong type, a misspelt ``--mmts-*`` flag, or two losses of which one is ours.
    """
    from .hosts.registry import options_of_hosts

    global taken
    options = {option.name: option for option in (*COMMON, *options_of_hosts(), *own)}
    switches = {ALLOW_CHANGE} | {_dest(name) for name, option in options.items() if option.field.kind == SWITCH}
    known = {flag_of(name): _dest(name) for name in options}
    known |= {"--mmts-config": CONFIG_FILE, "--mmts-allow-config-change": ALLOW_CHANGE}
    flags: dict[str, Any] = {}
    given: list[str] = []
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
        dest = known[name]
        if dest in switches:
            if equals:
                raise ConfigError(f"{one_line(word)}: this flag takes no value")
            flags[dest] = True
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("-") and not _is_negative(value):
                raise ConfigError(f"{name} expects a value")
        flags[dest] = _value(name, None if dest == CONFIG_FILE else options[field_of(dest)], value)
        if name == "--loss":
            given.append(value)
    if len(set(given)) > 1 and any(map(means_us, given)):
        every = " and ".join(map(shown, dict.fromkeys(given)))
        raise ConfigError(f"--loss is given several times, as {every}; give it once")
    taken = taken or bool(flags)
    return flags, rest


def field_of(dest: str) -> str:
    return dest.replace("mmts_", "", 1)


def _is_negative(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word == "-"
    return True


def _value(flag: str, option: Optional[Option], text: str) -> Any:
    """A flag's text as what its field is. Whether there is such a loss or preset, :func:`.config.merge` says."""
    if option is None:
        return Field(TEXT).check(flag, text)
    value: Any = text
    kind = {NUMBER: float, WHOLE: int}.get(option.field.kind)
    if kind is not None:
        try:
            value = kind(text)
        except ValueError:
            raise ConfigError(f"{flag}: invalid {kind.__name__} value: {shown(text)}") from None
    return option.check(value)
