"""The losses' arithmetic, tile by tile: no gradients are recorded here, and nothing of size N x N outlives its tile.

A tile is a block of the similarities of some rows with some columns. Exponents are taken to base 2 (cheaper than base e
on a CPU), products go straight into buffers that are used again. Nothing reads a value back from the device, except to
choose sparse products on a CPU, where that costs nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
_HEIGHT, _WIDTH = 512, 2048  # of a tile on a CPU: 4 MiB of float32 stay in its cache between passes
_ELEMENTS_GPU = 1 << 24  # of a tile there: fewer, larger kernels, for a launch costs more than a small tile
_LEAST_ROWS_GPU = 256  # with fewer rows the matrix product itself gets slower
_SPARSE_BELOW = 0.05  # share of active hinges; sparse products win below 8-9%
_LEAST_NORM = 1e-8  # a shorter row is divided by this


def precision(tensor: Tensor) -> torch.dtype:
    """What a tensor is computed in: float32 for half types, else its own."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def full_precision(tensor: Tensor) -> Tensor:
    """Half types to float32; float32 and float64 as they are."""
    return tensor.to(precision(tensor))


class Rows:
    """Features as the products take them, a block at a time: in full precision and, where asked, of unit length.

    Args:
        features: ``[n, D]``, of any floating type.
        normalize: divide each row by its length.
    """

    def __init__(self, features: Tensor, normalize: bool = False) -> None:
        self.features = features
        self.inverse: Optional[Tensor] = None
        if normalize:
            norms = torch.cat([torch.linalg.vector_norm(self[block], dim=1) for block in self.blocks()])
            self.inverse = norms.clamp_min_(_LEAST_NORM).reciprocal_()

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        block = full_precision(self.features[rows])
        return block if self.inverse is None else block * self.inverse[rows].unsqueeze(1)

    def blocks(self) -> Iterator[slice]:
        """Of at most a tile's number of elements."""
        elements = _HEIGHT * _WIDTH if self.features.device.type == "cpu" else _ELEMENTS_GPU
        return _steps(len(self), max(1, elements // self.features.shape[1]))

    def empty(self, rows: Optional[int] = None) -> Tensor:
        """For a gradient, of all rows or of some."""
        shape = (len(self) if rows is None else rows, self.features.shape[1])
        return torch.empty(shape, dtype=precision(self.features), device=self.features.device)


def _steps(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def dots(rows: Rows, partners: Rows) -> Tensor:
    """``[n]``: each row with its own partner."""
    products = [(rows[block] * partners[block]).sum(1) for block in rows.blocks()]
    return torch.cat(products)


def pull(grad: Tensor, partners: Rows, weight: Tensor) -> None:
    """Take ``weight`` ``[n]`` times each row's partner off its gradient."""
    for block in partners.blocks():
        grad[block].addcmul_(partners[block], weight[block].unsqueeze(1), value=-1)


def through_norm(grad: Tensor, rows: Rows) -> None:
    """The gradient at unit rows to that at the features they came from, in place."""
    assert rows.inverse is not None
    for block in rows.blocks():
        unit, inverse = rows[block], rows.inverse[block]
        along = (grad[block] * unit).sum(1) * (inverse < 1 / _LEAST_NORM)  # a shorter row was divided by a constant
        grad[block].addcmul_(unit, along.unsqueeze(1), value=-1).mul_(inverse.unsqueeze(1))


def tile_shape(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile: always as many elements; off the CPU some rows against all columns."""
    if device.type == "cpu":
        height = min(rows, _HEIGHT)
        return height, min(columns, _HEIGHT * _WIDTH // height)
    return max(1, min(rows, max(_LEAST_ROWS_GPU, _ELEMENTS_GPU // max(columns, 1) // 64 * 64))), columns


def _tiles(anchors: Rows, others: Rows) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Which rows and columns, and their features."""
    height, width = tile_shape(len(anchors), len(others), anchors.features.device)
    for columns in _steps(len(others), width):
        right = others[columns]
        for rows in _steps(len(anchors), height):
            yield rows, columns, anchors[rows], right


def _buffers(anchors: Rows, others: Rows, how_many: int = 2) -> tuple[Tensor, Tensor]:
    """Two tiles, which are the same one where one is enough."""
    shape = tile_shape(len(anchors), len(others), anchors.features.device)
    first = torch.empty(shape, dtype=precision(anchors.features), device=anchors.features.device)
    return first, first if how_many == 1 else torch.empty_like(first)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``left @ right`` onto ``total``, or into it: what it held before the first product does not count."""
    torch.addmm(total, left, right, beta=0 if first else 1, out=total)


# -- InfoNCE -----------------------------------------------------------------------------------------------------------


class _LogSums:
    """Log-sum-exp of ``scale * similarity``, to base 2, for rows (``dim=1``) or columns (``dim=0``), carried from tile
    to tile with the largest similarity so far: nothing overflows at any temperature."""

    def __init__(self, scale: Tensor, dim: int) -> None:
        self._scale_2, self._dim = scale * _LOG2_E, dim
        self._top, self._sum = torch.empty_like(scale), torch.empty_like(scale)

    def add(self, tile: Tensor, at: slice, first: bool, work: Tensor) -> None:
        dim, scale_2, top, total = self._dim, self._scale_2[at], tile.amax(self._dim), self._sum[at]
        if not first:
            before = self._top[at]
            top = torch.maximum(before, top)
            total.mul_(((before - top) * scale_2).exp2_())
        shift = (-top * scale_2).unsqueeze(dim)
        exponents = torch.addcmul(shift, tile, scale_2.unsqueeze(dim), out=work).exp2_().sum(dim)
        if first:
            total.copy_(exponents)
        else:
            total.add_(exponents)
        self._top[at] = top

    def result(self) -> Tensor:
        return self._sum.log2_().addcmul_(self._top, self._scale_2)


def join_log_sums(parts: Tensor) -> Tensor:
    """``[k, n]`` log-sums, to base 2, of ``k`` parts to those of the whole ``[n]``."""
    top = parts.amax(0)
    return (parts - top).exp2_().sum(0).log2_().add_(top)


def log_sums(
    anchors: Rows, others: Rows, scale: Tensor, other_scale: Optional[Tensor] = None, kept_rows: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, to base 2, of the rows and, from the same product, of the columns.

    Args:
        anchors, others: ``[n, D]`` and ``[N, D]``.
        scale, other_scale: ``[n]`` and ``[N]``, one over the temperature of each row and column; without the latter
            only the rows are summed.
        kept_rows: of the similarities, to spare the backward their product; the end of a tile, or all.

    Returns:
        ``[n]`` over ``scale_i s_ij``; ``[N]`` over ``other_scale_j s_ij``, or empty; ``[kept_rows, N]`` similarities.
    """
    kept = scale.new_empty(kept_rows, len(others))
    work, buffer = _buffers(anchors, others, 1 if kept_rows == len(anchors) else 2)
    by_row = _LogSums(scale, 1)
    by_column = None if other_scale is None else _LogSums(other_scale, 0)
    for rows, columns, left, right in _tiles(anchors, others):
        free = work[: len(left), : len(right)]
        tile = kept[rows, columns] if rows.stop <= kept_rows else buffer[: len(left), : len(right)]
        torch.mm(left, right.T, out=tile)
        by_row.add(tile, rows, columns.start == 0, free)
        if by_column is not None:
            by_column.add(tile, columns, rows.start == 0, free)
    return by_row.result(), scale.new_empty(0) if by_column is None else by_column.result(), kept


_Weighted = tuple[Tensor, Tensor, Tensor]  # of rows or columns: scale, log-sum, and scale times weight in the loss


def info_nce_grad(
    anchors: Rows,
    others: Rows,
    row: _Weighted,
    column: Optional[_Weighted],
    positive: Tensor,
    first: int,
    kept: Optional[Tensor] = None,
    at_others: bool = True,
    with_means: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the weighted sum of the log-sums of rows and columns, less what the positives take off.

    Args:
        anchors, others: ``[n, D]`` and ``[N, D]``.
        row: ``[n]`` each.
        column: ``[N]`` each; ``None`` where only rows count.
        positive: ``[n]`` factor of each anchor's similarity with its partner, other ``first + i``.
        kept: similarities of :func:`log_sums`; the others are computed again.
        at_others: whether the others' gradient is wanted.
        with_means: whether the means are.

    Returns:
        ``[n, D]`` at the anchors; ``[N, D]`` at the others; and the mean similarity of each row ``[n]`` and column
        ``[N]`` under its softmax. What is not wanted means nothing.
    """
    grad, grad_others = anchors.empty(), others.empty(None if at_others else 0)
    work, buffer = _buffers(anchors, others)
    scale_2, shift, weight = row[0] * _LOG2_E, -row[1], row[2]
    means = other_means = torch.zeros_like(scale_2)
    if column is not None:
        other_scale_2, other_shift, other_weight = column[0] * _LOG2_E, -column[1], column[2]
        other_means = torch.zeros_like(other_scale_2) if with_means else means
    for rows, columns, left, right in _tiles(anchors, others):
        by_row, tile = work[: len(left), : len(right)], buffer[: len(left), : len(right)]
        if kept is not None and rows.stop <= len(kept):
            similarities = kept[rows, columns]
        else:
            similarities = torch.mm(left, right.T, out=tile)
        torch.addcmul(shift[rows].unsqueeze(1), similarities, scale_2[rows].unsqueeze(1), out=by_row).exp2_()
        if with_means:
            means[rows] += (by_row * similarities).sum(1)
        by_row.mul_(weight[rows].unsqueeze(1))
        if column is not None:
            raw = similarities.clone() if with_means else similarities
            by_column = torch.addcmul(other_shift[columns], similarities, other_scale_2[columns], out=tile).exp2_()
            if with_means:
                other_means[columns] += (by_column * raw).sum(0)
            by_row.addcmul_(by_column, other_weight[columns])
        pairs, skipped = _pairs(by_row, rows, columns, first)
        pairs.sub_(positive[rows][skipped : skipped + len(pairs)])
        _add_product(grad[rows], by_row, right, columns.start == 0)
        if at_others:
            _add_product(grad_others[columns], by_row.T, left, rows.start == 0)
    return grad, grad_others, means, other_means


def _pairs(tile: Tensor, rows: slice, columns: slice, first: int) -> tuple[Tensor, int]:
    """The entries of a tile that are pairs, if any, and how many of its rows come before them."""
    offset = first + rows.start - columns.start
    return tile.diagonal(offset), max(0, -offset)


# -- max-margin --------------------------------------------------------------------------------------------------------


def hinges(
    anchors: Rows, others: Rows, threshold: Tensor, other_threshold: Tensor, first: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of the hinges of rows and columns over ``s_ij`` and, in the same pass, its gradients.

    Args:
        anchors, others: ``[n, D]`` and ``[N, D]``; anchor ``i`` and other ``first + i`` are a pair.
        threshold, other_threshold: ``[n]`` and ``[N]``, similarity of the pair less the margin: a negative is active
            above it.

    Returns:
        The sum, in double precision; ``[n, D]`` and ``[N, D]`` gradients, without the positives' part; ``[n]`` and
        ``[N]`` active hinges of each row and column. Without ``with_grad`` the last four are empty.
    """
    grad, grad_others = (x.empty(None if with_grad else 0) for x in (anchors, others))
    active, other_active = (torch.zeros_like(x if with_grad else x[:0]) for x in (threshold, other_threshold))
    total = torch.zeros((), dtype=sum_dtype(threshold), device=threshold.device)
    tile, work = _buffers(anchors, others)
    for rows, columns, left, right in _tiles(anchors, others):
        above, by_row = tile[: len(left), : len(right)], work[: len(left), : len(right)]
        torch.mm(left, right.T, out=above)
        _pairs(above, rows, columns, first)[0].fill_(-math.inf)
        total += torch.sub(above, threshold[rows].unsqueeze(1), out=by_row).clamp_min_(0).sum()
        total += above.sub_(other_threshold[columns]).clamp_min_(0).sum()
        if not with_grad:
            continue
        row_count, column_count = by_row.sign_().sum(1), above.sign_().sum(0)
        active[rows] += row_count
        other_active[columns] += column_count
        by_row.add_(above)
        count = row_count.sum() + column_count.sum()
        if count.device.type == "cpu" and float(count) < _SPARSE_BELOW * by_row.numel():
            by_row, by_column = _sparse(by_row)
        else:
            by_column = by_row.T
        _add_product(grad[rows], by_row, right, columns.start == 0)
        _add_product(grad_others[columns], by_column, left, rows.start == 0)
    return total, grad, grad_others, active, other_active


def _sparse(active: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix and its transpose, in CSR form."""
    row, column = active.nonzero(as_tuple=True)
    value = active[row, column]
    order = torch.argsort(column, stable=True)
    transposed = _csr(column[order], row[order], value[order], (active.shape[1], active.shape[0]))
    return _csr(row, column, value, active.shape), transposed


def _csr(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    start = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=shape[0]), 0, out=start[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta, and names checks it leaves out
        return torch.sparse_csr_tensor(start, column, value, shape)


def sum_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
