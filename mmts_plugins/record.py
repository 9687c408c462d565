"""``mmts.yaml``: what a run was, written beside its checkpoints, read again as a config file, compared on resume."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

from ._files import PathLike, replacing, writing
from .config import Config, of_options
from .errors import ConfigError, reading, shown
from .fields import TEXT, WHOLE, Field, check_mapping
from .options import COMMON, Option

logger = logging.getLogger(__name__)

FILE_NAME = "mmts.yaml"
LOG_NAME = "mmts.jsonl"
RECORDED = {
    "total_steps": Field(WHOLE, least=0),
    "table_hash": Field(TEXT, null=True),
    "host": Field(TEXT, empty=True),
    "host_version": Field(TEXT, empty=True),
    "mmts_plugins": Field(TEXT, empty=True),
}
"""What a record says beside the fields of :class:`.config.Config`."""
_ADDED = {"start_phase": 0.0, "mean_matched": False, "shuffle_shifts": None}
"""Fields that records of before do not have, as those runs had them."""
_LARGEST_FILE = 2**16  # bytes; a record has some 600


def record(config: Config, total_steps: int, table_hash: Optional[str], host: str, host_version: str) -> dict[str, Any]:
    """What is written as ``mmts.yaml`` in the run's folder: the config, its period in steps, and its sources.

    Fields that only other hosts know are in it, as ``None``: every record has the same fields.
    """
    from . import __version__
    from .hosts.registry import options_of_hosts

    everyones = {option.name: None for option in options_of_hosts()}
    common = {name: value for name, value in config.values.items() if name not in config.own}
    last = common.pop("diagnostics_every")
    return {
        **common,
        **everyones,
        **config.own,
        "diagnostics_every": last,
        "period": config.period_steps(total_steps),
        "total_steps": total_steps,
        "table_hash": table_hash,
        "host": host,
        "host_version": host_version,
        "mmts_plugins": __version__,
    }


def says_something(name: str, value: Any) -> bool:
    """Tell whether a field of a record is worth showing by itself: not where it only says that nothing is so."""
    return value is not None and value is not False and (name, value) != ("start_phase", 0.0)


def load_file(path: PathLike, own: Sequence[Option] = ()) -> dict[str, Any]:
    """The fields of :class:`.config.Config` that a saved ``mmts.yaml`` sets.

    Args:
        own: the options of the host that is to run with it.

    Raises:
        ConfigError: unreadable, or a field that does not exist or may not have this value.
    """
    from .hosts.registry import options_of_hosts

    everyones = options_of_hosts()
    foreign = {option.name for option in everyones} - {option.name for option in (*COMMON, *own)}
    known = of_options((*COMMON, *everyones, *own))
    checked = check_mapping(path, read_record(path), {**known, **RECORDED})
    values = {
        name: value for name, value in checked.items() if name in known and not (name in foreign and value is None)
    }
    if values.get("num_oscillations") is not None:
        values.pop("period", None)  # a record holds the period that the oscillations came to in its own run
    return values


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
    saved_path: PathLike, values: Mapping[str, Any], allow_change: bool, table: Any = None, source: str = ""
) -> None:
    """Compare this run's record with the file of the checkpoint it resumes; see :func:`compare_records`.

    Args:
        source: where the file is a copy, what it was copied from.
    """
    saved = read_record(saved_path) if Path(saved_path).exists() else None
    compare_records(saved, values, allow_change, table, source or str(saved_path))


def compare_records(
    saved: Optional[Mapping[str, Any]], values: Mapping[str, Any], allow_change: bool, table: Any, source: str
) -> None:
    """Compare this run's record with the one of the checkpoint it resumes.

    Args:
        saved: ``None``: it has none.
        table: the run's, which knows its hash of format 1 too: a run recorded with that goes on.
        source: of ``saved``, for messages.

    Raises:
        ConfigError: naming every field that differs, unless ``allow_change``.
    """
    if saved is None:
        problem = f"{source} does not exist: the checkpoint was not trained with MM-TS"
    else:
        saved = {**_ADDED, **saved}
        passed_over = {"total_steps", "mmts_plugins"} | {option.name for option in _options() if not option.compared}
        if values.get("no_shifts") and not values.get("mean_matched"):
            passed_over.add("table_hash")  # no temperature depends on it
        different = [
            f"{name} was {shown(saved.get(name))} and is {shown(value)}"
            for name, value in values.items()
            if name not in passed_over
            and saved.get(name) != value
            and not (name == "table_hash" and table is not None and table.has_hash(saved.get(name)))
        ]
        if not different:
            return
        problem = f"{source}: the resumed run differs: " + "; ".join(different)
    if not allow_change:
        raise ConfigError(problem + ". Go on anyway with --mmts-allow-config-change")
    logger.warning("MM-TS: %s (allowed by --mmts-allow-config-change)", problem)


def _options() -> list[Option]:
    from .hosts.registry import options_of_hosts

    return [*COMMON, *options_of_hosts()]
