"""The cluster shift: from how common a concept is to its part of the temperature, Eq. 6."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar, Union, cast

import numpy as np
import torch

from ..errors import ConfigError, TableError

logger = logging.getLogger(__name__)

Sizes = TypeVar("Sizes", bound=Union[torch.Tensor, np.ndarray])


def cluster_shift(sizes: Union[Sizes, Sequence[float]], shift_min: float, shift_max: float) -> Sizes:
    """Turn cluster sizes into cluster shifts, Eq. 6 of the paper.

    ``sh(c) = (K_c - min K) / (max K - min K) * (shift_max - shift_min) + shift_min``

    Args:
        sizes: ``[K]``, how many samples (or how common) each cluster is, over *all* clusters of the training set.
        shift_min, shift_max: the shift of the rarest and of the most common cluster, in units of temperature.

    Returns:
        ``[K]`` shifts, a tensor for a tensor, else a NumPy array; float64 unless ``sizes`` is of another float type.
        Where all sizes are equal the ratio is 0/0 and every cluster gets the midpoint.

    Raises:
        ConfigError: ``sizes`` is empty or not finite, or ``shift_min > shift_max``.

    Examples:
        >>> from mmts_plugins.tables import cluster_shift
        >>> cluster_shift([100, 20, 60], shift_min=0.05, shift_max=0.10).round(3)
        array([0.1  , 0.05 , 0.075])
    """
    if not shift_min <= shift_max:
        raise ConfigError(f"shift_min {shift_min} is above shift_max {shift_max} (--mmts-shift-min, --mmts-shift-max)")
    if isinstance(sizes, torch.Tensor):
        shifts = cluster_shift(sizes.detach().cpu().double().numpy(), shift_min, shift_max)
        return cast(Sizes, torch.from_numpy(shifts).to(sizes if sizes.is_floating_point() else sizes.device))
    values = np.asarray(sizes)
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ConfigError("cluster sizes must be finite numbers, at least one")
    low, high = values.min(), values.max()
    if low == high:
        return cast(Sizes, np.full_like(values, (shift_min + shift_max) / 2))
    return cast(Sizes, (values - low) / (high - low) * (shift_max - shift_min) + shift_min)


def swapped(values: np.ndarray, count: np.ndarray, seed: int) -> np.ndarray:
    """Let rows of equal count swap values at random: over samples, and over rows, their distribution stays as it is.

    Args:
        values: ``[M]``, of any type.
        count: ``[M]`` whole numbers, how many samples each row stands for.
        seed: of the draw.

    Returns:
        ``[M]`` values.
    """
    by_count = np.argsort(count, kind="stable")
    drawn = np.lexsort((np.random.default_rng(seed).random(len(count)), count))
    result = np.empty_like(values)
    result[by_count] = values[drawn]
    return result


def _tie(values: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """How far :func:`swapped` leaves values where they are.

    Args:
        values: ``[M]`` numbers.
        count: ``[M]`` whole numbers, how many samples each row stands for.

    Returns:
        Over samples, the share whose row has another to swap with; and the correlation between the values before and
        after that is to be expected: the share of their variance that lies between rows of different counts.
    """
    counts, place, rows = np.unique(count, return_inverse=True, return_counts=True)
    weight = counts * rows
    means = np.bincount(place, values) / rows
    mean = np.average(means, weights=weight)
    variance = np.average((values - mean) ** 2, weights=count)
    between = np.average((means - mean) ** 2, weights=weight)
    return float(weight[rows > 1].sum() / weight.sum()), float(between / variance) if np.ptp(values) else 0.0


def check_swapped(source: object, frequency: np.ndarray, count: np.ndarray) -> None:
    """Raise a TableError where most samples cannot swap frequencies; log where they swap for much the same."""
    share, correlation = _tie(frequency, count)
    swaps = f"{source}: --mmts-shuffle-shifts: captions that occur equally often swap their frequencies, but here"
    if share < 0.5:
        raise TableError(
            f"{swaps} only {share:.0%} of the samples have such a caption; there is no such control of this table"
        )
    if correlation > 0.1:
        logger.warning("MM-TS: %s those are much alike: the shifts before and after correlate by %.2f, which makes it "
                       "a weak control", swaps, correlation)  # fmt: skip
