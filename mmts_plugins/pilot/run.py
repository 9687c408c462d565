"""A pilot as ``mmts pilot`` runs it: variants over seeds in worker processes, within a budget, and what came out."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from .._files import replacing
from ..compare import tables
from ..compare.plan import BOTH, CONSTANT, ICS, PLAIN, SHUFFLED, TS, Plan
from ..data.encoders import digest
from ..errors import ConfigError, MMTSError, one_line, reading, shown
from ..hosts.adapter import Adapter
from . import data, report
from .train import Settings, train

MAIN = "text_to_other_R@10"
"""What variants are judged by."""
_clock = time.monotonic


@dataclass(frozen=True)
class Variant:
    """Something to try.

    Attributes:
        name: in tables.
        flags: to train with, as one gives them to the host; empty: CLIP's learned temperature.
    """

    name: str
    flags: str = ""

    def words(self, seed: int) -> list[str]:
        return [word.replace("{seed}", str(seed)) for word in shlex.split(self.flags)]


Task = tuple[Variant, int]
"""A variant and a seed."""


def usual(loss: str, table_files: dict[str, str], more: str, plain_is_learned: bool) -> list[Variant]:
    """The schedule, the shifts of each table, both, and their controls; ``more`` are flags of all of them.

    Args:
        loss: of ``--loss``.
        table_files: by name; with one table its name is left out of the variants'.
        plain_is_learned: whether the loss has a temperature that can be learned; else plain is the middle, fixed.
    """
    own = f"--loss {loss} {more}".strip()
    fixed = f"{own} --mmts-no-schedule --mmts-no-shifts"
    found = [Variant(PLAIN, "" if plain_is_learned else fixed), Variant(TS, f"{own} --mmts-no-shifts")]
    for name, file in table_files.items():
        about = f" {name}" if len(table_files) > 1 else ""
        table = f"--mmts-clusters {shlex.quote(file)}"
        found += [
            Variant(CONSTANT + about, f"{fixed} {table} --mmts-mean-matched"),
            Variant(ICS + about, f"{own} {table} --mmts-no-schedule"),
            Variant(SHUFFLED + about, f"{own} {table} --mmts-shuffle-shifts {{seed}}"),
            Variant(BOTH + about, f"{own} {table}"),
        ]
    return found


def grid(loss: str, table_files: dict[str, str], more: str, axes: dict[str, list[str]]) -> list[Variant]:
    """Every combination of some of our flags' values, with the first table."""
    table = next(iter(table_files.values()))
    own = f"--loss {loss} {more} --mmts-clusters {shlex.quote(table)}"
    found = [("", own)]
    for name, values in axes.items():
        flag = "--mmts-" + name.replace("_", "-")
        found = [(f"{label} {name} {value}", f"{flags} {flag} {value}") for label, flags in found for value in values]
    return [Variant(f"{BOTH}{label}", flags) for label, flags in found] if axes else []


def contrasts(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """All with the first; and what has a table with its controls."""
    names = [variant.name for variant in variants]
    pairs = [(name, names[0]) for name in names[1:]]
    for name in names:
        for control in (CONSTANT, SHUFFLED):
            other = name.replace(BOTH, control, 1)
            if name.startswith(BOTH) and other in names:
                pairs.append((name, other))
    return pairs


def pilot(
    folder: Path,
    adapter: Adapter,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    settings: Settings,
    budget: float,
    jobs: int,
) -> int:
    """Run what is not there yet, seed by seed, until the budget is spent; then write and print what came out.

    Args:
        folder: with the features in it (:func:`.data.store`); results go there.
        budget: minutes in which runs may start and are expected to end.
        jobs: runs at a time, a process and a thread each.

    Returns:
        The exit status: 1 where runs are missing, because of the budget.

    Raises:
        ConfigError: the folder holds another pilot's results, or too few samples for a schedule.
    """
    training, test, _ = data.load(folder / data.FOLDER)
    if settings.steps(len(training)) < 10:
        raise ConfigError(
            f"--epochs {settings.epochs} and --batch-size {settings.batch_size} make "
            f"{settings.steps(len(training))} steps of {len(training)} pairs: too few for a schedule"
        )
    started = _clock()
    tasks = [(variant, seed) for seed in seeds for variant in variants]
    keys = _keys(folder, tasks, settings)
    done = {task: found for task in tasks if (found := _saved(folder, *task, keys[task])) is not None}
    missing = {task: keys[task] for task in tasks if task not in done}
    print(
        f"{len(training):,} pairs to train on, {len(test):,} to test; {len(variants)} variants, {len(seeds)} seeds, "
        f"{settings.steps(len(training))} steps; {len(done)} of {len(tasks)} runs are there",
        file=sys.stderr,
    )
    for task, found in _run(folder, adapter, missing, settings, 60 * budget, jobs, started):
        done[task] = found
    if not done:
        raise MMTSError(f"--budget {budget:g}: not one run ended in it")
    # Whole seeds alone, or differences seed by seed would be of other seeds for each variant.
    whole = [seed for seed in seeds if all((variant, seed) in done for variant in variants)]
    if not whole:
        raise MMTSError(
            f"--budget {budget:g}: {len(done)} of {len(variants)} runs of the first seed ended; call again to go on"
        )
    text = report.write(folder, variants, whole, {(v.name, s): done[v, s] for v in variants for s in whole}, settings)
    print(text)
    if len(whole) < len(seeds):
        print(
            f"The budget of {budget:g} minutes was enough for {len(whole)} of {len(seeds)} seeds; call again for more."
        )
        return 1
    return 0


def _run(
    folder: Path,
    adapter: Adapter,
    tasks: dict[Task, str],
    settings: Settings,
    seconds: float,
    jobs: int,
    started: float,
) -> Iterator[tuple[Task, dict[str, Any]]]:
    from tqdm import tqdm

    if not tasks:
        return
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    waiting, longest = list(tasks), 0.0
    running: dict[Future[dict[str, Any]], Task] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, _one_thread)
    with pool, tqdm(total=len(tasks), unit="run", desc="pilot", file=sys.stderr) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and _clock() - started + longest < seconds:
                    task = waiting.pop(0)
                    running[pool.submit(_work, folder, adapter.name, *task, settings, tasks[task])] = task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    found = future.result()
                    longest = max(longest, found["seconds"])
                    bar.update()
                    yield task, found
        finally:
            for future in running:
                future.cancel()
            pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # so that a run is the same to the bit, however many run


