"""Gathering rows over ranks, with the gradient semantics that OpenCLIP's two flags select."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherWithGrad(torch.autograd.Function):
    """All-gather whose backward sums over ranks what each rank's loss sent to this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.rank, ctx.rows = rank, len(rows)
        blocks = [torch.empty_like(rows) for _ in range(world_size)]
        dist.all_gather(blocks, rows.contiguous())
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # All-reduce and slice, not reduce-scatter: the gloo backend has none in the oldest torch we support.
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows], None, None


def gather_rows(
    rows: Tensor, rank: int, world_size: int, *, with_grad: bool = False, keep_own_grad: bool = True
) -> Tensor:
    """The rows of all ranks, in rank order.

    Args:
        rows: ``[n, ...]``, the same shape on every rank.
        with_grad: gradients flow to the rows of every rank (``--gather-with-grad``). Every rank must then run
            backward, as under DDP.
        keep_own_grad: without ``with_grad``, gradients flow to this rank's own block; ``False`` for none at all
            (what ``--local-loss`` does, where the anchors already carry them).

    Returns:
        ``[world_size * n, ...]``.
    """
    if world_size == 1:
        return rows
    if with_grad:
        gathered: Tensor = _GatherWithGrad.apply(rows, rank, world_size)
        return gathered
    blocks = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(blocks, rows.detach().contiguous())
    if keep_own_grad:
        blocks[rank] = rows
    return torch.cat(blocks)
