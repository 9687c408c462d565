"""Which of the two reports the inputs ask for, and writing it: the work of ``mmts report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._files import check_writable
from ..errors import ConfigError
from ..record import FILE_NAME, LOG_NAME
from . import run, table

_OF_RUNS = (FILE_NAME, LOG_NAME, "out.log", "log.txt", "results.jsonl")


def report(inputs: Sequence[str], folder: Path, options: table.Options) -> list[Path]:
    """Write the report of tables, or that of runs.

    Args:
        inputs: tables, or folders of runs.
        folder: to write.
        options: of a report of tables.

    Returns:
        The files written.

    Raises:
        ConfigError: an input is not there, or they are of both kinds.
    """
    for path in inputs:
        if not Path(path).exists():
            raise ConfigError(f"{path}: no such table or run")
    tables = [_is_table(Path(path)) for path in inputs]
    if all(tables):
        return table.write(inputs, folder, options)
    if any(tables):
        raise ConfigError("tables and runs are two reports: call mmts report once for each")
    return run.write(inputs, folder)


def _is_table(path: Path) -> bool:
    """A Parquet or CSV file, or a folder of Parquet parts that is no run's."""
    if path.is_file():
        return path.name not in _OF_RUNS
    is_run = any((place / name).exists() for place in (path, path / "checkpoints") for name in _OF_RUNS)
    return not is_run and any(path.glob("*.parquet"))


def check_folder(folder: Path, force: bool) -> None:
    """Raise a ConfigError where a report cannot be written, or already is."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; -o/--output names a folder")
    if (folder / "report.html").exists() and not force:
        raise ConfigError(f"{folder}: holds a report already; pass --force to replace it, or another -o/--output")
    check_writable(folder / "report.html")
