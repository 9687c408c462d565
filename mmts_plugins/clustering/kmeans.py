"""K-Means over embeddings, and cluster sizes averaged over several runs."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError


@dataclass(frozen=True)
class Clustering:
    """What K-Means says about each row.

    Attributes:
        cluster: ``[n]`` the row's cluster in the first run.
        frequency: ``[n]`` float64, the size in samples of the row's cluster, averaged over the runs.
    """

    cluster: np.ndarray
    frequency: np.ndarray


def cluster(
    points: np.ndarray, weight: np.ndarray, clusters: int, runs: int = 1, seed: int = 0, threads: int = 2
) -> Clustering:
    """K-Means with the seeds ``seed .. seed + runs - 1``.

    Args:
        points: ``[n, d]`` finite.
        weight: ``[n]`` how many samples each row stands for: it pulls the centres, and counts in the sizes.
        clusters: how many; every one of them ends up non-empty.
        threads: two partial sums add up the same in either order, more do not: from three threads on, the same seed
            may give another table.

    Raises:
        ConfigError: ``points`` has fewer distinct rows than ``clusters``.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    if points.dtype != np.float64:
        points = np.asarray(points, np.float32)
    first = np.zeros(len(points), np.int64)
    total = np.zeros(len(points))
    for run in tqdm(range(runs), desc="k-means", unit="run", file=sys.stderr, disable=runs == 1):
        model = KMeans(clusters, n_init=1, random_state=seed + run, algorithm="lloyd")
        # The k-means++ start makes thousands of small products: with threads of their own they take ten times as long.
        with threadpool_limits({"openmp": threads, "blas": 1}), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # too few distinct points: said below
            labels = model.fit(points, sample_weight=weight).labels_
        found = len(np.unique(labels))
        if found < clusters:
            raise ConfigError(
                f"only {found} of {clusters} clusters hold a sample: too many embeddings are equal; "
                f"lower -k/--clusters to {found} or less, or use an encoder that tells the captions apart"
            )
        if run == 0:
            first = labels
        total += np.bincount(labels, weights=weight)[labels]
    return Clustering(first, total / runs)
