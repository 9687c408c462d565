"""The product of spheres of Sun & Li (TMLR 2024): its normalisation, and the distances of their Table 1.

A feature of ``n * m`` numbers is ``m`` sub-spheres of ``n`` numbers each, ``PS(n, m)``. The paper's similarity is the
sum of the ``m`` cosines, ``tr(u'v)``. Here every sub-sphere is normalised and the whole divided by ``sqrt(m)``: a unit
vector, whose plain inner product is the *mean* of the cosines. Whatever expects unit features keeps working, and a
logit scale ``s`` of the host is ``m * t``, where ``t`` is the paper's factor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError

INNER, GEODESIC, EUCLIDEAN = "inner", "geodesic", "euclidean"
DISTANCES = (INNER, GEODESIC, EUCLIDEAN)
"""By their number in a checkpoint's marker: never reorder."""


def in_both_units(scale: float, factor: float) -> str:
    """A host's logit scale for a reader, and where the paper's unit is another one, the paper's ``t`` beside it."""
    return f"{scale:.4g}" + (f" (t = {scale / factor:.4g})" if factor != 1 else "")


def product_normalize(features: Tensor, m: int) -> Tensor:
    """Features on the product of ``m`` spheres, as vectors of length 1 (Sec. 2.3, divided by ``sqrt(m)``).

    Args:
        features: ``[..., n * m]`` of any floating dtype; sub-sphere ``k`` is the ``k``-th run of ``n`` numbers.
        m: how many spheres. One is ``F.normalize``, to the bit.

    Returns:
        ``[..., n * m]``, the same dtype.

    Raises:
        ConfigError: the features cannot be split into ``m``.
    """
    if m == 1:
        return F.normalize(features, dim=-1)
    return F.normalize(_split(features, m), dim=-1).flatten(-2) / math.sqrt(m)


def product_inner(images: Tensor, texts: Tensor, m: int) -> Tensor:
    """The paper's similarity ``tr(u'v)``, in ``[-m, m]``: the sum of the cosines of the sub-spheres.

    Args:
        images, texts: ``[N, n * m]`` and ``[M, n * m]`` from :func:`product_normalize`.

    Returns:
        ``[N, M]``.
    """
    return m * (images @ texts.T)


def product_geodesic(images: Tensor, texts: Tensor, m: int) -> Tensor:
    """``sqrt(sum_k arccos^2(u_k'v_k))``, the shortest way on the product of spheres (Sec. 2.3), in ``[0, sqrt(m) pi]``.

    Args:
        images, texts: ``[N, n * m]`` and ``[M, n * m]`` from :func:`product_normalize`.

    Returns:
        ``[N, M]``. One sub-sphere after another, so that memory is a few ``[N, M]`` and not ``m`` of them. The gradient
        of the root is taken as zero where both are the same point.
    """
    first, second = _split(images, m), _split(texts, m)
    total = arccos_squared(m * (first[..., 0, :] @ second[..., 0, :].T))
    for k in range(1, m):
        total = total + arccos_squared(m * (first[..., k, :] @ second[..., k, :].T))
    return _root(total)


def euclidean(images: Tensor, texts: Tensor) -> Tensor:
    """``||u - v||_2`` of features ``[N, D]`` and ``[M, D]`` in plain space, not normalised (Table 1): ``[N, M]``."""
    return torch.cdist(images, texts, compute_mode="donot_use_mm_for_euclid_dist")


def _split(features: Tensor, m: int) -> Tensor:
    width = features.shape[-1]
    if m < 1 or width % m:
        raise ConfigError(f"features of {width} numbers are no product of {m} spheres")
    return features.unflatten(-1, (m, width // m))


def _root(squared: Tensor) -> Tensor:
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, torch.ones_like(squared)).sqrt(), 0.0)


class _ArccosSquared(torch.autograd.Function):
    """``arccos(x)^2``, whose derivative at 1 is -2, where that of ``arccos`` alone is infinite."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        cosine = cosine.clamp(-1, 1)
        angle = torch.arccos(cosine)
        ctx.save_for_backward(cosine, angle)
        return angle.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        cosine, angle = ctx.saved_tensors
        # -2 angle / sin(angle): 1 in the limit at angle 0; at pi it has none, and its largest float stands for it
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        near = angle < _NEAR[cosine.dtype]
        ratio = torch.where(near, 1 + angle.square() / 6, angle / sine.clamp_min(torch.finfo(cosine.dtype).eps))
        return -2 * ratio * gradient


_NEAR = {torch.float64: 1e-4, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}


def arccos_squared(cosine: Tensor) -> Tensor:
    """``arccos(x)^2`` of cosines in ``[-1, 1]`` (rounding beyond is cut off), with its exact gradient, also at 1."""
    result: Tensor = _ArccosSquared.apply(cosine)
    return result
