"""One training run of this process: the configuration, the shifts of its table, and where the schedule stands."""

from __future__ import annotations

import math
from typing import Union

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .tables import ClusterTable, LargeTable, cluster_shift

_SAME = 1e-6  # of the range of shifts: what float32 makes of the same shift


def mean_shift(table: Union[ClusterTable, LargeTable], shift_min: float, shift_max: float) -> float:
    """The mean of Eq. 6 over the training samples. Shifts are linear in the frequency: it is that of the mean."""
    about = table.summary
    return float(cluster_shift([about.low, about.mean, about.high], shift_min, shift_max)[1])


class Temperatures:
    """``tau_i(t) = tau_base(t) + sh(c_i)``, Eq. 8, for samples given as indices into the table's frequencies.

    Args:
        config: of the run.
        table: its cluster table, shuffled where it is to be; ``None`` under ``--mmts-no-shifts`` without one.
        frequencies: ``[U]`` distinct frequencies that an index may mean; index ``U`` is a caption not in the table.
        total_steps: optimizer steps of the whole run.
        device: of the training step.
    """

    def __init__(
        self,
        config: Config,
        table: Union[ClusterTable, LargeTable, None],
        frequencies: np.ndarray,
        total_steps: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.schedule = config.schedule(total_steps)
        self.step = 0
        self.missing = len(frequencies)
        if table is None or config.no_shifts:
            one = (config.shift_min + config.shift_max) / 2
            if table is not None and config.mean_matched:
                one = mean_shift(table, config.shift_min, config.shift_max)
            shifts = np.full(len(frequencies), one)
            self.mean_shift = self.head_shift = self.middle_shift = self.tail_shift = one
            self._third_borders = (math.inf, one)
            self._one_frequency = False
        else:
            # Minimum and maximum over the whole table (Eq. 6), also over keys that a tokenizer merged away. Shifts are
            # linear in the frequency, so the mean shift is that of the mean frequency.
            about = table.summary
            self._one_frequency = bool(about.low == about.high)
            borders = np.minimum([about.head_from, about.middle_from], about.high)
            extra = np.array([*borders, about.low, about.high, about.mean, about.head, about.middle, about.tail])
            every = cluster_shift(np.concatenate([frequencies, extra]), config.shift_min, config.shift_max)
            shifts = every[: len(frequencies)]
            self.mean_shift, self.head_shift, self.middle_shift, self.tail_shift = every[-4:].tolist()
            head_from, middle_from = every[len(frequencies) : len(frequencies) + 2].tolist()
            self._third_borders = (
                head_from if math.isfinite(about.head_from) else math.inf,
                middle_from if math.isfinite(about.middle_from) else math.inf,
            )
        absent = self.mean_shift if config.missing == "mean" or config.no_shifts else config.shift_min
        # float64, so that the sum of Eq. 8 is exact to the loss's own precision; MPS knows no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._shifts = torch.tensor([*shifts, absent], dtype=dtype, device=device)

    @property
    def base(self) -> float:
        """``tau_base`` at the current step, Eq. 7."""
        return self.schedule.offset(self.step)

    @property
    def mean_temperature(self) -> float:
        """What an average training sample gets at this step; the same on every rank."""
        return self.base + self.mean_shift

    def shift(self, index: Tensor) -> Tensor:
        """``[n]`` indices to ``[n]`` shifts ``sh(c_i)``; plus :attr:`base` they are the temperatures, Eq. 8."""
        return self._shifts[index]

    def third(self, shift: Tensor) -> Tensor:
        """``[n]`` shifts to the thirds of the training samples that they belong to: 0 head, 1 middle, 2 tail."""
        head_from, middle_from = self._third_borders
        nearly = _SAME * (self.config.shift_max - self.config.shift_min)
        return (shift < head_from - nearly).long() + (shift < middle_from - nearly)

    def warnings(self) -> list[str]:
        """Where a schedule was asked for that hardly moves, or shifts that do not differ."""
        config, period, found = self.config, self.schedule.period, []
        if self.schedule.alpha and period < 2:
            found.append(f"a period of {period:g} steps: fewer than two steps see no cosine")
        elif self.schedule.alpha and self.total_steps < period / 2:
            found.append(f"the run of {self.total_steps} steps sees {self.total_steps / period:.1%} of a period")
        if found:
            found[0] += " (--mmts-period, --mmts-num-oscillations)"
        if self._one_frequency:
            found.append(f"the table knows one frequency: every sample has the shift {self.mean_shift:g}")
        alike = config.no_shifts or self._one_frequency or config.shift_min == config.shift_max
        if self.schedule.alpha == 0 and alike:
            found.append(f"nothing is scheduled: every sample gets {self.mean_shift:g} at every step")
        return found

    def describe(self) -> str:
        """The banner: what runs, in one line."""
        config = self.config
        what = config.kind.number
        steps = f"{self.total_steps} steps, period {self.schedule.period:g}"
        if config.start_phase:
            steps += f" from phase {config.start_phase:g}"
        shifts = f"shifts {config.shift_min:g} to {config.shift_max:g}"
        if config.shuffle_shifts is not None:
            shifts += f", shuffled (seed {config.shuffle_shifts})"
        if config.no_shifts:
            shifts = "no shifts" + (", all at the table's mean" if config.mean_matched else "")
        schedule = "no schedule" if config.no_schedule else f"alpha {config.alpha:g} over {steps}"
        lowest, highest = self.mean_shift - self.schedule.alpha / 2, self.mean_shift + self.schedule.alpha / 2
        return f"{config.loss}: {schedule}; {shifts}; mean {what} {lowest:.4g} to {highest:.4g}"
