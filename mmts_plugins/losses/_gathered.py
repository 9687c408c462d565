"""The distributed flags that all losses share."""

from __future__ import annotations

from torch import nn


class GatheredLoss(nn.Module):
    """A loss over the rows of all ranks. The flags mean what they mean in OpenCLIP's ``ClipLoss``."""

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.rank = rank
        self.world_size = world_size
