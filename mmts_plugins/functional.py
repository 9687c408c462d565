"""The two losses as pure functions of features and a per-row temperature or margin (paper, Eqs. 2-5, 8, 10-12).

Exact custom autograd functions: both directions share one similarity product, gradients are closed forms, and no N x N
matrix is kept beyond a memory budget. Products, exponents and sums are in float32 for half-precision features, also
under autocast, and in float64 for float64 features. Once differentiable.

Over several ranks each has ``n`` of the ``N`` rows; value and gradients equal those of gathering everything and
computing the full matrix everywhere. One stripe ``S_r = U_r V^T`` per rank is enough where ranks share gradients: its
rows are complete, its columns' sums are completed by one exchange of vectors; ``dU_r = G V``, and the parts ``G^T U_r``
of ``dV`` go to the rows' owners. So one of the two feature matrices is gathered, in its own type, and one gradient is
scattered, in full precision; the rest of the traffic is vectors of length N.

``local_loss``: the loss of a rank is that of its own rows; otherwise every rank returns the loss of all rows.
``gather_with_grad``: gradients of every rank's loss reach every rank's features; otherwise only those of a rank's own
loss reach its own features (and, with ``local_loss``, only as anchors).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, library

from . import _tiles
from ._tiles import Rows, full_precision
from .distributed import gather_rows, sum_at_owners, sum_over_ranks, to_owners

__all__ = [
    "DEFAULT_BUDGET",
    "HAS_OPERATORS",
    "compiling",
    "full_precision",
    "info_nce",
    "max_margin",
    "opaque",
    "rank_info_nce",
    "rank_max_margin",
]

HAS_OPERATORS = hasattr(library, "custom_op")
"""Whether :func:`opaque` functions stand in a compiled graph as they are (torch 2.4)."""

DEFAULT_BUDGET = 64 * 2**20
"""Bytes of similarities that InfoNCE keeps for its backward by default: all of them up to N = 4096 in float32."""


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor,
    label_smoothing: float = 0.0,
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Compute InfoNCE in both directions with one temperature per row (paper, Eqs. 10-12 with tau_i of Eq. 8).

    Row ``i`` of the image-to-text and of the text-to-image similarities is divided by ``temperature[i]``; the loss is
    the mean of the two cross-entropies.

    Args:
        image_features, text_features: ``[n, D]``, pairs by row, L2-normalised by the caller.
        temperature: ``[n]``, above zero; gets a gradient if it requires one.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        memory_budget: bytes of similarities to keep between forward and backward; rows beyond it are computed twice.
            Zero keeps none. Everything else is linear in ``n``.

    Returns:
        A scalar.

    Examples:
        >>> import torch
        >>> from mmts_plugins.functional import info_nce
        >>> images = torch.eye(3)  # three pairs: the texts of the first two are alike
        >>> texts = torch.tensor([[0.8, 0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
        >>> info_nce(images, texts, temperature=torch.tensor([0.1, 0.1, 0.1]))
        tensor(0.0848)
        >>> info_nce(images, texts, temperature=torch.tensor([0.2, 0.1, 0.1]))  # the first is of a common concept
        tensor(0.1513)
    """
    return rank_info_nce(
        image_features, text_features, temperature, 0, 1, label_smoothing=label_smoothing, memory_budget=memory_budget
    )


