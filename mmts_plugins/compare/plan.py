"""What is compared: a YAML file or flags, resolved to one command line per run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from ..errors import ConfigError

PLAIN, TS, ICS, BOTH = "plain", "TS", "ICS", "TS&ICS"
_PLACEHOLDER = re.compile(r"\{(seed|variant|run|output|flags|done|result|python)\}")
_KEYS = ("command", "eval", "done", "resume", "seeds", "variants", "clusters", "mmts", "metrics", "folder")
_TEXTS = ("command", "eval", "done", "resume", "clusters", "mmts", "folder")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        variant, seed: which one.
        name: of files and of the host's run, ``TS-ICS-seed0``.
        command: the training command as a list of arguments; ``resumed`` the same for a run that died.
        done: the file that a finished training leaves.
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


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        runs: all of them, seed by seed, so that an interrupted comparison has whole seeds.
        variants, seeds: in the order of the table; the first variant is what the others are compared with.
        metrics: names to show; empty for the usual ones.
        folder: where the commands run.
        output: where state, logs, evaluations and tables are written.
    """

    runs: list[Run]
    variants: list[str]
    seeds: list[int]
    metrics: list[str]
    folder: Path
    output: Path


def read(path: str) -> dict[str, Any]:
    """The content of a plan file.

    Raises:
        ConfigError: missing, not YAML, or with a key that means nothing.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such plan file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, such as command: and eval:")
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key!r}; known: {', '.join(_KEYS)}")
    # As relative paths in the file are meant.
    return {**content, "folder": str(Path(path).parent / content.get("folder", "."))}


def make(content: dict[str, Any], output: str) -> Plan:
    """Check a plan and render its commands.

    Raises:
        ConfigError: a key is missing or has a value that cannot be used.
    """
    for key in _TEXTS:
        if content.get(key) is not None and not isinstance(content[key], str):
            raise ConfigError(f"{key}: expected text, not {content[key]!r}")
    for key in ("command", "eval", "done"):
        if not content.get(key):
            raise ConfigError(f"the plan has no {key!r}; see mmts compare --help")
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"seeds: expected a list of whole numbers, not {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: {seeds} holds a number twice")
    if "{seed}" not in content["command"] and len(seeds) > 1:
        raise ConfigError("command: has no {seed}, so all seeds would be the same run")
    variants = _variants(content)
    names = [_slug(variant) for variant in variants]
    if len(set(names)) < len(names):
        raise ConfigError(f"variants: the names {', '.join(variants)} are too much alike for file names")
    if "{run}" not in content["done"] and len(seeds) * len(variants) > 1:
        raise ConfigError("done: has no {run}, so all runs would share one file")
    metrics = content.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(name, str) for name in metrics):
        raise ConfigError(f"metrics: expected a list of names, not {metrics!r}")
    folder, target = Path(content.get("folder", ".")).absolute(), Path(output).absolute()
    runs = [
        _run(content, variant, flags, seed, folder, target) for seed in seeds for variant, flags in variants.items()
    ]
    return Plan(runs, list(variants), seeds, metrics, folder, target)


def _variants(content: dict[str, Any]) -> dict[str, str]:
    """``{name: flags}``; the paper's four where only a cluster table is given."""
    given, table = content.get("variants"), content.get("clusters")
    if given is None:
        if not table:
            raise ConfigError("give clusters: FILE for the paper's four variants, or variants: with flags of your own")
        own = f"--loss mmts {content.get('mmts') or ''}".strip()
        with_table = f"{own} --mmts-clusters {shlex.quote(table)}"
        return {
            PLAIN: "",
            TS: f"{own} --mmts-no-shifts",
            ICS: f"{with_table} --mmts-no-schedule",
            BOTH: with_table,
        }
    if table or content.get("mmts"):
        raise ConfigError("variants: says all flags itself; drop clusters: and mmts:")
    if not isinstance(given, dict) or not given:
        raise ConfigError("variants: expected names with flags, such as plain: ''")
    for name, flags in given.items():
        if not isinstance(name, str) or not (isinstance(flags, str) or flags is None) or "|" in name:
            raise ConfigError(f"variants: {name!r}: {flags!r}: expected a name (without |) and flags as text")
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

    def arguments(template: str, key: str) -> list[str]:
        try:
            parts = shlex.split(template)
        except ValueError as error:
            raise ConfigError(f"{key}: the quotes do not match: {error}") from error
        # {flags} alone stands for several arguments; all other values stay within theirs, blanks and all.
        return [
            filled
            for part in parts
            for filled in (arguments(flags, "variants") if part == "{flags}" else [_filled(part, values)])
        ]

    command = arguments(content["command"] + ("" if "{flags}" in content["command"] else " {flags}"), "command")
    return Run(
        variant,
        seed,
        name,
        command,
        [*command, *arguments(content.get("resume") or "", "resume")],
        folder / values["done"],
        arguments(content["eval"], "eval"),
        Path(values["result"]),
    )


def _filled(template: str, values: dict[str, str]) -> str:
    # Not str.format: shard patterns hold braces of their own.
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def _slug(variant: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", variant).strip("-") or "variant"


def launched(command: Sequence[str], launcher: Optional[str]) -> list[str]:
    """The command under a scheduler: behind the launcher, or quoted in the place of ``{command}``."""
    if not launcher:
        return list(command)
    parts = shlex.split(launcher)
    if any("{command}" in part for part in parts):
        return [part.replace("{command}", shlex.join(command)) for part in parts]
    return [*parts, *command]
