"""Run OpenCLIP's own trainer as a subprocess with a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.openclip_log import Progress, parse_progress
from ..errors import MMTSError
from ..processes import run_logged, shown
from ..report.logs import record_beside

TRAINER = "open_clip_train.main"


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
