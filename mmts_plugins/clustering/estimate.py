"""A recipe: how the frequency of every row is estimated. K-Means over several seeds, or a density without clusters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional

import numpy as np

from ..data.rows import Rows
from . import density, kmeans

ESTIMATORS = ("kmeans", "radius", "knn")
NEIGHBOURS = 50


@dataclass(frozen=True)
class Recipe:
    """What decides the frequencies, beside the embeddings: flags of ``mmts cluster``.

    Attributes:
        runs: K-Means runs whose sizes are averaged; for a density, samples of the references.
        radius: cosine similarity from which on another sample is a neighbour; ``None``: :func:`.density.auto_radius`.
        references: rows that a density compares with; at least as many as there are rows means all.
    """

    estimator: str = "kmeans"
    clusters: int = 200
    runs: int = 1
    seed: int = 0
    algorithm: str = "sample"
    fit_rows: int = kmeans.FIT_ROWS
    radius: Optional[float] = None
    neighbours: int = NEIGHBOURS
    references: int = density.REFERENCES
    threads: int = 2
    device: Optional[str] = None

    def describe(self) -> str:
        """In a few words, as tables and verdicts name it."""
        if self.estimator == "kmeans":
            return f"K-Means, k = {self.clusters}, {self.runs} run{'s' * (self.runs > 1)}"
        if self.estimator == "radius":
            return f"neighbours within cosine {'auto' if self.radius is None else format(self.radius, '.3f')}"
        return f"nearness of {self.neighbours} neighbours"

    def record(self) -> dict[str, Any]:
        """For the table's metadata."""
        values = asdict(self)
        del values["device"]
        unused = {"kmeans": ("radius", "neighbours", "references"), "radius": ("neighbours",), "knn": ("radius",)}
        for name in unused[self.estimator]:
            del values[name]
        return {"k": values.pop("clusters"), **values}


@dataclass(frozen=True)
class Estimate:
    """What a recipe says about n rows.

    Attributes:
        cluster: ``[n]`` from one K-Means run; for a density too, so that tables stay readable by topic.
        clustering: of K-Means; ``None`` for a density.
        densities: ``[n]`` float64 frequencies of each run of a density; none for K-Means.
        exact: nothing here depends on a seed but ``cluster``.
    """

    cluster: np.ndarray
    clustering: Optional[kmeans.Clustering] = None
    densities: Sequence[np.ndarray] = ()
    exact: bool = False

    @property
    def runs(self) -> int:
        """How many runs there were."""
        return len(self.clustering.labels) if self.clustering else len(self.densities)

    @property
    def frequency(self) -> np.ndarray:
        """``[n]`` float64, the mean over the runs."""
        return self.mean(range(self.runs))

    def mean(self, runs: Iterable[int]) -> np.ndarray:
        """``[n]`` float64, the mean over some of the runs."""
        if self.clustering is not None:
            return self.clustering.mean_size(runs)
        mean: np.ndarray = np.mean([self.densities[run] for run in runs], axis=0)
        return mean


def resolve(points: Rows, recipe: Recipe) -> Recipe:
    """The recipe with what depends on the data filled in: the radius, and one run where the references are all rows."""
    if recipe.estimator == "kmeans":
        return recipe
    if recipe.estimator == "radius" and recipe.radius is None:
        recipe = replace(recipe, radius=density.auto_radius(points, recipe.clusters))
    return replace(recipe, runs=1) if recipe.references >= len(points) else recipe


def estimate(
    points: Rows, weight: np.ndarray, recipe: Recipe, hashes: np.ndarray, with_cluster: bool = True
) -> Estimate:
    """Run a resolved recipe.

    Args:
        points: ``[n, d]``.
        weight: ``[n]`` samples per row; zero leaves a row out of the estimate, but gives it a frequency.
        hashes: ``[n]`` uint64 by which samples are drawn.
        with_cluster: a density runs K-Means once for the column ``cluster``; zeros without.
    """
    if recipe.estimator == "kmeans":
        done = kmeans.cluster(points, weight, recipe.clusters, recipe.runs, recipe.seed, recipe.threads,
                              recipe.algorithm, hashes, recipe.fit_rows, recipe.device)  # fmt: skip
        return Estimate(done.cluster, done)
    runs: list[np.ndarray] = []
    with kmeans.torch_threads(recipe.threads):
        for seed in range(recipe.seed, recipe.seed + recipe.runs):
            if recipe.estimator == "radius":
                assert recipe.radius is not None
                runs.append(density.radius_counts(points, weight, hashes, recipe.radius, recipe.references, seed,
                                                  recipe.device))  # fmt: skip
            else:
                runs.append(density.nearness(points, weight, hashes, recipe.neighbours, recipe.references, seed,
                                             recipe.device))  # fmt: skip
    cluster = np.zeros(len(points), np.int32)
    if with_cluster:
        cluster = estimate(points, weight, replace(recipe, estimator="kmeans", runs=1), hashes).cluster
    return Estimate(cluster, None, runs, recipe.references >= len(points))
