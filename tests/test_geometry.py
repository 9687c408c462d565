"""The product of spheres against the paper's own formulas, in float64."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmts_plugins.errors import ConfigError
from mmts_plugins.geometry import arccos_squared, euclidean, product_geodesic, product_inner, product_normalize
from mmts_plugins.losses import InfoNCELoss

shapes = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))


def features(rows: int, n: int, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(rows, n * m, dtype=torch.float64, generator=draw) for _ in range(2))
    return images, texts


def papers(images: torch.Tensor, texts: torch.Tensor, m: int) -> torch.Tensor:
    """Fig. 6: normalise each sub-sphere, sum the products over both axes."""
    u, v = (F.normalize(each.unflatten(-1, (m, -1)), dim=-1) for each in (images, texts))
    return torch.einsum("inm,jnm->ij", u, v)


def symmetric(logits: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@settings(deadline=None)
@given(shapes)
def test_one_plain_product_is_the_papers_similarity(shape):
    rows, n, m, seed = shape
    images, texts = features(rows, n, m, seed)
    u, v = product_normalize(images, m), product_normalize(texts, m)
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(rows, dtype=torch.float64), rtol=0, atol=1e-14)
    expected = papers(images, texts, m)
    torch.testing.assert_close(product_inner(u, v, m), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(m * (u @ v.T), expected, rtol=0, atol=1e-13)
    again = F.normalize(u, dim=-1)
    torch.testing.assert_close(again, u, rtol=0, atol=1e-15)


@pytest.mark.parametrize("m", [1, 2, 8])
def test_loss_and_gradients_equal_the_papers_einsum(m):
    found, t = [], 1.7
    for ours in (True, False):
        images, texts = (each.requires_grad_() for each in features(24, 8, m, 0))
        if ours:
            loss = symmetric(m * t * product_normalize(images, m) @ product_normalize(texts, m).T)
        else:
            loss = symmetric(t * papers(images, texts, m))
        loss.backward()
        found.append((loss.detach(), images.grad, texts.grad))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_a_temperature_of_the_mean_of_cosines_is_m_times_that_of_the_sum():
    m, rows = 8, 24
    images, texts = features(rows, 4, m, 1)
    tau = torch.linspace(0.03, 0.09, rows, dtype=torch.float64)
    u, v = product_normalize(images, m), product_normalize(texts, m)
    loss = InfoNCELoss()(u, v, tau)
    alike = papers(images, texts, m) / (m * tau[:, None])
    labels = torch.arange(rows)
    across = F.cross_entropy(papers(texts, images, m) / (m * tau[:, None]), labels)
    torch.testing.assert_close(loss, (F.cross_entropy(alike, labels) + across) / 2, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(loss, reference.info_nce(u, v, tau), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_sphere_is_plain_normalisation_to_the_bit(dtype):
    images = features(16, 12, 1, 2)[0].to(dtype)
    assert torch.equal(product_normalize(images, 1), F.normalize(images, dim=-1))


@pytest.mark.parametrize("m", [1, 2, 5])
def test_geodesic_distance(m):
    images, texts = features(9, 3, m, 3)
    u, v = product_normalize(images, m), product_normalize(texts, m)
    cosines = torch.einsum("imn,jmn->ijm", *(m**0.5 * each.unflatten(-1, (m, 3)) for each in (u, v)))
    expected = cosines.clamp(-1, 1).arccos().square().sum(-1).sqrt()
    torch.testing.assert_close(product_geodesic(u, v, m), expected, rtol=1e-12, atol=1e-12)
    opposite = product_geodesic(u, -u, m).diagonal()
    torch.testing.assert_close(opposite, torch.full_like(opposite, m**0.5 * math.pi), rtol=0, atol=1e-7)
    assert float(product_geodesic(u, u, m).diagonal().max()) < 1e-7


def test_arccos_squared_has_its_gradient_everywhere_but_at_the_antipode():
    cosine = torch.tensor([1.0, 1 - 1e-12, 1 - 1e-9, 1 - 1e-6, 0.5, 0.0, -0.7, -1 + 1e-6], dtype=torch.float64)
    cosine.requires_grad_()
    arccos_squared(cosine).sum().backward()
    angle = cosine.detach().arccos()
    exact = torch.where(angle < 1e-4, -2 - angle**2 / 3, -2 * angle / angle.sin())  # d(a^2)/dx = -2 a / sin a
    torch.testing.assert_close(cosine.grad, exact, rtol=1e-6, atol=0)
    assert cosine.grad[0] == -2
    inside = torch.linspace(-0.99, 0.99, 23, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(arccos_squared, inside)


def test_a_pair_at_the_same_point_has_a_finite_gradient():
    images = features(4, 3, 2, 4)[0].requires_grad_()
    product_geodesic(product_normalize(images, 2), product_normalize(images.detach(), 2), 2).sum().backward()
    assert torch.isfinite(images.grad).all()


def test_euclidean_distance_of_features_far_from_the_origin():
    """The product form of cdist loses all digits there."""
    images, texts = (1000 + each.float() for each in features(40, 4, 2, 5))
    expected = (images[:, None] - texts).norm(dim=-1)
    torch.testing.assert_close(euclidean(images, texts), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("m", [0, -1, 5])
def test_what_cannot_be_split(m):
    with pytest.raises(ConfigError, match=f"features of 12 numbers are no product of {m} spheres"):
        product_normalize(torch.ones(2, 12), m)
