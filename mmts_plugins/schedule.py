"""The base temperature, Eq. 7 of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigError


@dataclass(frozen=True)
class CosineSchedule:
    """``tau_base(t) = alpha * cos(2 pi t / T) / 2`` (Eq. 7), the part of the temperature that all samples share.

    Args:
        alpha: peak-to-peak amplitude, in units of temperature (or margin). Zero switches the schedule off.
        period: T, in optimizer steps; need not be whole.
        start: where in its period step 0 is, in ``[0, 1]``: 0, as in the paper, at the cosine's top, 0.5 at its bottom.

    Raises:
        ConfigError: ``alpha`` is negative, ``period`` is not positive, either is not finite, or ``start`` is not in
            ``[0, 1]``.

    Examples:
        >>> from mmts_plugins.schedule import CosineSchedule
        >>> schedule = CosineSchedule(alpha=0.04, period=1200)
        >>> [round(schedule.offset(step), 4) for step in (0, 300, 600, 1200)]
        [0.02, 0.0, -0.02, 0.02]
        >>> schedule.phase(1500)
        0.25
    """

    alpha: float
    period: float
    start: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ConfigError(f"alpha is {self.alpha}: it must be a finite number, zero or above (--mmts-alpha)")
        if not (math.isfinite(self.period) and self.period > 0):
            raise ConfigError(
                f"the period is {self.period} steps: it must be above zero (--mmts-period, --mmts-num-oscillations)"
            )
        if not 0 <= self.start <= 1:
            raise ConfigError(f"the start is {self.start} periods: it must be from 0 to 1 (--mmts-start-phase)")

    def offset(self, step: float) -> float:
        """Return ``tau_base`` at an optimizer step (zero-based); in ``[-alpha/2, alpha/2]``."""
        return self.alpha * math.cos(2.0 * math.pi * (step / self.period + self.start)) / 2.0

    def phase(self, step: float) -> float:
        """Return the position inside the current period, in ``[0, 1)``."""
        return (step / self.period + self.start) % 1.0
