"""Commands run as processes of ours, their output handed over line by line; what they start ends with us."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Optional

from .errors import MMTSError

_TAIL_LINES = 25
_CHATTER = re.compile(r"[DI][01]\d{3} \d\d:\d\d:\d\d\.\d+ \d+ \S*/torch/")
"""What torch says of its compiler when a process ends whose root logger is at INFO, as OpenCLIP's: not why it ended."""
_SHOWN = 160  # characters of a command in a message, which is to end with what the command said
_KEEPER = Path(__file__).resolve().parent / "_keeper.py"


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shown(command: Sequence[str]) -> str:
    """A command as a human types it."""
    return shlex.join(["python" if part == sys.executable else part for part in command])


def run_logged(
    command: Sequence[str],
    folder: Path,
    on_line: Callable[[str], None] = lambda line: None,
    held: Optional[int] = None,
    kept: bool = True,
) -> None:
    """Run a command in ``folder`` and hand over its output, standard error included, line by line.

    Args:
        command: what to run.
        folder: where.
        on_line: given each line.
        held: a descriptor that the command gets too, such as a lock that is to last as long as the command.
        kept: end everything that the command started when it ends, and when this process does, however that comes
            about. False for a launcher that leaves something behind on purpose.

    Raises:
        MMTSError: it could not be started, or failed; the message ends with the last lines of its output.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    parent = Path(__file__).resolve().parents[1]
    if parent.name not in ("site-packages", "dist-packages"):
        # A checkout may be on our path only as "", the current folder, and the child runs in another one.
        path = [str(parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    for many in ("WORLD_SIZE", "SLURM_NTASKS"):  # inside a job, OpenCLIP would wait for ranks that never start
        environment.pop(many, None)
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    kept = kept and os.name == "posix"
    life, mine = os.pipe()  # closes with us
    lent = [life, *([] if held is None else [held])]
    keeper = [sys.executable, "-IS", str(_KEEPER), str(life), str(-1 if held is None else held)]
    try:
        with subprocess.Popen(
            [*keeper, *command] if kept else command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            pass_fds=lent if kept else (),
            start_new_session=kept,  # Ctrl-C comes to us, and from us to the command
        ) as process:
            assert process.stdout is not None
            try:
                os.close(life)
                life = -1
                for line in process.stdout:
                    if not _CHATTER.match(line):
                        tail.append(line.rstrip())
                    on_line(line)
            except BaseException:
                # Ctrl-C, or a fault of ours: do not leave a trainer behind.
                if kept:
                    os.close(mine)
                    mine = -1
                    while os.read(process.stdout.fileno(), 1 << 16):  # a full pipe would keep it from ending
                        pass
                else:
                    process.kill()
                raise
    except OSError as error:
        if error.filename is None:  # of on_line: not ours to explain
            raise
        raise MMTSError(f"cannot start {command[0]}: {error.filename}: {error.strerror}") from error
    finally:
        for end in (life, mine):
            if end >= 0:
                os.close(end)
    if process.returncode:
        text = shown(command)
        short = text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
        raise MMTSError(f"{_ended(process.returncode)} from: {short}: " + "\n".join(tail))


def _ended(code: int) -> str:
    by = abs(code) - 128 * (code > 0)  # a shell and our keeper say 128 and the signal
    with suppress(ValueError):
        return f"exit code {code} ({signal.Signals(by).name})"
    return f"exit code {code}"
