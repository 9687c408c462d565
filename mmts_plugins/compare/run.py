"""A comparison as ``mmts compare`` runs it: what the plan is, what would be run, and how it ended."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from ..errors import ConfigError
from . import tables
from .execute import FINISHED, execute, exit_file, reporting
from .plan import Plan, launched, read


def content(words: Sequence[str], over: dict[str, Any]) -> dict[str, Any]:
    """The content of a plan.

    Args:
        words: one plan file, or the host's command.
        over: keys that take the place of the file's.

    Raises:
        ConfigError: neither is given, or the file cannot be read.
    """
    if not words:
        raise ConfigError("nothing to compare: give a PLAN.yaml, or the host's command behind --")
    is_file = len(words) == 1 and words[0].endswith((".yaml", ".yml"))
    found: dict[str, Any] = read(words[0]) if is_file else {"command": shlex.join(words)}
    return {**found, **over}


def commands(plan: Plan, launcher: Optional[str] = None, wait: bool = True) -> str:
    """The commands of every run, to be read."""
    lines = []
    for each in plan.runs:
        lines.append(f"# {each.variant}, seed {each.seed}")
        command = each.command if wait else reporting(each.command, exit_file(plan, each, 1))
        lines.append(shlex.join(launched(command, launcher)))
        lines.append(shlex.join(launched(each.evaluation, launcher if wait else None)))
    return "\n".join(lines)


def compare(
    plan: Plan, output: str, launcher: Optional[str], wait: bool = True, retry: bool = False, accept: bool = False
) -> int:
    """Run, resume and tabulate, and say how it ended; ``output`` as the user names it, the rest as for ``execute``.

    Returns:
        The exit status: 1 if a run failed.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice: end the trainer too
    try:
        state = execute(plan, launcher, wait, retry, accept)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{tables.write(plan, state.runs)}")
    finished = sum(state.of(each).get("status") == FINISHED for each in plan.runs)
    print(
        f"{finished} of {len(plan.runs)} runs finished. Written to {output}: compare.md, compare.json, compare.csv"
        + (", compare.png" if Path(output, "compare.png").exists() else "")
    )
    failed = [each for each in plan.runs if state.of(each).get("error")]
    for each in failed:
        print(f"failed: {each.name}: {state.of(each)['error']}")
    if failed:
        print("Mend the cause and call the same again: finished runs are kept, failed ones resumed.")
    return 1 if failed else 0
