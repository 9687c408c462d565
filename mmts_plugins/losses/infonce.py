"""InfoNCE with one temperature per sample (paper, Sec. 6, Eqs. 10-12 with Eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from ..functional import rank_info_nce
from ._gathered import GatheredLoss
from .kind import TEMPERATURE, LossKind


class InfoNCELoss(GatheredLoss):
    """InfoNCE with one temperature per sample (paper, Sec. 6 with Eq. 8).

    Args:
        local_loss: each rank takes only its own rows against the columns of all ranks.
        gather_with_grad: gathered features carry gradient to the rank they came from.
        rank, world_size: of this process in the default process group.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, rank, world_size)
        self.label_smoothing = label_smoothing

    def forward(self, image_features: Tensor, text_features: Tensor, temperature: Tensor) -> Tensor:
        """Features ``[n, D]`` of this rank, L2-normalised; ``temperature`` ``[n]`` of the same rows; a scalar."""
        return rank_info_nce(
            image_features,
            text_features,
            temperature,
            self.rank,
            self.world_size,
            self.local_loss,
            self.gather_with_grad,
            self.label_smoothing,
        )


class InfoNCE(LossKind):
    """``--loss mmts-infonce``."""

    name = "mmts-infonce"
    number = TEMPERATURE
    weight_label = "weight relative to the hardest"
    gap_label = "similarity minus the hardest negative's"

    def module(
        self, local_loss: bool, gather_with_grad: bool, rank: int, world_size: int, label_smoothing: float = 0.0
    ) -> nn.Module:
        return InfoNCELoss(local_loss, gather_with_grad, rank, world_size, label_smoothing)

    def anchors(self, positive: Tensor, negatives: Sequence[Tensor], number: Tensor) -> dict[str, Tensor]:
        own = (positive / number)[:, None]
        logits = [block / number[:, None] for block in negatives]
        each = [torch.logsumexp(torch.cat([own, block], 1), 1) - own[:, 0] for block in logits]
        return {
            "loss": (each[0] + each[1]) / 2,
            "log_equilibrium": own[:, 0] - torch.logsumexp(torch.cat(logits, 1), 1),
        }

    def statistics(self, anchors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``equilibrium``: numerator over denominator of Eq. 1 of Sun & Li, TMLR 2024, averaged as a logarithm."""
        return {"equilibrium": anchors["log_equilibrium"].mean().exp()}

    def weight(self, gap: np.ndarray, number: float) -> Optional[np.ndarray]:
        """``exp((s - s_hardest) / tau)``: against the hardest negative, however the others lie."""
        return np.exp(gap / number) if number > 0 else None


KIND = InfoNCE()
