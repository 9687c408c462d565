"""The arguments of ``mmts doctor``."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``doctor`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help=help,
        description="Lists the hosts found, the state of every seam, whether the start-up file is in place, and "
        "whether a cluster table can be read. Exit status 1 if training with --loss mmts would not work.",
    )
    parser.add_argument("--table", metavar="FILE", help="a cluster table to check as well")
    parser.add_argument("--clusters", dest="table", help=argparse.SUPPRESS)  # its former name
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, and say what was found."""
    from .. import doctor

    return doctor.run(args.table)
