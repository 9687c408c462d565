"""The command ``mmts``: cluster captions, plan and run, check, see it work, evaluate, compare, report."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Optional

from . import __version__
from .errors import ConfigError, MMTSError, last_resort


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; the exit status is 0, or 2 after an error that the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # captions hold what a terminal's encoding may not
    try:
        # torch.distributed.launch gives a script its rank before everything else.
        local_rank = [word for word in arguments[:1] if word.startswith(("--local-rank=", "--local_rank="))]
        arguments = arguments[len(local_rank) :]
        if arguments[:1] == ["run"] and arguments[1:2] not in ([], ["-h"], ["--help"]):
            return _launch(arguments[1:], local_rank)  # what follows belongs to the host, flags and all
        parsed = _parser().parse_args(arguments)
        return parsed.run(parsed) or 0
    except KeyboardInterrupt:
        print("mmts: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # | head: whoever read us has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails again
        return 141
    except Exception as error:
        print(f"mmts: error: {last_resort(error)}", file=sys.stderr)
        if os.environ.get("MMTS_DEBUG"):
            raise
        return 2 if isinstance(error, (MMTSError, OSError)) else 70


def _parser() -> argparse.ArgumentParser:
    from . import doctor
    from .clustering import command as cluster
    from .clustering import stability_command as stability
    from .compare import command as compare
    from .demo import command as demo
    from .evaluation import command as evaluation
    from .report import command as report

    parser = argparse.ArgumentParser(
        prog="mmts",
        description="MM-TS: temperature and margin schedules for contrastive trainers (arXiv 2603.08202).",
        epilog="Start with `mmts demo`, or: mmts cluster train.tsv -o clusters.parquet, then add "
        "--loss mmts --mmts-clusters clusters.parquet to your training command.",
    )
    parser.add_argument("--version", action="version", version=f"mmts-plugins {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    cluster.add_parser(commands)
    stability.add_parser(commands)
    launcher = commands.add_parser(
        "run",
        help="start a host with the plugin armed, without the start-up file",
        usage="mmts run -m MODULE [host flags] | mmts run SCRIPT [host flags]",
        description="Start a trainer with MM-TS armed, for environments where .pth files are not read. Under torchrun: "
        "torchrun --nproc_per_node 8 -m -- mmts_plugins run -m open_clip_train.main --loss mmts ...",
    )
    launcher.set_defaults(run=lambda _: launcher.print_help())
    doctor.add_parser(commands)
    report.add_parsers(commands)
    demo.add_parser(commands)
    evaluation.add_parser(commands)
    compare.add_parser(commands)
    return parser


def _launch(arguments: list[str], local_rank: list[str]) -> int:
    """Arm the hosts and become the target, as ``python -m`` or ``python SCRIPT`` would; it is given its rank first."""
    import runpy

    from . import registry
    from ._startup import asks_for_us

    registry.install_all()
    as_module = arguments[0] == "-m"
    if as_module and len(arguments) < 2:
        raise ConfigError("mmts run -m: which module? For example: mmts run -m open_clip_train.main --loss mmts ...")
    target, rest = (arguments[1], arguments[2:]) if as_module else (arguments[0], arguments[1:])
    if asks_for_us(rest) and not any(host.starts(target, as_module) for host in registry.hosts()):
        known = dict.fromkeys(name for host in registry.hosts() for name in host.start_modules)
        raise ConfigError(f"no adapter for {target!r}, so --loss mmts would do nothing; known: {', '.join(known)}")
    sys.argv = [target, *local_rank, *rest]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = os.path.dirname(os.path.realpath(target))  # where `python SCRIPT` looks first
        runpy.run_path(target, run_name="__main__")
    return 0
