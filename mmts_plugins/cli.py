"""The command ``mmts``: cluster captions, plan and run, check, see it work, evaluate, compare, report."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, Optional

from . import __version__
from .errors import ConfigError, MMTSError, SeamError, cause, last_resort, one_line, reading, shown
from .options import split_flags


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; the exit status is 0, or 2 after an error that the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError, ValueError):
            sys.stdout.reconfigure(errors="replace")  # captions hold what a terminal's encoding may not
    # torch.distributed.launch gives a script its rank before everything else.
    local_rank = [word for word in arguments[:1] if word.startswith(("--local-rank=", "--local_rank="))]
    arguments = arguments[len(local_rank) :]
    launched: Optional[Callable[[], object]] = None
    parsed, code = argparse.Namespace(), 0
    try:
        for word in arguments:
            if "\0" in word:
                raise ConfigError(f"an argument holds a NUL character: {shown(word)}")
        if arguments[:1] == ["run"] and arguments[1:2] not in ([], ["-h"], ["--help"]):
            launched = _launch(arguments[1:], local_rank)  # what follows belongs to the host, flags and all
        else:
            try:
                with reading("the command line", "cannot be understood", ConfigError):
                    # As a run takes them: a preview's errors are the run's.
                    flags, rest = split_flags(arguments[1:]) if arguments[:1] == ["schedule"] else ({}, arguments[1:])
                    parsed = _parser().parse_args([*arguments[:1], *rest])
                    parsed.flags = flags
                code = parsed.run(parsed) or 0
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # while a full disk can still be told in a line
    except KeyboardInterrupt:
        print("mmts: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # | head: whoever read us has enough
        _close(sys.stdout)
        return 141
    except Exception as error:
        print(f"mmts: error: {_told(error, parsed)}", file=sys.stderr)
        if os.environ.get("MMTS_DEBUG"):
            raise
        return 2 if isinstance(error, (MMTSError, OSError, UnicodeEncodeError)) else 70
    if launched is not None:
        try:
            launched()  # its errors are its own, tracebacks and all
        except MMTSError as error:
            print(f"mmts: error: {error}", file=sys.stderr)
            return 2
    return code


def _told(error: Exception, parsed: argparse.Namespace) -> str:
    """:func:`last_resort`, and the file where the system does not name it."""
    output = getattr(parsed, "output", None)
    if isinstance(error, UnicodeEncodeError):
        return one_line(f"{shown(error.object)}: a name that is not UTF-8 cannot be used here; rename it")
    if not isinstance(error, OSError) or error.filename is not None:
        return last_resort(error)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        _close(sys.stdout)
        output = None
    return one_line(f"{output or 'standard output'}: cannot be written: {cause(error)}; make room, or write elsewhere")


def _close(stream: Any) -> None:
    """Let nothing more be written: the interpreter's last flush would fail again, with a traceback."""
    with suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    """What is wrong in one line, as for every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from . import doctor
    from .clustering import command as cluster
    from .clustering import stability_command as stability
    from .compare import command as compare
    from .demo import command as demo
    from .evaluation import command as evaluation
    from .report import command as report

    parser = _Parser(
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


def _launch(arguments: list[str], local_rank: list[str]) -> Callable[[], object]:
    """Arm the hosts, and what then becomes the target, as ``python -m`` or ``python SCRIPT`` would; it gets its rank.

    Raises:
        ConfigError: there is no such target, or it is asked for a schedule that nothing here can apply.
    """
    import runpy

    from ._startup import asks_for_us
    from .hosts import registry

    registry.install_all()
    as_module = arguments[0] == "-m"
    if as_module and len(arguments) < 2:
        raise ConfigError("mmts run -m: which module? For example: mmts run -m open_clip_train.main --loss mmts ...")
    target, rest = (arguments[1], arguments[2:]) if as_module else (arguments[0], arguments[1:])
    safe_path = getattr(sys.flags, "safe_path", False)
    if as_module and not safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # where `python -m` looks first
    _check_exists(target, as_module)
    hosts = [host for host in registry.hosts() if host.starts(target, as_module)] if asks_for_us(rest) else []
    if asks_for_us(rest) and not hosts:
        known = dict.fromkeys(name for host in registry.hosts() for name in host.start_modules or ())
        problems = "".join(f"; {each}" for each in registry.broken())
        raise ConfigError(
            f"no adapter for {shown(target)}, so --loss mmts would do nothing; known: {', '.join(known)}{problems}"
        )
    sys.argv = [target, *local_rank, *rest]
    if as_module:
        started: Callable[[], object] = partial(runpy.run_module, target, run_name="__main__", alter_sys=True)
    else:
        if not safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(target))  # where `python SCRIPT` looks first
        started = partial(runpy.run_path, target, run_name="__main__")
    only_libraries = bool(hosts) and all(host.start_modules is None for host in hosts)
    return partial(_run_and_see, started, target) if only_libraries else started


def _run_and_see(started: Callable[[], object], target: str) -> None:
    """Run what may be a script of a library's user, and end with an error where nobody took the flags.

    Raises:
        SeamError: they are still on the command line. A host whose seam takes them is told before it trains.
    """
    from . import options

    started()
    if not options.taken:
        raise SeamError(f"{shown(target)} ended, and no adapter took --loss: what it trained, it trained without MM-TS")


def _check_exists(target: str, as_module: bool) -> None:
    if not as_module:
        if not target or "\0" in target or not os.path.exists(target):
            raise ConfigError(f"mmts run: there is no script {shown(target)}; for a module: mmts run -m MODULE")
        if os.path.isdir(target) and not os.path.exists(os.path.join(target, "__main__.py")):
            raise ConfigError(f"mmts run: {shown(target)} is a folder without a __main__.py; give the script in it")
        return
    import importlib.util

    try:
        found = not target.startswith(".") and importlib.util.find_spec(target) is not None
    except Exception as error:
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        if target and (name is None or not f"{target}.".startswith(f"{name}.")):
            return  # a package around it cannot be imported: Python says so when it runs
        found = False
    if not found:
        raise ConfigError(
            f"mmts run -m: there is no module {shown(target)} in this environment ({sys.executable}); for a file: "
            "mmts run SCRIPT"
        )
