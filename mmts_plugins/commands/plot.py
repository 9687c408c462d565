"""The arguments of ``mmts plot``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..presets import presets

_CHANGES = ("alpha", "shift_min", "shift_max", "num_oscillations", "period")
_DEFAULT_STEPS = 1000


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``plot`` with the sub-parsers of ``mmts``."""
    whole: argparse.ArgumentParser = commands.add_parser(
        "plot", help=help, description="Draw what a run will do, before it does it."
    )
    plots = whole.add_subparsers(title="plots", metavar="WHAT", required=True)
    parser = plots.add_parser(
        "schedule",
        allow_abbrev=False,
        help="base, head, middle and tail temperature over the run, and what each negative weighs at its extremes",
        description="Draws the base, head, middle and tail temperature over the run, one row for each preset or "
        "config, with the values that break a guard marked; and how much a negative weighs at the schedule's extremes "
        "(Fig. 1 of the paper). Values that a run would refuse are drawn all the same.",
        epilog="For example: mmts plot schedule --preset clip-cc3m --table clusters.parquet -o schedule.png",
    )
    add = parser.add_argument
    add("--preset", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(presets())}; default: clip-cc3m")
    add("--config", nargs="+", default=[], metavar="FILE", help="saved mmts.yaml files, in place of or beside presets")
    add("--table", metavar="FILE", help="cluster table: thirds of its samples, in place of the rarest, middling and "
        "most common concept; of a config, default: the table it names, if it is still there")  # fmt: skip
    add("--total-steps", type=int, metavar="N",
        help=f"optimizer steps of the run; default: a config's own, else {_DEFAULT_STEPS}")  # fmt: skip
    for name in _CHANGES:
        add(f"--{name.replace('_', '-')}", type=float, metavar="X", help="in place of the preset's or config's own")
    add("-o", "--output", type=Path, default=Path("schedule.png"), metavar="FILE", help="PNG (default: schedule.png)")
    parser.set_defaults(run=run_schedule)
    return whole


def run_schedule(args: argparse.Namespace) -> int:
    """Draw schedules."""
    from ..report import schedule
    from ..report.plots import check_matplotlib, own_style

    check_matplotlib()
    changes = {name: value for name in _CHANGES if (value := getattr(args, name)) is not None}
    previews = schedule.previews(
        args.preset or ([] if args.config else ["clip-cc3m"]),
        args.config,
        args.table,
        args.total_steps,
        changes,
        _DEFAULT_STEPS,
    )
    with own_style():
        schedule.plot(previews, _picture(args.output))
    for preview in previews:
        print(schedule.say(preview))
    print(f"Written to {args.output}")
    return 0


def _picture(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path}: -o/--output names a .png file")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; -o/--output names a .png file")
    return path
