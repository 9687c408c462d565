"""How much of a table is the data and how much is chance.

The shift of a sample is decided by its ``frequency`` relative to all others (Eq. 6), so the measure is Spearman's rank
correlation of ``frequency`` between two estimates, over training samples: a caption that occurs 40 times counts 40
times. Clusters themselves are compared by the adjusted Rand index (ARI).

Two sources of chance are told apart. *Seeds*: the same captions, other random starts. *Data*: two random halves of the
training samples, each estimated alone; every estimator has this one, also those that need no seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np

from ..data.rows import Rows
from ..tables import cluster_shift
from .estimate import Estimate, Recipe, estimate

STEADY, USABLE = 0.9, 0.7

_PAIRS = 20
_SPLITS = 20
ROWS = 100_000  # more captions than these make a correlation no surer


def spearman(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """Rank correlation of ``[n]`` and ``[n]``, each row counted ``weight`` times; ties share their mean rank.

    Where both are constant it is 1 (they say the same of every sample), where only one is, 0.
    """
    one, other = (_constant(values, weight) for values in (a, b))
    if one or other:
        return float(one and other)
    return _pearson(_ranks(a, weight), _ranks(b, weight), weight)


def _constant(values: np.ndarray, weight: np.ndarray) -> bool:
    there = values[weight > 0]
    return len(there) == 0 or bool((there == there[0]).all())


def _ranks(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    _, group = np.unique(values, return_inverse=True)
    mass = np.bincount(group, weights=weight)
    return np.asarray((np.cumsum(mass) - mass / 2)[group])


def _pearson(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    a, b = a - np.average(a, weights=weight), b - np.average(b, weights=weight)
    scale = np.sqrt(np.average(a * a, weights=weight) * np.average(b * b, weights=weight))
    return float(np.average(a * b, weights=weight) / scale)


def adjusted_rand_index(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """ARI of two clusterings (Hubert and Arabie 1985), each row counted ``weight`` times: 1 the same, 0 by chance."""
    a, b = (np.unique(labels, return_inverse=True)[1].astype(np.int64) for labels in (a, b))

    def pairs(labels: np.ndarray) -> float:
        counts = np.bincount(labels, weights=weight)
        return float((counts * (counts - 1) / 2).sum())

    cells = np.unique(a * len(a) + b, return_inverse=True)[1]
    both, first, second, every = pairs(cells), pairs(a), pairs(b), pairs(np.zeros_like(a))
    if every == 0:  # a single sample
        return 1.0
    expected = first * second / every
    highest = (first + second) / 2
    return (both - expected) / (highest - expected) if highest != expected else 1.0


def lengthened(correlation: float, factor: float) -> float:
    """Spearman-Brown: the correlation that means over ``factor`` times as many runs would have.

    One of zero or less stays: a mean of noise is noise.
    """
    return correlation if correlation <= 0 else factor * correlation / (1 + (factor - 1) * correlation)


@dataclass(frozen=True)
class Shifted:
    """How far the shifts, and so the temperatures, of the samples differ between two estimates under a preset.

    Attributes:
        mean, high: mean and 95th percentile of the absolute difference, in units of temperature (or margin).
        span: ``shift_max - shift_min``, the most that is possible.
    """

    mean: float
    high: float
    span: float


def moved(a: np.ndarray, b: np.ndarray, weight: np.ndarray, shift_min: float, shift_max: float) -> Shifted:
    """:class:`Shifted` for the frequencies ``[n]`` of two estimates."""
    gap = np.abs(cluster_shift(a, shift_min, shift_max) - cluster_shift(b, shift_min, shift_max))
    order = np.argsort(gap)
    place = np.searchsorted(np.cumsum(weight[order]), 0.95 * weight.sum())
    return Shifted(float(np.average(gap, weights=weight)), float(gap[order][min(place, len(gap) - 1)]),
                   shift_max - shift_min)  # fmt: skip


def of_runs(done: Estimate, weight: np.ndarray, recipe: Recipe) -> dict[str, Any]:
    """What the runs of one estimate say about it, at no further cost: the metadata field ``stability``.

    Keys: ``estimator``, ``runs``, ``spearman_between_seeds`` (single runs, mean over pairs), ``ari`` (the same pairs),
    ``spearman_between_halves`` (means over random halves of the runs), ``spearman_expected`` (between this estimate
    and one from other seeds, by Spearman-Brown from the halves), ``verdict``. ``None``: there is nothing to compare.
    """
    measured: dict[str, Any] = {
        "estimator": recipe.estimator,
        "runs": done.runs,
        "ari": None,
        "spearman_between_seeds": None,
        "spearman_between_halves": None,
        "spearman_expected": None,
    }
    runs, draw = done.runs, np.random.default_rng(0)
    rows = np.arange(len(weight))
    if len(rows) > ROWS:
        rows = np.sort(draw.choice(rows, ROWS, replace=False))
    weight = weight[rows]
    single = [done.mean([run])[rows] for run in range(runs)]
    equal = all(_constant(frequency, weight) for frequency in single)
    if runs > 1:
        pairs = [(i, j) for i in range(runs) for j in range(i)]
        pairs = [pairs[i] for i in draw.permutation(len(pairs))[:_PAIRS]]
        measured["spearman_between_seeds"] = _mean(spearman(single[i], single[j], weight) for i, j in pairs)
        if done.clustering is not None:
            labels = done.clustering.labels[:, rows]
            measured["ari"] = _mean(adjusted_rand_index(labels[i], labels[j], weight) for i, j in pairs)
        halves = []
        for _ in range(_SPLITS if runs > 2 else 1):
            order = draw.permutation(runs)
            one, other = order[: runs // 2], order[runs // 2 : runs // 2 * 2]
            means = [np.mean([single[run] for run in half], axis=0) for half in (one, other)]
            halves.append(spearman(means[0], means[1], weight))
        between = float(np.mean(halves))
        measured["spearman_between_halves"] = between
        measured["spearman_expected"] = lengthened(between, runs / (runs // 2))
    elif done.exact:
        measured["spearman_between_seeds"] = measured["spearman_expected"] = 1.0
    measured = {key: round(x, 4) if isinstance(x, float) else x for key, x in measured.items()}
    # One run of several clusters may be even by chance.
    equal = equal and (runs > 1 or done.exact or done.clustering is None or done.clustering.sizes.shape[1] == 1)
    measured["verdict"] = verdict(measured, done.exact, equal)
    return measured


def verdict(measured: dict[str, Any], exact: bool = False, equal: bool = False) -> str:
    """One line for people. ``equal``: every sample has the same frequency, in every run."""
    expected = measured["spearman_expected"]
    if equal:
        return "all frequencies are equal: nothing to be unstable (and nothing to schedule by)"
    if exact:
        return "steady: every sample was compared with every other, no seed is involved"
    if expected is None:
        return "not measured: one run says nothing about its noise (--runs 20, or: mmts stability)"
    what = f"rank correlation {expected:.2f} expected with other seeds, from {measured['runs']} runs"
    if expected >= STEADY:
        return f"steady: {what}"
    if expected >= USABLE:
        return f"usable: {what}; more --runs make it steadier"
    return f"noisy: {what}: shifts are largely chance; raise --runs, or lower -k"


def of_recipe(
    points: Rows, weight: np.ndarray, recipe: Recipe, hashes: np.ndarray, shifts: Optional[tuple[float, float]] = None
) -> dict[str, Any]:
    """Measure a resolved recipe by running it again: with disjoint seeds, and on two halves of the samples.

    Returns:
        :func:`of_runs`'s keys, with ``spearman_disjoint_seeds`` (this recipe against itself with the next seeds),
        ``spearman_data_halves`` and, given ``shifts`` (``shift_min``, ``shift_max``), ``moved_seeds`` and
        ``moved_data_halves``: mean and 95th percentile of the change of a sample's temperature. Those of the halves are
        ``None`` where half of the samples cannot fill as many clusters.
    """
    first = estimate(points, weight, recipe, hashes, with_cluster=False)
    measured = of_runs(first, weight, recipe)
    second = first
    if not first.exact:
        second = estimate(points, weight, replace(recipe, seed=recipe.seed + recipe.runs), hashes, with_cluster=False)
    measured["spearman_disjoint_seeds"] = spearman(first.frequency, second.frequency, weight)
    half = np.random.default_rng(recipe.seed).binomial(weight.astype(np.int64), 0.5)
    halves = [part.astype(float) for part in (half, weight - half)]
    fewest = min(np.count_nonzero(part) for part in halves)
    measured["spearman_data_halves"] = measured["moved_data_halves"] = None
    if shifts is not None:
        measured["moved_seeds"] = vars(moved(first.frequency, second.frequency, weight, *shifts))
    if fewest >= (recipe.clusters if recipe.estimator == "kmeans" else 1):
        one, other = (estimate(points, part, recipe, hashes, with_cluster=False).frequency for part in halves)
        measured["spearman_data_halves"] = spearman(one, other, weight)
        if shifts is not None:
            measured["moved_data_halves"] = vars(moved(one, other, weight, *shifts))
    return measured


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
