"""What several seeds say of a difference: its mean seed by seed, how sure that is, and a paired test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple, Optional

from ..errors import MMTSError

LEVEL = 0.95


class Difference(NamedTuple):
    """A mean of differences, each between two runs of one seed.

    Attributes:
        mean: of the differences.
        se: its standard error; ``None`` for one seed, as are the others.
        low, high: the interval of Student's t at 95%, with n - 1 degrees of freedom.
        p: of the paired t-test (two-sided) against no difference.
        seeds: how many.
    """

    mean: float
    se: Optional[float]
    low: Optional[float]
    high: Optional[float]
    p: Optional[float]
    seeds: int

    @property
    def seen(self) -> bool:
        """Whether the interval leaves zero out. Of twenty intervals of nothing, one does by chance."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def difference(differences: Sequence[float]) -> Difference:
    """Judge differences between two variants, one for each seed.

    Raises:
        MMTSError: SciPy is not installed.

    Examples:
        >>> from mmts_plugins.evaluation.seeds import difference
        >>> found = difference([1.2, 0.4, 0.9, 0.7])
        >>> round(found.mean, 2), round(found.low, 2), round(found.high, 2), found.seen
        (0.8, 0.26, 1.34, True)
    """
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return Difference(mean, None, None, None, None, n)
    try:
        from scipy.stats import t as student
    except ImportError as error:
        raise MMTSError("intervals over seeds need scipy: pip install 'mmts-plugins[cluster]'") from error
    se = statistics.stdev(differences) / math.sqrt(n)
    half = se * float(student.ppf((1 + LEVEL) / 2, n - 1))
    p = 1.0 if mean == 0 else 0.0 if se == 0 else 2 * float(student.sf(abs(mean) / se, n - 1))
    return Difference(mean, se, mean - half, mean + half, p, n)
