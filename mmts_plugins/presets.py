"""The hyper-parameters of the paper's experiments (supplementary, Sec. 7)."""

from __future__ import annotations

from typing import NamedTuple

INFONCE = "mmts-infonce"
MAX_MARGIN = "mmts-max-margin"


class Preset(NamedTuple):
    """``alpha``, ``sh-`` and ``sh+`` of one experiment, and the loss they were chosen for."""

    loss: str
    alpha: float
    shift_min: float
    shift_max: float


PRESETS = {
    "clip-cc3m": Preset(INFONCE, 0.04, 0.05, 0.10),
    "avion-max-margin": Preset(MAX_MARGIN, 0.20, 0.17, 0.30),
    "avion-clip": Preset(INFONCE, 0.08, 0.05, 0.20),
    "vast-max-margin": Preset(MAX_MARGIN, 0.20, 0.10, 0.30),
    "vast-clip": Preset(INFONCE, 0.06, 0.06, 0.09),
}
