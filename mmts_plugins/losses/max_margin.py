"""Max-margin ranking with one margin per sample (paper, Eq. 3 with Eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..functional import rank_max_margin
from ._gathered import GatheredLoss
from .kind import MARGIN, LossKind


class MaxMarginLoss(GatheredLoss):
    """Max-margin ranking with one margin per sample (paper, Eq. 3 with Eq. 8), as the authors train.

    Features are L2-normalised here, so that their gradient is the one through the normalisation; it changes nothing
    for a caller who has done it already. ``local_loss`` is accepted and ignored, as in the authors' code: every rank
    computes the loss of the full matrix.
    """

    def forward(self, image_features: Tensor, text_features: Tensor, margin: Tensor) -> Tensor:
        """Features ``[n, D]`` of this rank; ``margin`` ``[n]`` of the same rows; a scalar."""
        return rank_max_margin(
            image_features, text_features, margin, self.rank, self.world_size, self.gather_with_grad, normalize=True
        )


class MaxMargin(LossKind):
    """``--loss mmts-max-margin``."""

    name = "mmts-max-margin"
    number = MARGIN
    weight_label = "weight of a negative"
    gap_label = "similarity minus the positive's"

    def module(
        self, local_loss: bool, gather_with_grad: bool, rank: int, world_size: int, label_smoothing: float = 0.0
    ) -> nn.Module:
        if label_smoothing:
            raise ConfigError(f"--loss {self.name} knows no label smoothing")
        return MaxMarginLoss(local_loss, gather_with_grad, rank, world_size)

    def anchors(self, positive: Tensor, negatives: Sequence[Tensor], number: Tensor) -> dict[str, Tensor]:
        threshold = (positive - number)[:, None]
        hinges = torch.stack([(block - threshold).relu().sum(1) for block in negatives]).sum(0)
        return {"loss": hinges / max(1, 2 * (negatives[0].shape[1] - 1))}

    def weight(self, gap: np.ndarray, number: float) -> Optional[np.ndarray]:
        """A negative counts fully once it is within the margin of the positive, and not at all before."""
        return (gap >= -number).astype(float)


KIND = MaxMargin()
