"""The losses over several ranks: each rank works on its own rows only, whatever OpenCLIP's two flags ask for.

Equal in value and gradients to gathering everything and computing the full matrix on every rank, which costs each rank
N x N. Here a rank computes its ``n x N`` stripes in tiles; besides the features, only vectors of length N travel.

``local_loss``: the loss of a rank is that of its own rows; otherwise every rank returns the loss of all rows.
``gather_with_grad``: gradients of every rank's loss reach every rank's features; otherwise only those of a rank's own
loss reach its own features (and, with ``local_loss``, only as anchors).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from . import _tiles
from .errors import ConfigError
from .functional import full_precision, once_differentiable


def gather_rows(rows: Tensor, world_size: int) -> Tensor:
    """``[n, ...]`` of each rank, the same shape everywhere, to ``[world_size * n, ...]`` in rank order; no gradient."""
    blocks = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(blocks, rows.contiguous())
    return torch.cat(blocks)


@contextmanager
def first_on_node(local_rank: int, distributed: bool) -> Iterator[None]:
    """The first rank of each node goes through the block before the others: it fills the cache that they read."""
    if distributed and local_rank != 0:
        dist.barrier()
    try:
        yield
    finally:  # also where the first fails: nobody waits for ever
        if distributed and local_rank == 0:
            dist.barrier()


def _row_weights(grad: Tensor, rows: int, rank: int, world_size: int, local_loss: bool, with_grad: bool) -> Tensor:
    """``[N]``: how much each row's terms count in what this rank's features receive."""
    total = rows * world_size
    if not with_grad:
        weights = torch.zeros(total, dtype=grad.dtype, device=grad.device) if local_loss else grad.expand(total) / total
        weights[rank * rows : (rank + 1) * rows] = grad / (rows if local_loss else total)
        return weights
    each = gather_rows(grad.reshape(1), world_size)
    return (each / rows).repeat_interleave(rows) if local_loss else (each.sum() / total).expand(total).clone()


class _RankInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        smoothing: float,
        rank: int,
        world_size: int,
        local_loss: bool,
        with_grad: bool,
    ) -> Tensor:
        all_images, all_texts = gather_rows(images, world_size), gather_rows(texts, world_size)
        image_sums = _tiles.stripe_log_sum(images, all_texts, scale)
        text_sums = _tiles.stripe_log_sum(texts, all_images, scale)
        own = (image_sums + text_sums) / 2 - (1 - smoothing) * scale * (images * texts).sum(1)
        if smoothing:
            own = own - smoothing * scale * (images @ all_texts.mean(0) + texts @ all_images.mean(0)) / 2
        # Rows of other ranks pull on ours unless only our own anchors count.
        crossed = with_grad or not local_loss
        rows = torch.stack([scale, image_sums, text_sums], 1)
        all_rows = gather_rows(rows, world_size) if crossed else rows
        ctx.save_for_backward(images, texts, all_images, all_texts, rows, all_rows)
        ctx.options = (smoothing, rank, world_size, local_loss, with_grad, crossed)
        return own.mean() if local_loss else gather_rows(own, world_size).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        images, texts, all_images, all_texts, rows, all_rows = ctx.saved_tensors
        smoothing, rank, world_size, local_loss, with_grad, crossed = ctx.options
        n = len(images)
        with torch.autocast(images.device.type, enabled=False):
            weights = _row_weights(grad, n, rank, world_size, local_loss, with_grad) / 2  # two directions
            own = weights[rank * n]
            scale, image_sums, text_sums = rows.unbind(1)
            # An image is pulled by its own row, and by the column that every text's row has for it; and so a text.
            grads, means = [], []
            for mine, others, sums, other_sums in (
                (images, all_texts, image_sums, all_rows[:, 2]),
                (texts, all_images, text_sums, all_rows[:, 1]),
            ):
                cross = (all_rows[:, 0], other_sums, weights) if crossed else None
                one, mean = _tiles.stripe_info_nce_grad(mine, others, scale, sums, own, cross, ctx.needs_input_grad[2])
                pair = others[rank * n : (rank + 1) * n]
                one.addcmul_(pair, (scale * own * (2 if crossed else 1) * (1 - smoothing)).unsqueeze(1), value=-1)
                if smoothing:
                    one.sub_((smoothing * own * scale).unsqueeze(1) * others.mean(0))
                    if crossed:
                        pulls = (all_rows[:, 0] * weights).unsqueeze(1) * others
                        one.sub_(smoothing / len(others) * pulls.sum(0))
                grads.append(one)
                means.append(mean)
            grad_scale = None
            if ctx.needs_input_grad[2]:
                grad_scale = means[0] + means[1] - 2 * (1 - smoothing) * (images * texts).sum(1)
                if smoothing:
                    grad_scale = grad_scale - smoothing * (images @ all_texts.mean(0) + texts @ all_images.mean(0))
                grad_scale = grad_scale * own
            return grads[0], grads[1], grad_scale, None, None, None, None, None


class _RankMaxMargin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, margin: Tensor, rank: int, world_size: int, with_grad: bool
    ) -> Tensor:
        all_images, all_texts = gather_rows(images, world_size), gather_rows(texts, world_size)
        threshold = (images * texts).sum(1) - margin
        thresholds = gather_rows(threshold, world_size)
        n, needed = len(images), any(ctx.needs_input_grad)
        first = rank * n
        text_total, grad_texts, text_active = _tiles.stripe_hinges(
            texts, all_images, threshold, thresholds, first, needed
        )
        image_total, grad_images, image_active = _tiles.stripe_hinges(
            images, all_texts, threshold, thresholds, first, needed
        )
        total = text_total + image_total
        dist.all_reduce(total)
        active = text_active + image_active
        if needed:
            grad_texts.addcmul_(images, active.unsqueeze(1), value=-1)
            grad_images.addcmul_(texts, active.unsqueeze(1), value=-1)
        everyone = len(all_images)
        ctx.share = 1.0 / max(2 * everyone * (everyone - 1), 1)
        ctx.with_grad = with_grad
        ctx.save_for_backward(grad_images, grad_texts, active)
        return total.to(images.dtype) * ctx.share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        grad_images, grad_texts, active = ctx.saved_tensors
        if ctx.with_grad:
            grad = grad.clone()
            dist.all_reduce(grad)
        factor = grad * ctx.share
        return grad_images * factor, grad_texts * factor, active * factor, None, None, None


def rank_info_nce(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor,
    rank: int,
    world_size: int,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """InfoNCE over all ranks from this rank's ``[n, D]`` features and ``[n]`` temperatures; every rank must call it."""
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = full_precision(image_features), full_precision(text_features)
        scale = 1.0 / temperature.to(images.dtype)
        loss: Tensor = _RankInfoNCE.apply(
            images, texts, scale, label_smoothing, rank, world_size, local_loss, gather_with_grad
        )
        return loss


