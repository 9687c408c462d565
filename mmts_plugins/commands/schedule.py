"""The arguments of ``mmts schedule``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from ..hosts.registry import adapters, owned_options
from ..options import Option, flag_parser


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``schedule`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "schedule",
        parents=[flag_parser(_with_their_hosts())],
        allow_abbrev=False,
        help=help,
        description="Resolves --loss (default: mmts) and --mmts-* flags as the host's run would, checks the files they "
        "name, and prints the configuration and the temperatures at the extremes of the schedule. Needs no host and no "
        "GPU. Exit status 2, with the run's own error, if it would not start.",
        epilog="For example: mmts schedule --host HOST --total-steps 6000 --mmts-clusters clusters.parquet",
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
    parser.set_defaults(run=run)
    return parser


def _with_their_hosts() -> list[Option]:
    """Flags that only some hosts know, each saying whose it is."""
    return [replace(option, help=f"{owner.title}: {option.help}") for owner, option in owned_options().values()]


def run(args: argparse.Namespace) -> int:
    """Resolve, and print what the run would do."""
    from ..preview import Preview, adapter_of, describe

    flags = dict(args.flags)
    if "mmts_config" not in flags:
        flags.setdefault("loss", "mmts")
    adapter = adapter_of(args.host)
    resolved = adapter.preview(flags, args.train_metadata, not args.no_table)
    print(describe(Preview(resolved.config.values, args.total_steps, resolved.described), adapter))
    for warning in resolved.config.warnings():
        print(f"\nwarning: {warning}")
    return 0
