"""The two losses as pure functions of features and a per-row temperature or margin (paper, Eqs. 2-5, 8, 10-12).

Exact custom autograd functions: both directions share one similarity product, gradients are closed forms, and no N x N
matrix is kept beyond a memory budget. Products, exponents and sums are in float32 for half-precision features, also
under autocast, and in float64 for float64 features. Once differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from . import _tiles

DEFAULT_BUDGET = 64 * 2**20
"""Bytes of similarities that InfoNCE keeps for its backward by default: all of them up to N = 4096 in float32."""


def full_precision(tensor: Tensor) -> Tensor:
    """Half types to float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor,
    label_smoothing: float = 0.0,
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """InfoNCE in both directions with one temperature per row (paper, Eqs. 10-12 with tau_i of Eq. 8).

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
    """
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = full_precision(image_features), full_precision(text_features)
        loss: Tensor = _InfoNCE.apply(images, texts, 1.0 / temperature.to(images.dtype), label_smoothing, memory_budget)
        return loss


def max_margin(image_features: Tensor, text_features: Tensor, margin: Tensor) -> Tensor:
    """Max-margin ranking in both directions with one margin per row (paper, Eq. 3 with m = tau_i of Eq. 8).

    With ``s`` the text-by-image similarities, the mean over all ``2 n (n - 1)`` hinges
    ``relu(margin_i - s_ii + s_ij)`` and ``relu(margin_i - s_ii + s_ji)``, ``j != i``. A single pair has no negative:
    the loss is zero. Gradients are formed in the forward pass, from the active hinges.

    Args:
        image_features, text_features: ``[n, D]``, pairs by row, L2-normalised by the caller.
        margin: ``[n]``; gets a gradient if it requires one.

    Returns:
        A scalar.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = full_precision(image_features), full_precision(text_features)
        loss: Tensor = _MaxMargin.apply(images, texts, margin.to(images.dtype))
        return loss


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


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, smoothing: float, memory_budget: int) -> Tensor:
        n = len(images)
        kept_rows = 0
        if any(ctx.needs_input_grad[:2]):
            affordable = memory_budget // (n * images.element_size())
            step = _tiles.rows_per_tile(n, n, images.device)
            kept_rows = n if affordable >= n else affordable // step * step
        row_sums, column_sums, kept = _tiles.log_sums(images, texts, scale, kept_rows)
        positive = (images * texts).sum(1)
        ctx.save_for_backward(images, texts, scale, row_sums, column_sums, kept)
        ctx.smoothing = smoothing
        loss = (row_sums + column_sums) / 2 - (1 - smoothing) * scale * positive
        if smoothing:
            loss = loss - smoothing * scale * ((images @ texts.mean(0)) + (texts @ images.mean(0))) / 2
        return loss.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        images, texts, scale, row_sums, column_sums, kept = ctx.saved_tensors
        n, smoothing = len(images), ctx.smoothing
        with_scale = ctx.needs_input_grad[2]
        with torch.autocast(images.device.type, enabled=False):
            grad_images, grad_texts, means = _tiles.info_nce_grad(
                images, texts, scale, row_sums, column_sums, kept, with_scale
            )
            weight = (scale * ((1 - smoothing) / n)).unsqueeze(1)
            grad_images.addcmul_(texts, weight, value=-1)
            grad_texts.addcmul_(images, weight, value=-1)
            if smoothing:
                share = (scale * (smoothing / (2 * n))).unsqueeze(1)
                for mine, others in ((grad_images, texts), (grad_texts, images)):
                    mine.sub_(share * others.mean(0)).sub_((share * others).sum(0) / n)
            grad_scale = None
            if with_scale:
                positive = (images * texts).sum(1)
                grad_scale = means - 2 * (1 - smoothing) * positive
                if smoothing:
                    grad_scale = grad_scale - smoothing * ((images @ texts.mean(0)) + (texts @ images.mean(0)))
                grad_scale = grad_scale * (grad / (2 * n))
            return grad_images.mul_(grad), grad_texts.mul_(grad), grad_scale, None, None


class _MaxMargin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, margin: Tensor) -> Tensor:
        n = len(images)
        threshold = (images * texts).sum(1) - margin
        total, grad_texts, grad_images, active = _tiles.hinges(texts, images, threshold, any(ctx.needs_input_grad))
        ctx.share = 1.0 / max(2 * n * (n - 1), 1)
        ctx.save_for_backward(images, texts, threshold)
        ctx.gradients = (grad_texts, grad_images, active)
        return total * ctx.share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        if ctx.gradients is None:  # a second backward over the same graph
            images, texts, threshold = ctx.saved_tensors
            _, *gradients = _tiles.hinges(texts, images, threshold, True)
        else:
            gradients = ctx.gradients
        # Scaled in place and given away, so that they never exist twice.
        ctx.gradients = None
        grad_texts, grad_images, active = (gradient.mul_(grad * ctx.share) for gradient in gradients)
        return grad_images, grad_texts, active
