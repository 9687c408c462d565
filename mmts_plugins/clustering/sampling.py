"""Which rows a sample takes: weighted, by hashes of what the rows are of."""

from __future__ import annotations

import numpy as np

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64


def priorities(hashes: np.ndarray, weight: np.ndarray, seed: int) -> np.ndarray:
    """``[n]`` float64: the places of a weighted sample go to the highest (priority sampling, Duffield et al. 2007).

    A row's priority is ``weight / u`` with ``u`` uniform in (0, 1], drawn from its hash and the seed. So a sample does
    not depend on the order of the rows or on how they are cut into parts, and parts can choose their own candidates.
    """
    with np.errstate(over="ignore"):
        x = hashes + np.uint64(seed % (1 << 64)) * _INCREMENT + _INCREMENT
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    uniform = ((x >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
    return weight / uniform


def sample(priority: np.ndarray, weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``size`` rows of highest priority and what each stands for.

    Returns:
        ``[m]`` indices by descending priority, and ``[m]`` float64 weights whose sum over any subset is an unbiased
        estimate of that subset's weight: ``max(weight, threshold)``, with the threshold the highest priority left out.
    """
    if size >= len(priority):
        order = np.argsort(-priority, kind="stable")
        return order, weight[order].astype(np.float64)
    best = np.argpartition(-priority, size)[: size + 1]
    best = best[np.argsort(-priority[best], kind="stable")]
    chosen, threshold = best[:size], priority[best[size]]
    return chosen, np.maximum(weight[chosen], threshold)