def _work(folder: Path, host: str, variant: Variant, seed: int, settings: Settings, key: str) -> dict[str, Any]:
    from ..preview import adapter_of

    began = _clock()
    found = train(folder / data.FOLDER, adapter_of(host), variant.words(seed), seed, settings)
    found = {"key": key, "seconds": _clock() - began, **found}
    with replacing(_place(folder, variant, seed)) as temporary:
        temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def _place(folder: Path, variant: Variant, seed: int) -> Path:
    short = hashlib.blake2b(f"{variant.name}\0{variant.flags}".encode(), digest_size=6).hexdigest()
    return folder / "runs" / f"{short}-seed{seed}.json"


def _keys(folder: Path, tasks: Sequence[Task], settings: Settings) -> dict[Task, str]:
    """What each run depends on: its flags and settings, the features, and the tables as they are."""
    about = (folder / data.FOLDER / "about.json").read_text(encoding="utf-8")
    tables: dict[str, str] = {}
    found = {}
    for variant, seed in tasks:
        words = variant.words(seed)
        for before, word in zip(words, words[1:]):
            if before == "--mmts-clusters" and word not in tables and Path(word).is_file():
                tables[word] = digest(Path(word))
        own = {word: tables[word] for word in words if word in tables}
        text = json.dumps([words, seed, asdict(settings), about, own])
        found[variant, seed] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return found


def _saved(folder: Path, variant: Variant, seed: int, key: str) -> Optional[dict[str, Any]]:
    path = _place(folder, variant, seed)
    if not path.exists():
        return None
    with reading(path, "is no result of a pilot; delete it"):
        found = json.loads(path.read_text(encoding="utf-8"))
        then = found["key"]
    if then != key:
        raise data.other_results(folder, f"{shown(variant.name)}, seed {seed}")
    return dict(found)


def plan_of(folder: Path, variants: Sequence[Variant], seeds: Sequence[int]) -> Plan:
    """The pilot as :mod:`..compare.tables` takes it."""
    metrics = ["text_to_other_R@1", MAIN, "other_to_text_R@1", "other_to_text_R@10"]
    return Plan([], [each.name for each in variants], list(seeds), contrasts(variants), metrics, folder, folder)


def values_of(variants: Sequence[Variant], results: dict[tuple[str, int], dict[str, Any]]) -> tables.Values:
    """``[variant][metric][group][seed]`` of the runs' results."""
    values: tables.Values = {variant.name: {} for variant in variants}
    for (name, seed), found in results.items():
        for metric, groups in tables.metrics_of(found, name).items():
            for group, value in groups.items():
                values[name].setdefault(metric, {}).setdefault(group, {})[seed] = value
    return values


def parse_axes(given: Sequence[str]) -> dict[str, list[str]]:
    """``name=value,value`` of ``--grid``.

    Raises:
        ConfigError: it is not of that form.
    """
    axes: dict[str, list[str]] = {}
    for each in given:
        name, equals, values = each.partition("=")
        if not equals or not name or not all(values.split(",")):
            raise ConfigError(f"--grid {shown(each)}: write a flag without --mmts-, and values: alpha=0.02,0.04")
        axes[name] = values.split(",")
    return axes


def parse_tables(given: Sequence[str]) -> dict[str, str]:
    """Cluster tables by their names: ``name=FILE``, or the file's own.

    Raises:
        ConfigError: two of one name.
    """
    found: dict[str, str] = {}
    for each in given:
        name, equals, file = each.partition("=")
        if not equals:
            name, file = Path(each).stem, each
        if name in found or not one_line(name):
            raise ConfigError(f"--table {shown(each)}: two tables are called {shown(name)}; write name=FILE")
        found[name] = file
    return found
