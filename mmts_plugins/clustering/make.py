"""From captions, labels or counts to a cluster table: the work of ``mmts cluster``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from .. import __version__, versions
from ..data import encoders
from ..data.captions import how_read, left_out, read_samples
from ..data.classes import class_table, read_class_counts
from ..data.source import Source
from ..errors import MMTSError
from ..tables import ClusterTable
from . import build, stability, stages
from .estimate import Recipe, estimate, resolve
from .prepare import Embedding, file_name, prepare, read, say, tell, warn


def from_counts(path: str) -> ClusterTable:
    """A table of classes from published counts (``class_id,count``).

    Raises:
        MMTSError: they cannot be read.
    """
    if not Path(path).exists():
        raise MMTSError(f"{path}: no such file (--class-counts)")
    ids, count, notes = read_class_counts(path)
    warn(notes)
    return class_table(ids, count, _info("class counts", path))


def from_labels(source: Source, columns: str) -> ClusterTable:
    """A table of the classes in some columns (joined by commas); with a column of captions, of the captions by class.

    Raises:
        MMTSError: they cannot be read.
    """
    samples = read_samples(source, columns.split(","), captions=source.column is not None)
    tell(source, samples)
    info = _info("labels", source.data, column=samples.column, label_column=columns, read=samples.how)
    if source.column is None:
        ids, rows = build.distinct(samples.labels)
        return class_table(ids, build.counted(rows, samples.weight), info)
    table, several = build.labelled_table(samples.captions, samples.labels, info, samples.weight)
    if several:
        warn([f"{source.data}: {several} captions occur under several labels; each takes its commonest"])
    return table


def from_captions(source: Source, how: Embedding, recipe: Recipe, keep_blank: bool = False) -> ClusterTable:
    """A table of captions, by their embeddings.

    Raises:
        MMTSError: they cannot be read or embedded.
    """
    say(f"reading {source.data}")
    samples = read(source, how, keep_blank)
    about: dict[str, Any] = {"source": file_name(source.data), "column": samples.column, "read": samples.how}
    data = prepare(how, recipe, samples, file_name(source.data))
    recipe = resolve(data.points, recipe)
    say(f"{recipe.describe()}, over {len(data.points):,} embeddings of {data.points.width} dimensions")
    done = estimate(data.points, data.weight, recipe, data.hashes)
    backend = {"sklearn": ("scikit-learn",), "faiss": ("faiss-cpu",)}.get(recipe.algorithm, ("torch",))
    info = _info("k-means" if recipe.estimator == "kmeans" else "density",
                 packages=dict.fromkeys((*backend, *data.packages)), encoder=data.encoder, **recipe.record(),
                 unique=len(data.keys), duplicates=len(samples.captions) - len(data.keys),
                 stability=stability.of_runs(done, data.weight, recipe), **about)  # fmt: skip
    cluster, frequency = done.cluster, done.frequency
    if data.point is not None:
        cluster, frequency = cluster[data.point], frequency[data.point]
    return build.clustered_table(data.keys, data.rows, data.count, cluster, frequency, info)


def on_ray(
    source: Source, how: Embedding, recipe: Recipe, keep_blank: bool, output: str, workers: Optional[int] = None
) -> str:
    """:func:`from_captions` of any size, on Ray; the table is a folder, ``output``.

    Returns:
        What to tell the user.

    Raises:
        MMTSError: see :func:`.ray_engine.build`.
    """
    from . import ray_engine

    if any(part.kind not in ("webdataset", "parquet") for part in source.parts):
        warn([f"{source.data}: only Parquet and WebDataset are read in parallel and in bounded memory"])
    failed = left_out(source)
    warn([failed] if failed else [])
    job = stages.Job(f"{output.rstrip('/')}.work", source, how.encoder, how.batch_size, how.device, how.cached,
                     keep_blank, recipe)  # fmt: skip
    info = _info("k-means", source.data, packages=("ray", "torch", *encoders.packages(how.encoder)),
                 encoder=encoders.public_name(how.encoder), column=source.column,
                 read=how_read(source), **recipe.record())  # fmt: skip
    measured = ray_engine.build(job, output, info, workers)
    return f"stability: {measured['verdict']}\nWritten to {output}, a folder of Parquet parts."


def _info(method: str, source: str = "", packages: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    of_packages = {name: versions.installed_version(name) for name in ("numpy", *packages)}
    return {
        "method": method,
        "source": file_name(source),
        **more,
        "versions": {"mmts-plugins": __version__, "python": sys.version.split()[0], **of_packages},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
