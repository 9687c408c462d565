"""``mmts cluster --engine ray``: the stages of :mod:`.stages` on Ray Data, on one machine or a cluster.

Ray schedules parts over a pool of actors, each of which loads the encoder once and runs one thread, and restarts what
fails. All state is in files below ``OUTPUT.work``, which all nodes must see; kill the run at any moment and the same
command goes on from the parts that are finished. The K-Means fit itself is small and runs in the driver.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from .._files import replacing
from ..data.captions import unit_weights, units
from ..data.rows import Rows
from ..errors import MMTSError
from . import kmeans, stability
from .estimate import Estimate
from .stages import Job, Worker, choose, plan_merge, read_part


def build(job: Job, output: str, info: dict[str, Any], workers: Optional[int] = None) -> dict[str, Any]:
    """From captions to a table: a folder of Parquet parts at ``output``.

    Args:
        job: what to read and compute; its folder keeps the intermediate files, and is removed at the end.
        output: the folder of the table; appears when all its parts are there.
        info: for the table's metadata.
        workers: processes; default: the CPUs of the Ray cluster.

    Returns:
        The stability of the runs, see :func:`.stability.of_runs`.

    Raises:
        MMTSError: ray is missing, a part cannot be read, embedded or written (each names the file).
    """
    files = units(job.source)
    job.claim(files)
    with _Pool(job, workers) as pool:
        weights = unit_weights(job.source)
        pool.run("count", [{"unit": unit, "weight": weights[_file_of(unit, weights)]} for unit in files])
        ranges = plan_merge(job, len(files))
        pool.run("merge", [{"buckets": part, "units": len(files)} for part in ranges])
        parts = len(ranges)
        _choose_and_fit(job, pool, parts)
        pool.run("assign", [{}] * parts)
        measured, table = _totals(job, parts)
        unfinished = f"{job.folder}/table-{table}"  # whatever an earlier run left of another table is not in there
        whole = {**info, "stability": measured, "parts": parts, "table": table}
        pool.run("finish", [{"info": whole, "output": unfinished}] * parts)
    if Path(output).exists():
        shutil.rmtree(output)  # --force: checked before the run
    os.replace(unfinished, output)
    shutil.rmtree(job.folder)
    return measured


def _file_of(unit: str, files: Mapping[str, int]) -> str:
    return unit if unit in files else unit.rpartition("#")[0]


class _Pool:
    """Ray Data's actor pool, one task per part."""

    def __init__(self, job: Job, workers: Optional[int]) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise MMTSError(f"--engine ray needs Ray Data ({error}): pip install 'mmts-plugins[ray]'") from error
        self._ray, self._job, self._workers = ray, job, workers

    def __enter__(self) -> _Pool:
        self._ours = not self._ray.is_initialized()
        if self._ours:
            local: dict[str, Any] = (
                {}
                if os.environ.get("RAY_ADDRESS")
                else {"address": "local", "num_cpus": self._workers, "include_dashboard": False}
            )
            self._ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **local)
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        available = int(self._ray.cluster_resources().get("CPU", 1))
        self._size = min(self._workers or available, available)
        # Ray's own line about every stage says nothing that ours does not.
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ray.shutdown()

    def run(self, stage: str, arguments: Sequence[dict[str, Any]]) -> None:
        """Run a stage on every part."""
        print(f"{stage}: {len(arguments)} parts", file=sys.stderr)
        tasks = [{"part": part, "arguments": given} for part, given in enumerate(arguments)]
        data = self._ray.data.from_items(tasks, override_num_blocks=len(tasks))
        if stage in ("sample", "assign"):  # they keep an encoder
            gpus = int(self._ray.cluster_resources().get("GPU", 0))
            size = min(self._size, len(tasks), gpus or len(tasks))
            options: dict[str, Any] = {"fn_constructor_args": (self._job, stage), "concurrency": size}
            done = data.map_batches(_Actor, batch_size=1, num_cpus=1, num_gpus=1 if gpus else 0, **options)
        else:
            given = {"job": self._job, "stage": stage}
            task: Any = _task
            done = data.map_batches(task, batch_size=1, num_cpus=1, concurrency=self._size, fn_kwargs=given)
        for row in done.iter_rows():
            if row["error"]:
                raise MMTSError(row["error"])


