"""The losses against the authors' numbers, a float64 reference, and OpenCLIP's own loss; on one and more ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks

from mmts_plugins.clusters import cluster_shift
from mmts_plugins.functional import info_nce, max_margin
from mmts_plugins.losses import InfoNCELoss, MaxMarginLoss
from mmts_plugins.schedule import CosineSchedule

KINDS = {"infonce": InfoNCELoss, "max_margin": MaxMarginLoss}


def unit(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def run_loss(rank, world_size, kind, flags, images, texts, temperature):
    """The rank's loss and the gradients at its own rows, as NumPy."""
    rows = slice(rank * len(images) // world_size, (rank + 1) * len(images) // world_size)
    image = torch.from_numpy(images[rows]).requires_grad_()
    text = torch.from_numpy(texts[rows]).requires_grad_()
    loss = KINDS[kind](**flags, rank=rank, world_size=world_size)(image, text, torch.from_numpy(temperature[rows]))
    loss.backward()
    return loss.item(), image.grad.numpy(), text.grad.numpy()


def run_many(rank, world_size, cases):
    return [run_loss(rank, world_size, *case) for case in cases]


def golden_case(path: Path):
    stored = np.load(path)
    config = json.loads(str(stored["config"]))
    shift = cluster_shift(stored["cluster_sizes"], config["min_shift"], config["max_shift"])[stored["cluster_ids"]]
    temperature = CosineSchedule(config["alpha"], config["period"]).offset(config["step"]) + shift
    flags = {name: config[name] for name in ("local_loss", "gather_with_grad")}
    case = (config["loss"], flags, stored["image_features"], stored["text_features"], temperature)
    return config, case, (stored["loss_per_rank"], stored["grad_image"], stored["grad_text"])


@pytest.mark.parametrize("world", [1, 2])
def test_golden(golden, world):
    files = sorted(golden.glob(f"*_w{world}_*.npz"))
    assert files
    loaded = [golden_case(path) for path in files]
    cases = [case for _, case, _ in loaded]
    per_rank = [run_many(0, 1, cases)] if world == 1 else on_ranks(world, run_many, cases)
    for number, (config, _, (losses, grad_image, grad_text)) in enumerate(loaded):
        ours = [rank[number] for rank in per_rank]
        np.testing.assert_allclose([r[0] for r in ours], losses, atol=1e-6, err_msg=config["name"])
        np.testing.assert_allclose(np.concatenate([r[1] for r in ours]), grad_image, atol=1e-6, err_msg=config["name"])
        np.testing.assert_allclose(np.concatenate([r[2] for r in ours]), grad_text, atol=1e-6, err_msg=config["name"])


def reference_gradients(kind, flags, images, texts, temperature, world_size):
    """What OpenCLIP's flags mean, in one process: for each rank its loss, and the gradients that land on all rows."""
    n = len(images) // world_size
    tau = torch.from_numpy(temperature)
    losses, grads = [], [np.zeros_like(images), np.zeros_like(texts)]
    for rank in range(world_size):
        rows = slice(rank * n, (rank + 1) * n)
        image, text = (torch.from_numpy(x.copy()).requires_grad_() for x in (images, texts))
        local = flags["local_loss"] and kind == "infonce" and world_size > 1
        # Rows whose gradient is kept: everybody's when gathered with grad, else this rank's own.
        mask = torch.ones(len(images), 1, dtype=torch.bool)
        if not flags["gather_with_grad"]:
            mask[:] = False
            mask[rows] = True
        all_image, all_text = (torch.where(mask, x, x.detach()) for x in (image, text))
        if local:
            columns = (all_image, all_text) if flags["gather_with_grad"] else (image.detach(), text.detach())
            loss = (
                reference.info_nce_rows(image[rows], columns[1], tau[rows], rank * n).mean()
                + reference.info_nce_rows(text[rows], columns[0], tau[rows], rank * n).mean()
            ) / 2
        else:
            loss = (reference.info_nce if kind == "infonce" else reference.max_margin)(all_image, all_text, tau)
        loss.backward()
        losses.append(loss.item())
        grads[0] += image.grad.numpy()
        grads[1] += text.grad.numpy()
    return losses, *grads


FLAGS = [{"local_loss": a, "gather_with_grad": b} for a in (False, True) for b in (False, True)]


def test_reference_on_ranks():
    """Every pair of flags on one and two ranks, without the golden files."""
    images, texts = unit(8, 5, 1).numpy(), unit(8, 5, 2).numpy()
    temperature = np.linspace(0.05, 0.3, 8)
    cases = [(kind, flags, images, texts, temperature) for kind in KINDS for flags in FLAGS]
    for per_rank in ([run_many(0, 1, cases)], on_ranks(2, run_many, cases)):
        for number, (kind, flags, *_) in enumerate(cases):
            ours = [rank[number] for rank in per_rank]
            losses, grad_image, grad_text = reference_gradients(kind, flags, images, texts, temperature, len(per_rank))
            np.testing.assert_allclose([r[0] for r in ours], losses, rtol=1e-12)
            np.testing.assert_allclose(
                np.concatenate([r[1] for r in ours]), grad_image, atol=1e-12, err_msg=f"{kind} {flags}"
            )
            np.testing.assert_allclose(np.concatenate([r[2] for r in ours]), grad_text, atol=1e-12)


def run_clip_loss(rank, world_size, flags, images, texts, temperature):
    from open_clip.loss import ClipLoss

    rows = slice(rank * len(images) // world_size, (rank + 1) * len(images) // world_size)
    image = torch.from_numpy(images[rows]).requires_grad_()
    text = torch.from_numpy(texts[rows]).requires_grad_()
    loss = ClipLoss(**flags, rank=rank, world_size=world_size)(image, text, 1.0 / temperature)
    loss.backward()
    return loss.item(), image.grad.numpy(), text.grad.numpy()


def run_both(rank, world_size, images, texts, temperature):
    equal = np.full(len(images), temperature)
    return [
        (
            run_loss(rank, world_size, "infonce", flags, images, texts, equal),
            run_clip_loss(rank, world_size, flags, images, texts, temperature),
        )
        for flags in FLAGS
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_equal_temperatures_are_openclips_clip_loss(world):
    pytest.importorskip("open_clip", reason="needs the extra: pip install 'mmts-plugins[openclip]'")
    arguments = (unit(12, 6, 3).numpy(), unit(12, 6, 4).numpy(), 0.07)
    per_rank = [run_both(0, 1, *arguments)] if world == 1 else on_ranks(world, run_both, *arguments)
    for ranks in per_rank:
        assert len(ranks) == 4
        for ours, theirs in ranks:
            for mine, wanted in zip(ours, theirs):
                np.testing.assert_allclose(mine, wanted, rtol=1e-10, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    low=st.floats(2e-3, 1.0),
    spread=st.floats(0, 9.0),
)
def test_any_shape_and_temperature(n, d, seed, low, spread):
    images, texts = unit(n, d, seed), unit(n, d, seed + 1)
    tau = low + spread * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(info_nce(images, texts, tau)) == pytest.approx(
        float(reference.info_nce(images, texts, tau)), rel=1e-11, abs=1e-12
    )
    if n > 1:
        assert float(max_margin(images, texts, tau)) == pytest.approx(
            float(reference.max_margin(images, texts, tau)), rel=1e-11, abs=1e-12
        )


def test_gradcheck():
    images, texts = unit(5, 3, 5).requires_grad_(), unit(5, 3, 6).requires_grad_()
    tau = torch.linspace(0.1, 0.5, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(info_nce, (images, texts, tau))
    assert torch.autograd.gradcheck(max_margin, (images, texts, tau))


def test_a_single_pair_has_no_negative():
    images, texts = unit(1, 3, 7).requires_grad_(), unit(1, 3, 8).requires_grad_()
    loss = MaxMarginLoss()(images, texts, torch.tensor([0.2]))
    loss.backward()
    assert loss.item() == 0
    assert images.grad is not None
    assert torch.equal(images.grad, torch.zeros_like(images))


@pytest.mark.parametrize("function", [info_nce, max_margin])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_lifted_before_the_product(function, dtype):
    images, texts = unit(16, 8, 9).to(dtype), unit(16, 8, 10).to(dtype)
    tau = torch.full((16,), 0.02, dtype=torch.float64)
    exact = function(images.double(), texts.double(), tau)
    with torch.autocast("cpu", torch.bfloat16):
        loss = function(images, texts, tau)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    images, texts = unit(6, 4, 11).float(), unit(6, 4, 12).float()
    tau = torch.linspace(0.05, 0.2, 6)
    loss = KINDS[kind]()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(images, texts, tau).item() == pytest.approx(loss(images, texts, tau).item(), rel=1e-6)
