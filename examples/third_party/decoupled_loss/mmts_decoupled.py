"""Decoupled InfoNCE (Yeh et al., arXiv 2110.06848) with one temperature per row: the positive leaves the denominator.

``L_i = -s_ii / tau_i + log sum_{j != i} exp(s_ij / tau_i)``, averaged over both directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed.nn
from torch import Tensor, nn

from mmts_plugins.errors import ConfigError
from mmts_plugins.losses import TEMPERATURE, LossKind


class DecoupledLoss(nn.Module):
    """This rank's rows against the columns of all ranks; memory ``O(n N)``."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def forward(self, image_features: Tensor, text_features: Tensor, temperature: Tensor) -> Tensor:
        """Features ``[n, D]`` of this rank, L2-normalised; ``temperature`` ``[n]``; a scalar."""
        images, texts = image_features.float(), text_features.float()
        everyone = [self._gathered(rows) for rows in (texts, images)]
        tau = temperature.to(images.device, images.dtype)
        positive = (images * texts).sum(1) / tau
        own = torch.arange(len(images), device=images.device) + self.rank * len(images)
        losses = []
        for anchors, others in zip((images, texts), everyone):
            logits = (anchors @ others.T / tau[:, None]).scatter(1, own[:, None], -torch.inf)
            losses.append(torch.logsumexp(logits, 1) - positive)
        return torch.cat(losses).mean()

    def _gathered(self, rows: Tensor) -> Tensor:
        return rows if self.world_size == 1 else torch.cat(torch.distributed.nn.all_gather(rows))


class Decoupled(LossKind):
    """``--loss mmts-decoupled``."""

    name = "mmts-decoupled"
    number = TEMPERATURE
    weight_label = "weight relative to the hardest"
    gap_label = "similarity minus the hardest negative's"

    def module(
        self, local_loss: bool, gather_with_grad: bool, rank: int, world_size: int, label_smoothing: float = 0.0
    ) -> nn.Module:
        if label_smoothing:
            raise ConfigError(f"--loss {self.name} knows no label smoothing")
        if world_size > 1 and not (local_loss and gather_with_grad):
            raise ConfigError(f"--loss {self.name} on several ranks needs --local-loss --gather-with-grad")
        return DecoupledLoss(rank, world_size)

    def anchors(self, positive: Tensor, negatives: Sequence[Tensor], number: Tensor) -> dict[str, Tensor]:
        of_both = [torch.logsumexp(block / number[:, None], 1) - positive / number for block in negatives]
        return {"loss": torch.stack(of_both).mean(0)}

    def weight(self, gap: np.ndarray, number: float) -> np.ndarray | None:
        return np.exp(gap / number) if number > 0 else None


KIND = Decoupled()
