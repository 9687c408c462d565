"""The command ``mmts``: cluster captions, plan and run, check, see it work, evaluate, compare, report."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn, Optional

from . import __version__
from .commands import COMMANDS
from .errors import ConfigError, MMTSError, cause, last_resort, one_line, reading, shown
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
            from .launcher import launch

            launched = launch(arguments[1:], local_rank)  # what follows belongs to the host, flags and all
        else:
            try:
                with reading("the command line", "cannot be understood", ConfigError):
                    # As a run takes them: a preview's errors are the run's.
                    flags, rest = split_flags(arguments[1:]) if arguments[:1] == ["schedule"] else ({}, arguments[1:])
                    arguments = [*arguments[:1], *rest]
                    parsed = _parser(next((word for word in arguments if word[:1] != "-"), "")).parse_args(arguments)
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


def _parser(command: str = "") -> argparse.ArgumentParser:
    """Of ``mmts``, which knows its commands by name, and one of them whole."""
    parser = _Parser(
        prog="mmts",
        description="MM-TS: temperature and margin schedules for contrastive trainers (arXiv 2603.08202).",
        epilog="Start with `mmts demo`, or: mmts cluster train.tsv -o clusters.parquet, then add "
        "--loss mmts --mmts-clusters clusters.parquet to your training command.",
    )
    parser.add_argument("--version", action="version", version=f"mmts-plugins {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, about in COMMANDS.items():
        if name == command:
            import_module(f"{__package__}.commands.{name}").add_parser(commands, about)
        else:
            commands.add_parser(name, help=about)
    return parser
