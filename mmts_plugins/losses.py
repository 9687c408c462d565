"""The losses as modules that gather over ranks what they need; for our adapters, and trainers edited by hand."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import rank_info_nce, rank_max_margin


class _GatheredLoss(nn.Module):
    """The distributed flags, with the meaning they have in OpenCLIP's ``ClipLoss``."""

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.rank = rank
        self.world_size = world_size


class InfoNCELoss(_GatheredLoss):
    """InfoNCE with one temperature per sample (paper, Sec. 6 with Eq. 8).

    Args:
        local_loss: each rank takes only its own rows against the columns of all ranks.
        gather_with_grad: gathered features carry gradient to the rank they came from.
        rank, world_size: of this process in the default process group.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy` (VAST uses 0.1).
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


class MaxMarginLoss(_GatheredLoss):
    """Max-margin ranking with one margin per sample (paper, Eq. 3 with Eq. 8), as the authors train AVION.

    Features are L2-normalised here, so that their gradient is the one through the normalisation; it changes nothing
    for a caller who has done it already. ``local_loss`` is accepted and ignored, as in the authors' code: every rank
    computes the loss of the full matrix.
    """

    def forward(self, image_features: Tensor, text_features: Tensor, margin: Tensor) -> Tensor:
        """Features ``[n, D]`` of this rank; ``margin`` ``[n]`` of the same rows; a scalar."""
        return rank_max_margin(
            image_features, text_features, margin, self.rank, self.world_size, self.gather_with_grad, normalize=True
        )
