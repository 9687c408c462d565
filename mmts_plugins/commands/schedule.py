"""The arguments of ``mmts schedule``."""

from __future__ import annotations

import argparse
from typing import Any

from ..config import flag_parser


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``schedule`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "schedule",
        parents=[flag_parser()],
        allow_abbrev=False,
        help=help,
        description="Resolves --loss (default: mmts) and --mmts-* flags as the host's run would, checks the files they "
        "name, and prints the configuration and the temperatures at the extremes of the schedule. Needs no host and no "
        "GPU. Exit status 2, with the run's own error, if it would not start.",
        epilog="For example: mmts schedule --host openclip --total-steps 6000 --mmts-clusters clusters.parquet",
    )
    parser.add_argument("--host", required=True, metavar="HOST", help="whose defaults apply: openclip, avion, ...")
    parser.add_argument("--total-steps", required=True, type=int, metavar="N", help="optimizer steps of the whole run")
    parser.add_argument(
        "--train-metadata",
        metavar="FILE",
        help="AVION: the annotation file whose classes the run counts, where no --mmts-clusters is given",
    )
    parser.add_argument(
        "--no-table",
        action="store_true",
        help="the file of --mmts-clusters is still to be made: show the extremes of its shifts without it",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Resolve, and print what the run would do."""
    from ..plan import Plan, describe, resolve_for

    flags = {name: value for name, value in vars(args).items() if name == "loss" or name.startswith("mmts_")}
    if "mmts_config" not in flags:
        flags.setdefault("loss", "mmts")
    config, table = resolve_for(args.host, flags, args.train_metadata, not args.no_table)
    print(describe(Plan(vars(config), args.total_steps, table), args.host))
    for warning in config.warnings():
        print(f"\nwarning: {warning}")
    return 0
