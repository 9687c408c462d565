"""What is compared: a YAML file or flags, resolved to one command line per run."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from ..errors import ConfigError, reading, shown
from ..fields import MAPPING, SWITCH, TEXT, TEXTS, WHOLE, WHOLES, Field, check_mapping

PLAIN, CONSTANT, TS, ICS, SHUFFLED, BOTH = "plain", "constant", "TS", "ICS", "shuffled", "TS&ICS"
"""The paper's four, and two controls: a schedule and shifts also change the mean temperature and its spread."""
_PLACEHOLDER = re.compile(r"\{(seed|variant|run|output|flags|done|result|python)\}")
LONGEST = 100_000  # characters of a plan file, and so of any command; parsing YAML is slow
_MOST_RUNS = 10_000
_SEED = Field(WHOLE, least=0, most=2**32 - 1)  # NumPy's, which hosts seed too
_NAME = Field(TEXT, longest=100)  # a variant's: it becomes files
_OTHERS = Field(TEXTS)
_FLAGS = Field(TEXT, null=True, empty=True, longest=LONGEST)
_FIELDS = {
    "command": Field(TEXT, longest=LONGEST),
    "eval": Field(TEXT, longest=LONGEST),
    "done": Field(TEXT),
    "resume": _FLAGS,
    "seeds": Field(WHOLES),
    "variants": Field(MAPPING, null=True),
    "clusters": Field(TEXT, null=True),
    "mmts": _FLAGS,
    "controls": Field(SWITCH),
    "contrasts": Field(MAPPING, null=True),
    "metrics": Field(TEXTS, null=True, empty=True),
    "folder": Field(TEXT),
}
_REQUIRED = ("command", "eval", "done")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        variant, seed: which one.
        name: of files and of the host's run, ``TS-ICS-seed0``.
        command: the training command as a list of arguments; ``resumed`` the same for a run that died.
        done: the file that a finished training leaves; ``own_folder``: nothing of other runs is beside it.
        evaluation: the evaluating command.
        result: the file that it writes.
    """

    variant: str
    seed: int
    name: str
    command: list[str]
    resumed: list[str]
    done: Path
    evaluation: list[str]
    result: Path
    own_folder: bool


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        runs: all of them, seed by seed, so that an interrupted comparison has whole seeds.
        variants, seeds: in the order of the table.
        contrasts: pairs of variants whose difference is shown, the second taken off the first.
        metrics: names to show; empty for the usual ones.
        folder: where the commands run.
        output: where state, logs, evaluations and tables are written.
    """

    runs: list[Run]
    variants: list[str]
    seeds: list[int]
    contrasts: list[tuple[str, str]]
    metrics: list[str]
    folder: Path
    output: Path


def read(path: str) -> dict[str, Any]:
    """The content of a plan file.

    Raises:
        ConfigError: missing, not YAML, or with a key that means nothing.
    """
    with reading(path, "cannot be read as a plan", ConfigError):
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise ConfigError(f"{path}: longer than {LONGEST} characters: no plan")
        content = yaml.load(text, _Loader)  # a SafeLoader
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, such as command: and eval:, not {shown(content)}")
    content = check_mapping(path, content, _FIELDS, what="key")
    # As relative paths in the file are meant.
    return {**content, "folder": str(Path(path).parent / content.get("folder", "."))}


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice, nor by ``<<``, with which 500 bytes can ask for any amount of memory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        known = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise ValueError(f"line {key.start_mark.line + 1}: << is not taken here; write the keys out")
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable):
                if name in known:
                    raise ValueError(f"line {key.start_mark.line + 1}: {shown(name)} is given twice")
                known.add(name)
        return super().construct_mapping(node, deep)


def make(content: dict[str, Any], output: str) -> Plan:
    """Check a plan and render its commands.

    Raises:
        ConfigError: a key is missing or has a value that cannot be used.
    """
    if not output.strip():  # of a shell's unset variable: all would go into the current folder
        raise ConfigError("-o/--output is empty: it names a folder")
    content = check_mapping("the plan", content, _FIELDS, _REQUIRED, what="key")
    seeds = [_SEED.check("one of seeds", seed) for seed in content.get("seeds", [0])]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: {shown(seeds)} holds a number twice")
    if "{seed}" not in content["command"] and len(seeds) > 1:
        raise ConfigError("command: has no {seed}, so all seeds would be the same run")
    variants = _variants(content)
    names = [_slug(variant).casefold() for variant in variants]
    if len(set(names)) < len(names):
        raise ConfigError(f"variants: the names {', '.join(variants)} are too much alike for file names")
    if len(seeds) * len(variants) > _MOST_RUNS:
        raise ConfigError(f"{len(variants)} variants and {len(seeds)} seeds are more than {_MOST_RUNS} runs")
    if "{run}" not in content["done"] and len(seeds) * len(variants) > 1:
        raise ConfigError("done: has no {run}, so all runs would share one file")
    for word in ("{flags}", "{done}", "{result}"):
        if word in content["done"]:
            raise ConfigError(f"done: {word} cannot stand in a file's name")
    folder, target = Path(content.get("folder", ".")).absolute(), Path(output).absolute()
    runs = [
        _run(content, variant, flags, seed, folder, target) for seed in seeds for variant, flags in variants.items()
    ]
    contrasts = _contrasts(content, list(variants))
    return Plan(runs, list(variants), seeds, contrasts, content.get("metrics") or [], folder, target)


