"""The losses' arithmetic, tile by tile: no gradients are recorded here, and nothing of size N x N outlives its tile.

A tile is a block of rows of the similarity matrix against all columns. Exponents are taken to base 2 (cheaper than
base e on a CPU), products go straight into buffers that are used again. Nothing reads a value back from the device,
except to choose sparse products on a CPU, where that costs nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, Callable, Optional

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)
_TILE_ELEMENTS = 1 << 20  # 4 MiB of float32: stays in a CPU's cache between passes
_TILE_ELEMENTS_GPU = 1 << 24  # fewer, larger kernels: a launch costs more than a small tile
_LEAST_ROWS = 256  # with fewer rows the matrix product itself gets slower
_SPARSE_BELOW = 0.05  # share of active hinges; sparse products win below 8-9%


def rows_per_tile(rows: int, columns: int, device: torch.device) -> int:
    """How many rows a tile has: a fixed number of elements, but enough rows to keep the product efficient."""
    elements = _TILE_ELEMENTS if device.type == "cpu" else _TILE_ELEMENTS_GPU
    return max(1, min(rows, max(_LEAST_ROWS, elements // max(columns, 1) // 64 * 64)))


def _tiles(anchors: Tensor, others: Tensor) -> Iterator[slice]:
    rows = len(anchors)
    step = rows_per_tile(rows, len(others), anchors.device)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _new_tile(anchors: Tensor, others: Tensor) -> Tensor:
    return anchors.new_empty(rows_per_tile(len(anchors), len(others), anchors.device), len(others))


def _opaque(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One node for ``torch.compile`` instead of a graph unrolled over tiles; the plain function before torch 2.4."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        if not hasattr(torch.library, "custom_op"):
            return function
        operator = torch.library.custom_op(f"mmts::{name}", function, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        return operator

    return wrap


# -- InfoNCE -----------------------------------------------------------------------------------------------------------


def _fake_log_sums(images: Tensor, texts: Tensor, scale: Tensor, kept_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(scale), torch.empty_like(scale), images.new_empty(kept_rows, len(texts))


@_opaque(
    "log_sums", "(Tensor images, Tensor texts, Tensor scale, int kept_rows) -> (Tensor, Tensor, Tensor)", _fake_log_sums
)
def log_sums(images: Tensor, texts: Tensor, scale: Tensor, kept_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of both directions from one product.

    Args:
        images, texts: ``[n, D]``.
        scale: ``[n]``, one over the temperature.
        kept_rows: of the similarities, to spare the backward their product; the end of a tile, or all.

    Returns:
        ``[n]`` over ``scale_i s_ij`` (image to text), ``[n]`` over ``scale_j s_ij`` (text to image), ``[kept_rows, n]``
        similarities.
    """
    n = len(images)
    kept = images.new_empty(kept_rows, n)
    work = _new_tile(images, texts)
    buffer = work if kept_rows == n else torch.empty_like(work)
    scale_2 = scale * _LOG2_E
    row_sums = torch.empty_like(scale)
    column_top = torch.full_like(scale, -math.inf)
    column_sum = torch.zeros_like(scale)
    for rows in _tiles(images, texts):
        size = rows.stop - rows.start
        tile = kept[rows] if rows.stop <= kept_rows else buffer[:size]
        torch.mm(images[rows], texts.T, out=tile)
        row_sums[rows] = _row_log_sum(tile, scale[rows], scale_2[rows], work[:size])
        top = torch.maximum(column_top, tile.amax(0))
        exponents = torch.addcmul(-top * scale_2, tile, scale_2, out=work[:size]).exp2_()
        column_sum.mul_(((column_top - top) * scale_2).exp2_()).add_(exponents.sum(0))
        column_top = top
    return row_sums, column_sum.log_().addcmul_(column_top, scale), kept


def _row_log_sum(tile: Tensor, scale: Tensor, scale_2: Tensor, work: Tensor) -> Tensor:
    top = tile.amax(1)
    exponents = torch.addcmul((-top * scale_2).unsqueeze(1), tile, scale_2.unsqueeze(1), out=work).exp2_()
    return exponents.sum(1).log_().addcmul_(top, scale)


def stripe_log_sum(anchors: Tensor, others: Tensor, scale: Tensor) -> Tensor:
    """``[n]`` log-sum-exp over ``scale_i s_ij`` of ``[n, D]`` anchors against ``[N, D]`` others."""
    result = torch.empty_like(scale)
    scale_2 = scale * _LOG2_E
    tile = _new_tile(anchors, others)
    work = torch.empty_like(tile)
    for rows in _tiles(anchors, others):
        size = rows.stop - rows.start
        torch.mm(anchors[rows], others.T, out=tile[:size])
        result[rows] = _row_log_sum(tile[:size], scale[rows], scale_2[rows], work[:size])
    return result


