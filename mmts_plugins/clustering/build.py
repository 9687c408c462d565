"""Captions and their clusters or labels to a ClusterTable. Rows are samples (or distinct captions), keys are distinct.

Clusters are numbered by descending size and keys stand in first-seen order, so that tables are readable and the same
input gives the same content hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from ..tables import ClusterTable


def distinct(values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct values in first-seen order, and ``[n]`` the place of each value among them."""
    place: dict[str, int] = {}
    codes = np.fromiter((place.setdefault(value, len(place)) for value in values), np.int64, len(values))
    return list(place), codes


def counted(codes: np.ndarray, weight: Optional[np.ndarray] = None) -> np.ndarray:
    """How many samples have each code, int64; ``weight`` ``[n]`` whole numbers says how often each counts."""
    if weight is None:
        return np.bincount(codes)
    return np.bincount(codes, weights=weight).astype(np.int64)


def majority(groups: np.ndarray, values: np.ndarray, weight: Optional[np.ndarray] = None) -> tuple[np.ndarray, int]:
    """For each group ``0 .. G-1`` its most frequent value (ties: first seen), and how many groups hold several."""
    base = int(values.max()) + 1
    pairs, first, place = np.unique(groups * base + values, return_index=True, return_inverse=True)
    times = counted(place.reshape(-1), weight)
    owner = pairs // base
    order = np.lexsort((first, -times, owner))
    _, starts = np.unique(owner[order], return_index=True)
    return pairs[order][starts] % base, int((np.bincount(owner) > 1).sum())


def by_size(cluster: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Clusters renumbered: 0 is the largest; ties keep their order, empty ones vanish."""
    sizes = np.bincount(cluster, weights=count)
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return rank[cluster]


def labelled_table(
    captions: Sequence[str], labels: Sequence[str], info: dict[str, Any], weight: Optional[np.ndarray] = None
) -> tuple[ClusterTable, int]:
    """One key per caption; its cluster is its (most frequent) label, its frequency that label's number of samples.

    Returns:
        The table, and how many captions occur under several labels.
    """
    keys, rows = distinct(captions)
    _, classes = distinct(labels)
    chosen, several = majority(rows, classes, weight)
    count = counted(rows, weight)
    sizes = counted(classes, weight)
    return ClusterTable.build(keys, by_size(chosen, count), sizes[chosen], count, info=info), several


def clustered_table(
    keys: Sequence[str], rows: np.ndarray, count: np.ndarray, cluster: np.ndarray, frequency: np.ndarray,
    info: dict[str, Any],
) -> ClusterTable:  # fmt: skip
    """One key per caption from an estimate of rows.

    Args:
        rows: ``[n]`` the key of each row. A key with several rows (embeddings given per sample) gets its most frequent
            cluster and its mean frequency.
        count: ``[M]`` how many samples each key has.
        cluster, frequency: ``[n]`` of each row.
    """
    chosen, _ = majority(rows, cluster)
    mean = np.bincount(rows, weights=frequency) / np.bincount(rows)
    return ClusterTable.build(keys, by_size(chosen, count), mean, count, info=info)