def _contrasts(content: dict[str, Any], variants: list[str]) -> list[tuple[str, str]]:
    """Those of the plan; else all with the first variant, and of the usual variants both halves with the controls."""
    given = content.get("contrasts")
    if given is None:
        found = [(variant, variants[0]) for variant in variants[1:]]
        return [*found, *((BOTH, control) for control in (CONSTANT, SHUFFLED) if _with_controls(content))]
    pairs = [(one, other) for one, others in given.items() for other in _OTHERS.check(f"contrasts: {one}", others)]
    for one, other in pairs:
        if one == other or not {one, other} <= {*variants}:
            raise ConfigError(
                f"contrasts: {shown(one)}: [{shown(other)}]: two variants, the second taken off the first; they are "
                f"{', '.join(variants)}"
            )
    return pairs


def _with_controls(content: dict[str, Any]) -> bool:
    return content.get("variants") is None and content.get("controls", True)


def _variants(content: dict[str, Any]) -> dict[str, str]:
    """``{name: flags}``; the paper's four and the controls where only a cluster table is given."""
    given, table = content.get("variants"), content.get("clusters")
    if given is None:
        if not table:
            raise ConfigError("give clusters: FILE for the usual variants, or variants: with flags of your own")
        own = f"--loss mmts {content.get('mmts') or ''}".strip()
        with_table = f"{own} --mmts-clusters {shlex.quote(table)}"
        usual = {
            PLAIN: "",
            CONSTANT: f"{with_table} --mmts-no-schedule --mmts-no-shifts --mmts-mean-matched",
            TS: f"{own} --mmts-no-shifts",
            ICS: f"{with_table} --mmts-no-schedule",
            SHUFFLED: f"{with_table} --mmts-shuffle-shifts {{seed}}",
            BOTH: with_table,
        }
        return {name: usual[name] for name in usual if name not in (CONSTANT, SHUFFLED) or _with_controls(content)}
    if table or content.get("mmts") or content.get("controls"):
        raise ConfigError("variants: says all flags itself; drop clusters:, mmts: and controls:")
    if not given:
        raise ConfigError("variants: is empty: expected names with flags, such as plain: ''")
    for name, flags in given.items():
        _NAME.check("a name in variants (in quotes, if YAML takes it for something else)", name)
        _FLAGS.check(f"variants: {name}", flags)
        if "|" in name or not name.isprintable():
            raise ConfigError(f"variants: {shown(name)}: a name goes into a table and cannot hold | or line breaks")
    return {name: flags or "" for name, flags in given.items()}


def _run(content: dict[str, Any], variant: str, flags: str, seed: int, folder: Path, output: Path) -> Run:
    name = f"{_slug(variant)}-seed{seed}"
    values = {
        "seed": str(seed),
        "variant": variant,
        "run": name,
        "output": str(output),
        "result": str(output / "evals" / f"{name}.json"),
        "python": sys.executable,
    }
    values["done"] = _filled(content["done"], values)

    own_flags = [_filled(part, values) for part in _words(flags, f"variants: {variant}", flags=False)]

    def arguments(key: str, flags: bool = False) -> list[str]:
        # {flags} alone stands for several arguments; all other values stay within theirs, blanks and all.
        parts = _words(content.get(key) or "", key, flags)
        filled = [each for part in parts for each in (own_flags if part == "{flags}" else [_filled(part, values)])]
        if key in _REQUIRED and (not filled or not filled[0]):
            raise ConfigError(f"{key}: its first word, which is to be started, is empty")
        return filled

    command = arguments("command", flags=True)
    if "{flags}" not in content["command"]:
        command += own_flags
    return Run(
        variant,
        seed,
        name,
        command,
        [*command, *arguments("resume")],
        folder / values["done"],
        arguments("eval", flags=True),
        Path(values["result"]),
        "{run}" in os.path.dirname(content["done"]),
    )


def _words(template: str, key: str, flags: bool) -> list[str]:
    """The arguments of a command line.

    Raises:
        ConfigError: its quotes do not match, or ``{flags}`` stands where it would be left as it is.
    """
    try:
        parts = shlex.split(template)
    except ValueError as error:
        raise ConfigError(f"{key}: the quotes do not match: {error}") from error
    for part in parts:
        if "{flags}" in part and not flags:
            raise ConfigError(f"{key}: {{flags}} has no meaning there")
        if "{flags}" in part and part != "{flags}":
            raise ConfigError(f"{key}: {shown(part)}: {{flags}} stands for several words and must be one by itself")
    return parts


def _filled(template: str, values: dict[str, str]) -> str:
    # Not str.format: shard patterns hold braces of their own.
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def _slug(variant: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", variant).strip("-") or "variant"


def launched(command: Sequence[str], launcher: Optional[str]) -> list[str]:
    """The command under a scheduler: behind the launcher, or quoted in the place of ``{command}``.

    Raises:
        ConfigError: the launcher is no command.
    """
    if launcher is None:
        return list(command)
    try:
        parts = shlex.split(launcher)
    except ValueError as error:
        raise ConfigError(f"--launcher: the quotes do not match: {error}") from error
    if not parts or not parts[0]:
        raise ConfigError(f"--launcher {shown(launcher)}: names no command")
    if any("{command}" in part for part in parts):
        return [part.replace("{command}", shlex.join(command)) for part in parts]
    return [*parts, *command]