def _fake_info_nce_grad(
    images: Tensor, texts: Tensor, scale: Tensor, row_sums: Tensor, column_sums: Tensor, kept: Tensor, with_means: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(images), torch.empty_like(texts), torch.empty_like(scale)


@_opaque(
    "info_nce_grad",
    "(Tensor images, Tensor texts, Tensor scale, Tensor row_sums, Tensor column_sums, Tensor kept, bool with_means)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_info_nce_grad,
)
def info_nce_grad(
    images: Tensor, texts: Tensor, scale: Tensor, row_sums: Tensor, column_sums: Tensor, kept: Tensor, with_means: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum_i scale_i (log sum exp of row i, of column i) / 2n``, similarities recomputed or kept.

    Returns:
        ``[n, D]`` at the images, ``[n, D]`` at the texts, and, if ``with_means``, ``[n]`` the mean similarity of each
        anchor under both softmaxes, added (zeros otherwise).
    """
    n = len(images)
    grad_images, grad_texts = torch.empty_like(images), torch.zeros_like(texts)
    means = torch.zeros_like(scale)
    work = _new_tile(images, texts)
    buffer = torch.empty_like(work)
    scale_2, weight_2 = scale * _LOG2_E, torch.log2(scale / (2 * n))
    row_shift, column_shift = weight_2 - row_sums * _LOG2_E, weight_2 - column_sums * _LOG2_E
    for rows in _tiles(images, texts):
        size = rows.stop - rows.start
        by_row, tile = work[:size], buffer[:size]
        similarities = kept[rows] if rows.stop <= len(kept) else torch.mm(images[rows], texts.T, out=tile)
        torch.addcmul(row_shift[rows].unsqueeze(1), similarities, scale_2[rows].unsqueeze(1), out=by_row).exp2_()
        if with_means:
            means[rows] += (by_row * similarities).sum(1)
            raw = similarities.clone()
        by_column = torch.addcmul(column_shift, similarities, scale_2, out=tile).exp2_()
        if with_means:
            means += (by_column * raw).sum(0)
        by_row.add_(by_column)
        torch.mm(by_row, texts, out=grad_images[rows])
        grad_texts.addmm_(by_row.T, images[rows])
    return grad_images, grad_texts, means * (2 * n) / scale


def stripe_info_nce_grad(
    anchors: Tensor,
    others: Tensor,
    scale: Tensor,
    log_sum: Tensor,
    weight: Tensor,
    cross: Optional[tuple[Tensor, Tensor, Tensor]],
    with_means: bool,
) -> tuple[Tensor, Tensor]:
    """What the anchors of one rank receive from their own rows and, with ``cross``, from every other anchor's row.

    Args:
        anchors, others: ``[n, D]`` and ``[N, D]``.
        scale, log_sum: ``[n]`` of the anchors' rows.
        weight: scalar, of each anchor's row in the loss.
        cross: ``[N]`` scale, log-sum and weight of the rows of the other direction.

    Returns:
        ``[n, D]``, and ``[n]`` mean similarity of each row under its softmax.
    """
    grad, means = torch.empty_like(anchors), torch.zeros_like(scale)
    tile = _new_tile(anchors, others)
    work = torch.empty_like(tile)
    scale_2, shift = scale * _LOG2_E, torch.log2(scale) - log_sum * _LOG2_E
    if cross is not None:
        other_scale, other_log_sum, other_weight = cross
        other_scale_2, other_shift = other_scale * _LOG2_E, torch.log2(other_scale) - other_log_sum * _LOG2_E
    for rows in _tiles(anchors, others):
        size = rows.stop - rows.start
        by_row, similarities = work[:size], tile[:size]
        torch.mm(anchors[rows], others.T, out=similarities)
        torch.addcmul(shift[rows].unsqueeze(1), similarities, scale_2[rows].unsqueeze(1), out=by_row).exp2_()
        if with_means:
            means[rows] = (by_row * similarities).sum(1) / scale[rows]
        by_row.mul_(weight)
        if cross is not None:
            by_column = torch.addcmul(other_shift, similarities, other_scale_2, out=similarities).exp2_()
            by_row.addcmul_(by_column, other_weight)
        torch.mm(by_row, others, out=grad[rows])
    return grad, means


# -- max-margin --------------------------------------------------------------------------------------------------------


def _fake_hinges(
    texts: Tensor, images: Tensor, threshold: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = texts.new_empty(0)
    grads = (torch.empty_like(texts), torch.empty_like(images), torch.empty_like(threshold))
    return (threshold.new_empty(()), *(grads if with_grad else (empty, empty, empty)))


@_opaque(
    "hinges",
    "(Tensor texts, Tensor images, Tensor threshold, bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_hinges,
)
def hinges(texts: Tensor, images: Tensor, threshold: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of all hinges of both directions and, in the same pass, its gradients.

    Args:
        texts, images: ``[n, D]``.
        threshold: ``[n]``, ``s_ii - margin_i``: a negative is active above it.

    Returns:
        The sum; ``[n, D]`` and ``[n, D]`` gradients; ``[n]`` active hinges of each anchor (without ``with_grad`` the
        last three are empty).
    """
    none = texts.new_empty(0)
    grad_texts = torch.empty_like(texts) if with_grad else none
    grad_images = torch.zeros_like(images) if with_grad else none.clone()
    active = torch.zeros_like(threshold) if with_grad else none.clone()
    total = torch.zeros((), dtype=_sum_dtype(texts), device=texts.device)
    tile = _new_tile(texts, images)
    work = torch.empty_like(tile)
    for rows in _tiles(images, texts):
        size = rows.stop - rows.start
        above, by_row = tile[:size], work[:size]
        total += _row_hinges(texts[rows], images, threshold[rows], rows.start, above, by_row)
        above.sub_(threshold).clamp_min_(0)
        total += above.sum()
        if not with_grad:
            continue
        row_count, column_count = by_row.sign_().sum(1), above.sign_().sum(0)
        active[rows] += row_count
        active += column_count
        by_row.add_(above)
        if texts.device.type == "cpu" and float(row_count.sum() + column_count.sum()) < _SPARSE_BELOW * by_row.numel():
            _sparse_products(by_row, texts[rows], images, grad_texts[rows], grad_images)
        else:
            torch.mm(by_row, images, out=grad_texts[rows])
            grad_images.addmm_(by_row.T, texts[rows])
    if with_grad:
        grad_texts.addcmul_(images, active.unsqueeze(1), value=-1)
        grad_images.addcmul_(texts, active.unsqueeze(1), value=-1)
    return total.to(texts.dtype), grad_texts, grad_images, active


def _row_hinges(
    anchors: Tensor, others: Tensor, threshold: Tensor, first: int, above: Tensor, by_row: Tensor
) -> Tensor:
    """Similarities (the positives, from column ``first`` on, out of reach) into ``above``, the rows' hinges into
    ``by_row``; their sum."""
    torch.mm(anchors, others.T, out=above)
    above.diagonal(first).fill_(-math.inf)
    return torch.sub(above, threshold.unsqueeze(1), out=by_row).clamp_min_(0).sum()


def _sparse_products(active: Tensor, texts: Tensor, images: Tensor, grad_texts: Tensor, grad_images: Tensor) -> None:
    """``active @ images`` into ``grad_texts``, ``active.T @ texts`` onto ``grad_images``, from the entries set."""
    row, column = active.nonzero(as_tuple=True)
    value = active[row, column]
    grad_texts.copy_(_csr(row, column, value, active.shape) @ images)
    order = torch.argsort(column, stable=True)
    transposed = _csr(column[order], row[order], value[order], (active.shape[1], active.shape[0]))
    torch.addmm(grad_images, transposed, texts, out=grad_images)


def _csr(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    start = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=shape[0]), 0, out=start[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta, and names checks it leaves out
        return torch.sparse_csr_tensor(start, column, value, shape)


def stripe_hinges(
    anchors: Tensor, others: Tensor, threshold: Tensor, all_thresholds: Tensor, first: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One rank's rows of one direction: the sum of its hinges, what its anchors receive, and its active hinges.

    Args:
        anchors, others: ``[n, D]`` and ``[N, D]``; anchor ``i`` and other ``first + i`` are a pair.
        threshold, all_thresholds: ``[n]`` and ``[N]``.

    Returns:
        The sum; ``[n, D]`` gradient from the hinges of these anchors and of all others, without the positives' part;
        ``[n]`` active hinges of each anchor in this direction.
    """
    grad = torch.empty_like(anchors) if with_grad else anchors.new_empty(0)
    active = torch.zeros_like(threshold)
    total = torch.zeros((), dtype=_sum_dtype(anchors), device=anchors.device)
    tile = _new_tile(anchors, others)
    work = torch.empty_like(tile)
    for rows in _tiles(anchors, others):
        size = rows.stop - rows.start
        above, by_row = tile[:size], work[:size]
        total += _row_hinges(anchors[rows], others, threshold[rows], first + rows.start, above, by_row)
        if with_grad:
            active[rows] = by_row.sign_().sum(1)
            by_row.add_(above.sub_(all_thresholds).clamp_min_(0).sign_())
            torch.mm(by_row, others, out=grad[rows])
    return total, grad, active


def _sum_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
