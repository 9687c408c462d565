"""The arguments of ``mmts run``: none. What follows belongs to the host, see :mod:`mmts_plugins.launcher`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``run`` with the sub-parsers of ``mmts``, for its help alone."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        help=help,
        usage="mmts run -m MODULE [host flags] | mmts run SCRIPT [host flags]",
        description="Start a trainer with MM-TS armed, for environments where .pth files are not read. Under torchrun: "
        "torchrun --nproc_per_node 8 -m -- mmts_plugins run -m package.trainer --loss mmts ...",
    )
    parser.set_defaults(run=lambda _: parser.print_help())
    return parser