def _task(batch: dict[str, np.ndarray], job: Job, stage: str) -> dict[str, np.ndarray]:
    return _Actor(job, stage)(batch)


class _Actor:
    """A worker process of the pool. An error that a user can mend travels as a row: Ray would wrap and retry it."""

    def __init__(self, job: Job, stage: str) -> None:
        import torch

        torch.set_num_threads(1)
        self._worker, self._stage = Worker(job), stage

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        error = ""
        for part, arguments in zip(batch["part"], batch["arguments"]):
            given = {name: tuple(x) if isinstance(x, (list, np.ndarray)) else x for name, x in arguments.items()}
            try:
                self._worker.run(self._stage, int(part), **given)
            except MMTSError as problem:
                error = str(problem)
            except OSError as problem:
                error = f"stage {self._stage}, part {int(part)}: {problem}; make room and run the same command again"
        return {"error": np.array([error], dtype=object)}


def _choose_and_fit(job: Job, pool: _Pool, parts: int) -> None:
    """Draw the fit samples, embed them in the pool, fit every run here and leave ``centres.npy``."""
    target = Path(job.folder) / "centres.npy"
    if target.exists():
        return
    chosen, weights, total = choose(job, parts)
    recipe = job.recipe
    if recipe.clusters > total:
        raise kmeans.too_few(total, recipe.clusters)
    rows = np.unique(np.concatenate(chosen))
    start, used = 0, []
    for part in range(parts):
        end = start + read_part(job.path("merge", part), ["count"]).num_rows
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
        path = job.path("chosen", part, ".npy")
        if not path.exists():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, inside)
        if len(inside):
            used.append(part)
        start = end
    pool.run("sample", [{"wanted": part in used} for part in range(parts)])
    points = Rows([np.load(job.path("sample", part, ".npy"), mmap_mode="r", allow_pickle=False) for part in used])
    centres = []
    with kmeans.torch_threads(recipe.threads):
        for run in range(recipe.runs):
            taken = points.take(np.searchsorted(rows, chosen[run]))
            centres.append(kmeans.fit(taken, weights[run], recipe.clusters, recipe.seed + run, recipe.device))
    with replacing(target) as temporary, temporary.open("wb") as file:
        np.save(file, np.stack(centres))


def _totals(job: Job, parts: int) -> tuple[dict[str, Any], str]:
    """Leave ``sizes.npy``, ``[R, K]`` samples per cluster over all parts.

    Returns:
        The stability of the runs, and a word for the table: a digest of all that its parts are made of.
    """
    recipe = job.recipe
    sizes = np.zeros((recipe.runs, recipe.clusters))
    kept_labels, kept_counts = [], []
    digest = hashlib.blake2b(digest_size=16)
    for part in range(parts):
        merged = read_part(job.path("merge", part), ["hash", "count"])
        count = merged["count"].to_numpy().astype(np.float64)
        labels = np.stack([column.to_numpy() for column in read_part(job.path("assign", part)).columns])
        for numbers in (np.array([len(count)]), merged["hash"].to_numpy(), count, labels):
            digest.update(np.ascontiguousarray(numbers).data)
        for run in range(recipe.runs):
            sizes[run] += np.bincount(labels[run], weights=count, minlength=recipe.clusters)
        share = np.arange(0, len(count), max(parts * len(count) // stability.ROWS, 1))
        kept_labels.append(labels[:, share])
        kept_counts.append(count[share])
    for run_sizes in sizes:
        if not run_sizes.all():
            raise kmeans.too_few(int(np.count_nonzero(run_sizes)), recipe.clusters)
    with replacing(Path(job.folder) / "sizes.npy") as temporary, temporary.open("wb") as file:
        np.save(file, sizes)
    labels = np.concatenate(kept_labels, axis=1)
    done = Estimate(labels[0], kmeans.Clustering(labels, sizes, np.zeros(recipe.runs)))
    return stability.of_runs(done, np.concatenate(kept_counts), recipe), digest.hexdigest()
