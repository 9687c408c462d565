"""The sub-commands ``mmts schedule``, ``mmts plot`` and ``mmts report``. Imports nothing heavy until one runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._files import check_writable
from ..errors import ConfigError
from ..hosts.registry import adapters, options_of_hosts
from ..options import flag_parser
from ..presets import presets
from ..record import FILE_NAME, LOG_NAME

_CHANGES = ("alpha", "shift_min", "shift_max", "num_oscillations", "period")
_DEFAULT_STEPS = 1000
_OF_RUNS = (FILE_NAME, LOG_NAME, "out.log", "log.txt", "results.jsonl")


def add_parsers(commands: Any) -> None:
    """Register the sub-commands on the parsers of ``mmts``."""
    _add_schedule(commands)
    _add_plot(commands)
    _add_report(commands)


# -- mmts schedule -----------------------------------------------------------------------------------------------------


def _add_schedule(commands: Any) -> None:
    parser = commands.add_parser(
        "schedule",
        parents=[flag_parser(options_of_hosts())],
        allow_abbrev=False,
        help="resolve a run's --loss and --mmts-* flags without host or GPU, and show the temperatures they lead to",
        description="Resolves --loss (default: mmts) and --mmts-* flags as the host's run would, checks the files they "
        "name, and prints the configuration and the temperatures at the extremes of the schedule. Needs no host and no "
        "GPU. Exit status 2, with the run's own error, if it would not start.",
        epilog="For example: mmts schedule --host openclip --total-steps 6000 --mmts-clusters clusters.parquet",
    )
    names = ", ".join(adapter.name for adapter in adapters())
    parser.add_argument("--host", required=True, metavar="HOST", help=f"whose run: {names}")
    parser.add_argument("--total-steps", required=True, type=int, metavar="N", help="optimizer steps of the whole run")
    parser.add_argument(
        "--train-metadata",
        metavar="FILE",
        help="of a host that counts classes itself: the annotation file in which its run does, where no "
        "--mmts-clusters is given",
    )
    parser.add_argument(
        "--no-table",
        action="store_true",
        help="the file of --mmts-clusters is still to be made: show the extremes of its shifts without it",
    )
    parser.set_defaults(run=_run_schedule)


def _run_schedule(args: argparse.Namespace) -> int:
    from ..plan import Plan, adapter_of, describe

    flags = dict(args.flags)
    if "mmts_config" not in flags:
        flags.setdefault("loss", "mmts")
    adapter = adapter_of(args.host)
    config, table, _ = adapter.resolve(flags, args.train_metadata, not args.no_table)
    print(describe(Plan(config.values, args.total_steps, table), adapter))
    for warning in config.warnings():
        print(f"\nwarning: {warning}")
    return 0


# -- mmts plot ---------------------------------------------------------------------------------------------------------


def _add_plot(commands: Any) -> None:
    plots = commands.add_parser(
        "plot", help="draw a schedule before training", description="Draw what a run will do, before it does it."
    ).add_subparsers(title="plots", metavar="WHAT", required=True)
    parser = plots.add_parser(
        "schedule",
        allow_abbrev=False,
        help="base, head, middle and tail temperature over the run, and what each negative weighs at its extremes",
        description="Draws the base, head, middle and tail temperature over the run, one row for each preset or "
        "config, with the values that break a guard marked; and how much a negative weighs at the schedule's extremes "
        "(Fig. 1 of the paper). Values that a run would refuse are drawn all the same.",
        epilog="For example: mmts plot schedule --preset clip-cc3m vast-clip --table clusters.parquet -o schedule.png",
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
    parser.set_defaults(run=_run_plot_schedule)


def _run_plot_schedule(args: argparse.Namespace) -> int:
    from . import schedule
    from .plots import check_matplotlib, own_style

    check_matplotlib()
    changes = {name: value for name in _CHANGES if (value := getattr(args, name)) is not None}
    plans = schedule.plans(
        args.preset or ([] if args.config else ["clip-cc3m"]),
        args.config,
        args.table,
        args.total_steps,
        changes,
        _DEFAULT_STEPS,
    )
    with own_style():
        schedule.plot(plans, _picture(args.output))
    for plan in plans:
        print(schedule.say(plan))
    print(f"Written to {args.output}")
    return 0


def _picture(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path}: -o/--output names a .png file")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; -o/--output names a .png file")
    return path


# -- mmts report -------------------------------------------------------------------------------------------------------


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="one page about cluster tables, or about training runs",
        description="Writes report.html (one file, nothing fetched) and its plots as PNGs. Of cluster tables: the long "
        "tail, shifts and temperatures under a preset, the largest and smallest clusters with their telling words, "
        "duplicates, stability, a map of the captions. Of runs (folders with an mmts.yaml in or below them, or plain "
        "runs of a host to compare with): config, schedule, losses, metrics, differences, and a fragment for a model "
        "card.",
        epilog="For example: mmts report clusters.parquet --encoder sentence-transformers/all-MiniLM-L6-v2 -o report, "
        "or: mmts report logs/plain logs/mmts -o report",
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="cluster tables (Parquet, class_id,count CSV, annotations in EK-100's form), or folders of runs",
    )
    add("-o", "--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--force", action="store_true", help="replace a report in DIR")
    add = parser.add_argument_group("tables").add_argument
    add("--preset", metavar="NAME",
        help=f"shifts and amplitude to show: {', '.join(presets())}; default: clip-cc3m for captions, avion-max-margin "
        "for classes")  # fmt: skip
    add("--distribution", metavar="CLASSES", help="of annotations that hold several kinds of classes, only these")
    add("--embeddings", metavar="FILE", help=".npy or .safetensors, a row for each key of the table, for the map")
    add("--encoder", metavar="NAME", help="embed a sample of the captions for the map, as in mmts cluster")
    add("--projection", choices=("tsne", "umap"), default="tsne", help="of the map (default: tsne)")
    add("--sample", type=int, default=2000, metavar="N", help="captions on the map (default: 2000)")
    add("--seed", type=int, default=0, metavar="S", help="of the sample and the map (default: 0)")
    parser.set_defaults(run=_run_report)


def _run_report(args: argparse.Namespace) -> int:
    from .plots import check_matplotlib, own_style

    check_matplotlib()
    _check_folder(args.output, args.force)
    if args.sample < 1 or not 0 <= args.seed < 2**32:
        raise ConfigError("--sample must be at least 1, --seed at least 0 and below 2^32")
    for path in args.inputs:
        if not Path(path).exists():
            raise ConfigError(f"{path}: no such table or run")
    tables = [_is_table(Path(path)) for path in args.inputs]
    if all(tables):
        from . import table

        options = table.Options(
            args.preset,
            args.embeddings,
            args.encoder,
            args.projection,
            args.sample,
            args.seed,
            args.distribution,
        )
        with own_style():
            written = table.write(args.inputs, args.output, options)
    elif any(tables):
        raise ConfigError("tables and runs are two reports: call mmts report once for each")
    else:
        from . import run

        with own_style():
            written = run.write(args.inputs, args.output)
    print("\n".join(f"Written to {path}" for path in written))
    return 0


def _is_table(path: Path) -> bool:
    """A Parquet or CSV file, or a folder of Parquet parts that is no run's."""
    if path.is_file():
        return path.name not in _OF_RUNS
    is_run = any((place / name).exists() for place in (path, path / "checkpoints") for name in _OF_RUNS)
    return not is_run and any(path.glob("*.parquet"))


def _check_folder(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; -o/--output names a folder")
    if (folder / "report.html").exists() and not force:
        raise ConfigError(f"{folder}: holds a report already; pass --force to replace it, or another -o/--output")
    check_writable(folder / "report.html")
