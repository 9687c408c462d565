"""Run OpenCLIP's own trainer, and our own command line, as subprocesses with a progress bar."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ..errors import MMTSError
from ..report.logs import Progress, parse_progress, record_beside

TRAINER = "open_clip_train.main"
_TAIL_LINES = 25
_SHOWN = 160  # characters of a command in a message, which is to end with what the command said
_KEEPER = Path(__file__).resolve().parents[1] / "_keeper.py"


@dataclass(frozen=True)
class TrainingRun:
    """A finished run of the trainer.

    Attributes:
        name: the run's name, a folder under ``logs``.
        command: what was run, for a human to repeat.
        checkpoint: the last one.
        seconds: wall clock, start-up included.
        progress: the log lines read on the way.
    """

    name: str
    command: str
    checkpoint: Path
    seconds: float
    progress: list[Progress]


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
    parent = Path(__file__).resolve().parents[2]
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


def train(
    name: str,
    flags: Sequence[str],
    folder: Path,
    epochs: int,
    mmts_flags: Sequence[str] = (),
    logs: str = "runs",
) -> TrainingRun:
    """Train with ``open_clip_train.main``, plain or with our flags, showing one progress bar.

    Args:
        name: name of the run and label of the bar.
        flags: OpenCLIP's own flags, the same for every run that is to be compared.
        folder: where the trainer runs; relative paths in flags and data are relative to it.
        epochs: number of epochs.
        mmts_flags: ``--loss mmts ...``; empty for a plain run.
        logs: OpenCLIP's ``--logs``.

    Raises:
        MMTSError: the trainer failed, or ended without the checkpoint (or our config) that it should have written.
    """
    from tqdm import tqdm

    # The launcher works however this package came onto the path; an installed one needs only `-m open_clip_train.main`.
    module = ["-m", "mmts_plugins", "run", "-m", TRAINER] if mmts_flags else ["-m", TRAINER]
    command = [sys.executable, *module, *flags, "--epochs", str(epochs), "--logs", logs, "--name", name, *mmts_flags]
    progress: list[Progress] = []
    started = time.monotonic()
    with tqdm(
        total=epochs,
        desc=f"train {name}",
        bar_format="  {desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        mininterval=0.5 if sys.stderr.isatty() else 15,  # a log file wants few lines
    ) as bar:

        def on_line(line: str) -> None:
            seen = parse_progress(line)
            if seen is not None:
                progress.append(seen)
                bar.set_postfix_str(f"loss {seen.loss:.3f}", refresh=False)
                bar.update(seen.epochs - bar.n)

        run_logged(command, folder, on_line)
    checkpoint = folder / logs / name / "checkpoints" / f"epoch_{epochs}.pt"
    # OpenCLIP exits with 0 on some errors (a run of this name exists), and a lost flag would train plain CLIP.
    for expected in (checkpoint, *([record_beside(checkpoint)] if mmts_flags else [])):
        if not expected.is_file():
            raise MMTSError(f"the run ended without writing {expected}: {shown(command)}")
    return TrainingRun(name, shown(command), checkpoint, time.monotonic() - started, progress)