def rank_max_margin(
    image_features: Tensor,
    text_features: Tensor,
    margin: Tensor,
    rank: int,
    world_size: int,
    gather_with_grad: bool = False,
) -> Tensor:
    """Max-margin over all ranks; every rank returns the loss of all rows, as the authors have it."""
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = full_precision(image_features), full_precision(text_features)
        loss: Tensor = _RankMaxMargin.apply(images, texts, margin.to(images.dtype), rank, world_size, gather_with_grad)
        return loss


def check_ranks_agree(values: dict[str, Any], rank: int, world_size: int, device: torch.device) -> None:
    """Each rank reads its own flags and files: all must have read the same.

    Raises:
        ConfigError: naming the ranks and the field that differs.
    """
    text = json.dumps({name: value for name, value in values.items() if name != "clusters"}).encode()
    mine = torch.zeros(4096, dtype=torch.uint8, device=device)
    mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine)
    first = json.loads(bytes(everyone[0].tolist()).rstrip(b"\0"))
    for other in range(1, world_size):
        theirs = json.loads(bytes(everyone[other].tolist()).rstrip(b"\0"))
        for name, value in theirs.items():
            if value != first[name]:
                raise ConfigError(
                    f"ranks 0 and {other} differ in {name}: {first[name]!r} and {value!r}; every rank must be given "
                    "the same flags and the same cluster table"
                )