def rank_info_nce(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor,
    rank: int,
    world_size: int,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    label_smoothing: float = 0.0,
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Compute InfoNCE over all ranks from this rank's ``[n, D]`` features, ``[n]`` temperatures; all must call it."""
    local = local_loss or world_size == 1
    scale = 1.0 / temperature.to(_tiles.precision(image_features))
    pull = 1.0 - label_smoothing
    if gather_with_grad or world_size == 1:
        loss: Tensor = _InfoNCE.apply(
            image_features, text_features, scale, pull, memory_budget, rank, world_size, local
        )
    else:
        loss = _StripedInfoNCE.apply(image_features, text_features, scale, pull, rank, world_size, local)
    if label_smoothing:
        with torch.autocast(image_features.device.type, enabled=False):
            images, texts = full_precision(image_features), full_precision(text_features)
            loss = loss - label_smoothing * _uniform_pull(images, texts, scale, world_size, local, gather_with_grad)
    return loss


def max_margin(image_features: Tensor, text_features: Tensor, margin: Tensor, normalize: bool = False) -> Tensor:
    """Compute max-margin ranking in both directions with one margin per row (paper, Eq. 3 with m = tau_i of Eq. 8).

    With ``s`` the text-by-image similarities, the mean over all ``2 n (n - 1)`` hinges
    ``relu(margin_i - s_ii + s_ij)`` and ``relu(margin_i - s_ii + s_ji)``, ``j != i``. A single pair has no negative:
    the loss is zero. Gradients are formed in the forward pass, from the active hinges.

    Args:
        image_features, text_features: ``[n, D]``, pairs by row, L2-normalised by the caller.
        margin: ``[n]``; gets a gradient if it requires one.
        normalize: L2-normalise the features here, in full precision and without a copy of them.

    Returns:
        A scalar.

    Examples:
        >>> import torch
        >>> from mmts_plugins.functional import max_margin
        >>> images = torch.eye(3)  # three pairs: the texts of the first two are alike
        >>> texts = torch.tensor([[0.8, 0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
        >>> max_margin(images, texts, margin=torch.tensor([0.3, 0.3, 0.3]))
        tensor(0.0333)
        >>> max_margin(images, texts, margin=torch.tensor([0.4, 0.3, 0.3]))  # the first is of a common concept
        tensor(0.0500)
    """
    return rank_max_margin(image_features, text_features, margin, 0, 1, normalize=normalize)


def rank_max_margin(
    image_features: Tensor,
    text_features: Tensor,
    margin: Tensor,
    rank: int,
    world_size: int,
    gather_with_grad: bool = False,
    normalize: bool = False,
) -> Tensor:
    """Compute max-margin over all ranks; every rank returns the loss of all rows, as the authors have it."""
    margin = margin.to(_tiles.precision(image_features))
    loss: Tensor = _MaxMargin.apply(
        image_features, text_features, margin, normalize, rank, world_size, gather_with_grad
    )
    return loss


# -- what torch asks of a custom function ------------------------------------------------------------------------------


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse ``create_graph=True``. Torch's own decorator of this name lets it pass and the second gradient vanish."""

    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and not compiling():
            raise RuntimeError("the MM-TS losses are once differentiable: no create_graph=True, no double backward")
        return backward(ctx, *grads)

    return checked


def compiling() -> bool:
    """Whether torch.compile is tracing: what a user sees of a run has no place in a graph."""
    compiler = getattr(torch, "compiler", None)
    return compiler is not None and hasattr(compiler, "is_compiling") and compiler.is_compiling()


def opaque(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One node for ``torch.compile``, whatever the function does; the function itself before torch 2.4.

    For the losses, instead of a graph unrolled over tiles and broken at collectives. Autocast has no say inside.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def precise(first: Tensor, *rest: Any) -> Any:
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *rest)

        if not HAS_OPERATORS:
            return precise
        name = f"mmts::{function.__name__.strip('_')}"
        operator = library.custom_op(name, precise, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        return operator

    return wrap


# -- InfoNCE -----------------------------------------------------------------------------------------------------------


def _fake_info_nce(
    images: Tensor, texts: Tensor, scale: Tensor, pull: float, kept_rows: int, rank: int, world_size: int, local: bool
) -> tuple[Tensor, ...]:
    total = len(scale) * world_size
    gathered = total if world_size > 1 else 0
    return (
        scale.new_empty(()),
        torch.empty_like(scale),
        scale.new_empty(total),
        scale.new_empty(kept_rows, total),
        texts.new_empty(gathered, texts.shape[1]),
        scale.new_empty(gathered),
    )


@opaque(
    "(Tensor images, Tensor texts, Tensor scale, float pull, int kept_rows, int rank, int world_size, bool local)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_info_nce,
)
def _info_nce(
    images: Tensor, texts: Tensor, scale: Tensor, pull: float, kept_rows: int, rank: int, world_size: int, local: bool
) -> tuple[Tensor, ...]:
    """The loss; log-sums of this rank's images ``[n]`` and of all texts ``[N]``; kept similarities; all texts and
    scales (empty in one process, where they are the arguments: an operator returns none of those)."""
    n = len(images)
    if world_size == 1:
        image_sums, text_sums, kept = _tiles.log_sums(Rows(images), Rows(texts), scale, scale, kept_rows)
        all_texts, all_scale = texts.new_empty(0, texts.shape[1]), scale.new_empty(0)
    else:
        all_texts, all_scale = gather_rows(texts, world_size), gather_rows(scale, world_size)
        image_sums, partial, kept = _tiles.log_sums(Rows(images), Rows(all_texts), scale, all_scale, kept_rows)
        # Each rank completes the sums of its own texts, from every rank's part, and shows them to all.
        text_sums = gather_rows(_tiles.join_log_sums(to_owners(partial, world_size)), world_size)
    loss = _loss(images, texts, scale, image_sums + text_sums[rank * n : (rank + 1) * n], pull, world_size, local)
    return loss, image_sums, text_sums, kept, all_texts, all_scale


def _loss(
    images: Tensor, texts: Tensor, scale: Tensor, sums: Tensor, pull: float, world_size: int, local: bool
) -> Tensor:
    """From the log-sums of both directions, added; over this rank's rows or all."""
    own = sums * (_tiles.LN_2 / 2) - pull * scale * _tiles.dots(Rows(images), Rows(texts))
    return own.mean() if local else sum_over_ranks(own.sum()) / (len(own) * world_size)


def _fake_grads(grad: Tensor, images: Tensor, texts: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(images), torch.empty_like(texts), torch.empty_like(scale)


@opaque(
    "(Tensor grad, Tensor images, Tensor texts, Tensor scale, Tensor image_sums, Tensor text_sums, Tensor kept,"
    " Tensor all_texts, Tensor all_scale, float pull, int rank, int world_size, bool local, bool with_scale)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_grads,
)
def _info_nce_grad(
    grad: Tensor,
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    image_sums: Tensor,
    text_sums: Tensor,
    kept: Tensor,
    all_texts: Tensor,
    all_scale: Tensor,
    pull: float,
    rank: int,
    world_size: int,
    local: bool,
    with_scale: bool,
) -> tuple[Tensor, ...]:
    """Gradients at this rank's images, texts and scales."""
    n = len(images)
    weight = grad / (2 * n)  # of a row in either direction
    if world_size == 1:
        all_texts, all_scale, weights = texts, scale, weight
    else:  # a row counts in the loss of its own rank, or in the one of all that each rank returns
        each = gather_rows(weight.reshape(1), world_size)
        if not local:
            each = each.mean().repeat(world_size)
        weight, weights = each[rank], each.repeat_interleave(n)
    grad_images, grad_texts, means, text_means = _tiles.info_nce_grad(
        Rows(images),
        Rows(all_texts),
        (scale, image_sums, scale * weight),
        (all_scale, text_sums, all_scale * weights),
        scale * (2 * weight * pull),
        rank * n,
        kept,
        with_means=with_scale,
    )
    if world_size > 1:
        grad_texts = sum_at_owners(grad_texts, world_size)
        text_means = sum_at_owners(text_means, world_size) if with_scale else means
    grad_scale = torch.zeros_like(scale)
    if with_scale:
        grad_scale = weight * (means + text_means - 2 * pull * _tiles.dots(Rows(images), Rows(texts)))
    return grad_images.to(images.dtype), grad_texts.to(texts.dtype), grad_scale


class _InfoNCE(torch.autograd.Function):
    """From one stripe per rank: in one process, or where ranks share gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        pull: float,
        memory_budget: int,
        rank: int,
        world_size: int,
        local: bool,
    ) -> Tensor:
        n, total = len(images), len(images) * world_size
        kept_rows = 0
        if any(ctx.needs_input_grad[:3]):
            affordable = memory_budget // (total * scale.element_size())
            step, _ = _tiles.tile_shape(n, total, images.device)
            kept_rows = n if affordable >= n else affordable // step * step
        loss, *found = _info_nce(images, texts, scale, pull, kept_rows, rank, world_size, local)
        ctx.save_for_backward(images, texts, scale, *found)
        ctx.options = (pull, rank, world_size, local)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        with_scale = ctx.needs_input_grad[2]
        grads = _info_nce_grad(grad, *ctx.saved_tensors, *ctx.options, with_scale)
        return grads[0], grads[1], grads[2] if with_scale else None, None, None, None, None, None


def _fake_striped(
    images: Tensor, texts: Tensor, scale: Tensor, pull: float, world_size: int, local: bool
) -> tuple[Tensor, ...]:
    n, d = images.shape
    total = n * world_size
    return (
        scale.new_empty(()),
        torch.empty_like(scale),
        torch.empty_like(scale),
        images.new_empty(total, d),
        texts.new_empty(total, d),
        scale.new_empty(0 if local else total, 3),
    )


@opaque(
    "(Tensor images, Tensor texts, Tensor scale, float pull, int world_size, bool local)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_striped,
)
def _striped(
    images: Tensor, texts: Tensor, scale: Tensor, pull: float, world_size: int, local: bool
) -> tuple[Tensor, ...]:
    """The loss; log-sums of this rank's images and texts; all images and texts; scale and both log-sums of all rows
    ``[N, 3]`` (empty with ``local``)."""
    all_images, all_texts = gather_rows(images, world_size), gather_rows(texts, world_size)
    image_sums, _, _ = _tiles.log_sums(Rows(images), Rows(all_texts), scale)
    text_sums, _, _ = _tiles.log_sums(Rows(texts), Rows(all_images), scale)
    loss = _loss(images, texts, scale, image_sums + text_sums, pull, world_size, local)
    rows = torch.stack([scale, image_sums, text_sums], 1)
    all_rows = rows[:0].clone() if local else gather_rows(rows, world_size)
    return loss, image_sums, text_sums, all_images, all_texts, all_rows


@opaque(
    "(Tensor grad, Tensor images, Tensor texts, Tensor scale, Tensor image_sums, Tensor text_sums, Tensor all_images,"
    " Tensor all_texts, Tensor all_rows, float pull, int rank, int world_size, bool local, bool with_scale)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_grads,
)
def _striped_grad(
    grad: Tensor,
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    image_sums: Tensor,
    text_sums: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    all_rows: Tensor,
    pull: float,
    rank: int,
    world_size: int,
    local: bool,
    with_scale: bool,
) -> tuple[Tensor, ...]:
    """An anchor is pulled by its own row and, unless only a rank's own anchors count, by the column that every row of
    the other direction has for it. Talks to nobody."""
    n = len(images)
    weight = grad / (2 * n if local else 2 * n * world_size)
    positive = scale * (weight * pull if local else 2 * weight * pull)
    all_scale, all_image_sums, all_text_sums = all_rows.unbind(1)
    grads, grad_scale = [], torch.zeros_like(scale)
    for mine, others, sums, other_sums in (
        (images, all_texts, image_sums, all_text_sums),
        (texts, all_images, text_sums, all_image_sums),
    ):
        columns = None if local else (all_scale, other_sums, all_scale * weight)
        one, _, means, _ = _tiles.info_nce_grad(
            Rows(mine),
            Rows(others),
            (scale, sums, scale * weight),
            columns,
            positive,
            rank * n,
            at_others=False,
            with_means=with_scale,
        )
        grads.append(one.to(mine.dtype))
        grad_scale.add_(means)
    if with_scale:
        grad_scale = weight * (grad_scale - 2 * pull * _tiles.dots(Rows(images), Rows(texts)))
    return grads[0], grads[1], grad_scale


class _StripedInfoNCE(torch.autograd.Function):
    """From one stripe per rank and direction: ranks that keep their gradients to themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        pull: float,
        rank: int,
        world_size: int,
        local: bool,
    ) -> Tensor:
        loss, *found = _striped(images, texts, scale, pull, world_size, local)
        ctx.save_for_backward(images, texts, scale, *found)
        ctx.options = (pull, rank, world_size, local)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        with_scale = ctx.needs_input_grad[2]
        grads = _striped_grad(grad, *ctx.saved_tensors, *ctx.options, with_scale)
        return grads[0], grads[1], grads[2] if with_scale else None, None, None, None, None


def _uniform_pull(
    images: Tensor, texts: Tensor, scale: Tensor, world_size: int, local: bool, with_grad: bool
) -> Tensor:
    """What label smoothing takes off the log-sums: of each row its scale times the mean of its similarities, averaged
    over rows and directions. From sums of features, so that ranks exchange vectors of length D."""
    rows, everyone = len(scale), len(scale) * world_size
    pulled = torch.stack([scale @ images, scale @ texts])
    pullers = torch.stack([texts.sum(0), images.sum(0)])
    if world_size > 1:
        pullers = _SumOverRanks.apply(pullers.detach() if local and not with_grad else pullers, with_grad)
        if not local:
            rows, pulled = everyone, _SumOverRanks.apply(pulled, with_grad)
    return (pulled * pullers).sum() / (2 * rows * everyone)


@opaque("(Tensor value) -> Tensor", torch.empty_like)
def _sum_over_ranks(value: Tensor) -> Tensor:
    return sum_over_ranks(value)


class _SumOverRanks(torch.autograd.Function):
    """Its gradient is that of every rank's loss, or of this rank's own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, with_grad: bool) -> Tensor:
        ctx.with_grad = with_grad
        return _sum_over_ranks(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        return _sum_over_ranks(grad) if ctx.with_grad else grad, None


# -- max-margin --------------------------------------------------------------------------------------------------------


def _fake_max_margin(
    images: Tensor, texts: Tensor, margin: Tensor, normalize: bool, needed: bool, rank: int, world_size: int
) -> tuple[Tensor, ...]:
    grads = [torch.empty_like(x if needed else x[:0], dtype=margin.dtype) for x in (images, texts, margin)]
    return (margin.new_empty(()), *grads)


@opaque(
    "(Tensor images, Tensor texts, Tensor margin, bool normalize, bool needed, int rank, int world_size)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_max_margin,
)
def _max_margin(
    images: Tensor, texts: Tensor, margin: Tensor, normalize: bool, needed: bool, rank: int, world_size: int
) -> tuple[Tensor, ...]:
    """The loss and, if ``needed``, its gradients in full precision."""
    image_rows, text_rows = Rows(images, normalize), Rows(texts, normalize)
    threshold = _tiles.dots(image_rows, text_rows) - margin
    others, thresholds = image_rows, threshold
    if world_size > 1:
        others = Rows(gather_rows(images, world_size), normalize)
        thresholds = gather_rows(threshold, world_size)
    total, grad_texts, grad_images, active, other_active = _tiles.hinges(
        text_rows, others, threshold, thresholds, rank * len(images), needed
    )
    if world_size > 1:
        total = sum_over_ranks(total)
        if needed:
            grad_images, other_active = (sum_at_owners(x, world_size) for x in (grad_images, other_active))
    share = 1.0 / max(2 * len(others) * (len(others) - 1), 1)
    if needed:
        active += other_active
        for grad, rows, partners in ((grad_images, image_rows, text_rows), (grad_texts, text_rows, image_rows)):
            _tiles.pull(grad, partners, active)
            if normalize:
                _tiles.through_norm(grad, rows)
            grad.mul_(share)
    return (total * share).to(margin.dtype), grad_images, grad_texts, active.mul_(share)


class _MaxMargin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        margin: Tensor,
        normalize: bool,
        rank: int,
        world_size: int,
        with_grad: bool,
    ) -> Tensor:
        loss, *gradients = _max_margin(
            images, texts, margin, normalize, any(ctx.needs_input_grad[:3]), rank, world_size
        )
        ctx.save_for_backward(images, texts, margin)
        ctx.gradients = gradients
        ctx.options = (normalize, rank, world_size, with_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        images, texts, margin = ctx.saved_tensors
        normalize, rank, world_size, with_grad = ctx.options
        if ctx.gradients is None:  # a second backward over the same graph
            _, *gradients = _max_margin(images, texts, margin, normalize, True, rank, world_size)
        else:
            gradients = ctx.gradients
        # Scaled in place and given away, so that they never exist twice.
        ctx.gradients = None
        factor = _sum_over_ranks(grad) if with_grad and world_size > 1 else grad
        grads = [gradient.mul_(factor).to(like.dtype) for gradient, like in zip(gradients, (images, texts, margin))]
        return grads[0], grads[1], grads[2], None, None, None, None
