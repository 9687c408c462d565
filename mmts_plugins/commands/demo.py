"""The arguments of ``mmts demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``demo`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help=help,
        description="Train a small CLIP model with OpenCLIP's own trainer on scikit-learn's handwritten digits, made "
        "long-tail, once plain and once with --loss mmts; compare both on a balanced held-out part; write tables, "
        "plots and one page. Takes two to three minutes on two CPU cores and needs no network.",
    )
    parser.add_argument("--output", type=Path, default=Path("mmts_demo"), help="folder to write (default: mmts_demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of both runs (default: 0)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each run (default: 40)")
    parser.add_argument("--batch-size", type=int, default=64, help="batch size of each run (default: 64)")
    parser.add_argument("--force", action="store_true", help="replace a finished demo in the folder")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from ..demo.make import make

    make(args.output, args.seed, args.epochs, args.batch_size, args.force)
    return 0
