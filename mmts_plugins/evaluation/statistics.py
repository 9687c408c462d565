"""From one number per query to what is reported: a mean, its bootstrap interval, and the same by frequency third."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from ..config import THIRDS

LEVEL = 0.95
RESAMPLES = 1000

Statistic = Callable[[np.ndarray], float]
"""From the rows of resampled queries to a number."""


def mean(values: np.ndarray) -> float:
    """The mean over queries."""
    return float(values.mean())


def median(values: np.ndarray) -> float:
    """The median over queries."""
    return float(np.median(values))


def class_mean(values: np.ndarray) -> float:
    """``[n, 2]`` rows of (class, value): the mean over classes of the mean within each."""
    labels = values[:, 0].astype(np.int64)
    count = np.bincount(labels)
    total = np.bincount(labels, weights=values[:, 1])
    return float((total[count > 0] / count[count > 0]).mean())


@dataclass(frozen=True)
class Measure:
    """One number to report.

    Attributes:
        name: its name in ``mmts_eval.json``.
        values: ``[Q]`` or ``[Q, ...]``, a row for each query.
        statistic: what makes a number of the rows.
        queries: which queries these are (``"image"``, ``"text"``, ...); their thirds and units are looked up by it.
    """

    name: str
    values: np.ndarray
    statistic: Statistic
    queries: str


@dataclass(frozen=True)
class Queries:
    """What is known of the queries of one kind.

    Attributes:
        units: ``[Q]`` integers; queries of one unit (the captions of an image) are drawn together, because they are not
            independent.
        thirds: ``[Q]`` 0 (head), 1 (middle) or 2 (tail), where a cluster table is given.
    """

    units: np.ndarray
    thirds: Optional[np.ndarray] = None


def summarise(
    measures: list[Measure], queries: dict[str, Queries], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """``{name: {"value", "low", "high", "n"}}``, and with thirds ``"head"``, ``"middle"``, ``"tail"`` of the same form.

    ``low`` and ``high`` bound the central 95% of the statistic over ``resamples`` bootstrap draws (percentile method),
    None without draws and where all queries are of one unit, about whose like nothing is known. A third without queries
    has the value None and ``n`` 0. The same seed gives the same draws, which all measures of one kind of queries share.
    """
    result: dict[str, dict[str, Any]] = {measure.name: {} for measure in measures}
    for kind, known in queries.items():
        own = [measure for measure in measures if measure.queries == kind]
        names = [measure.name for measure in own]
        rows = np.arange(len(known.units))
        for name, entry in zip(names, _summary(own, rows, known.units, resamples, seed)):
            result[name].update(entry)
        for third, label in enumerate(THIRDS if known.thirds is not None else ()):
            inside = np.flatnonzero(known.thirds == third)
            for name, entry in zip(names, _summary(own, inside, known.units, resamples, seed)):
                result[name][label] = entry
    return result


def _summary(
    measures: list[Measure], rows: np.ndarray, units: np.ndarray, resamples: int, seed: int
) -> list[dict[str, Any]]:
    if not len(rows):
        return [{"value": None, "low": None, "high": None, "n": 0} for _ in measures]
    values = [measure.values[rows] for measure in measures]
    draws = np.empty((resamples, len(measures)))
    for draw, picked in enumerate(_resampled(units[rows], resamples, seed)):
        draws[draw] = [measure.statistic(own[picked]) for measure, own in zip(measures, values)]
    summary = []
    for column, (measure, own) in enumerate(zip(measures, values)):
        low, high = None, None
        if resamples and (units[rows] != units[rows[0]]).any():
            tail = (1 - LEVEL) / 2
            low, high = (float(bound) for bound in np.quantile(draws[:, column], (tail, 1 - tail)))
        summary.append({"value": measure.statistic(own), "low": low, "high": high, "n": len(rows)})
    return summary


def _resampled(units: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield ``resamples`` arrays of row numbers: as many units as there are, with replacement, all rows of each."""
    random = np.random.default_rng(seed)
    _, unit_of, count = np.unique(units, return_inverse=True, return_counts=True)
    by_unit = np.argsort(unit_of, kind="stable")
    start = np.concatenate([[0], np.cumsum(count)[:-1]])
    for _ in range(resamples):
        drawn = random.integers(len(count), size=len(count))
        lengths = count[drawn]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        yield by_unit[np.repeat(start[drawn], lengths) + within]


def cell(entry: dict[str, Any], percent: bool) -> str:
    """``41.2 [39.0, 43.3]``; a dash where there is nothing."""
    if entry["value"] is None or math.isnan(entry["value"]):
        return "–"
    scale = 100 if percent else 1
    text = f"{scale * entry['value']:.1f}"
    if entry["low"] is not None:
        text += f" [{scale * entry['low']:.1f}, {scale * entry['high']:.1f}]"
    return text
