"""The losses against the authors' numbers, a float64 reference, and OpenCLIP's own loss; on one and more ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks

from mmts_plugins.functional import HAS_OPERATORS, info_nce, max_margin
from mmts_plugins.losses import InfoNCELoss, MaxMarginLoss
from mmts_plugins.schedule import CosineSchedule
from mmts_plugins.tables import cluster_shift

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


@pytest.mark.skipif(not HAS_OPERATORS, reason="torch.compile takes the losses whole from 2.4 on")
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    images, texts = unit(6, 4, 11).float(), unit(6, 4, 12).float()
    tau = torch.linspace(0.05, 0.2, 6)
    loss = KINDS[kind]()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(images, texts, tau).item() == pytest.approx(loss(images, texts, tau).item(), rel=1e-6)


def at_a_low_temperature(rank, world):
    """In float32, where the exponents of a column are far above what can be added without their largest."""
    images, texts, tau = unit(8 * world, 16, 41), unit(8 * world, 16, 42), torch.full((8 * world,), 2e-3)
    rows = slice(8 * rank, 8 * rank + 8)
    loss = InfoNCELoss(gather_with_grad=True, rank=rank, world_size=world)
    ours = loss(images[rows].float(), texts[rows].float(), tau[rows])
    return ours.item(), info_nce(images, texts, tau.double()).item()


def test_ranks_at_a_low_temperature():
    for ours, exact in on_ranks(2, at_a_low_temperature):
        assert exact > 100
        assert ours == pytest.approx(exact, rel=1e-6)


def test_a_row_of_next_to_no_length_is_divided_by_a_constant():
    images, texts, margin = unit(4, 3, 51), unit(4, 3, 52), torch.full((4,), 0.2, dtype=torch.float64)
    images[1] *= 1e-10
    texts[2] *= 1e-9
    found = []
    for plain in (False, True):
        leaves = [x.clone().requires_grad_() for x in (images, texts)]
        if plain:  # as torch divides, and differentiates
            loss = max_margin(*(torch.nn.functional.normalize(x, dim=1, eps=1e-8) for x in leaves), margin)
        else:
            loss = MaxMarginLoss()(*leaves, margin)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in leaves)])
    assert found[0][0] > 0
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def compiled_and_eager(rank, world):
    """Loss and gradients of a step, as they are and compiled whole, for every kind and pair of flags."""
    torch.set_num_threads(1)
    found = []
    for kind, make in KINDS.items():
        for local, with_grad in itertools.product([False, True], [False, True]):
            loss = make(local_loss=local, gather_with_grad=with_grad, rank=rank, world_size=world)

            def step(images, texts, tau, loss=loss):
                images, texts = (torch.nn.functional.normalize(x, dim=1) for x in (images, texts))
                return loss(images, texts, tau) * (rank + 1)

            torch._dynamo.reset()
            steps = []
            for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
                leaves = [unit(6, 5, 20 + rank).float(), unit(6, 5, 30 + rank).float(), torch.linspace(0.05, 0.3, 6)]
                leaves = [leaf.requires_grad_() for leaf in leaves]
                value = function(*leaves)
                value.backward()
                steps.append([value.item(), *(leaf.grad.tolist() for leaf in leaves)])
            found.append((kind, local, with_grad, *steps))
    return found


@pytest.mark.skipif(not HAS_OPERATORS, reason="torch.compile takes the losses whole from 2.4 on")
def test_compiles_on_ranks_without_a_graph_break():
    for per_rank in on_ranks(2, compiled_and_eager):
        assert len(per_rank) == 4 * len(KINDS)
        for *which, eager, compiled in per_rank:
            assert eager[0] > 0
            for one, other in zip(eager, compiled):
                np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-6, err_msg=str(which))


# -- tiles, memory budgets, extremes -----------------------------------------------------------------------------------


def loss_and_grads(function, images, texts, tau, **options):
    leaves = [x.clone().requires_grad_() for x in (images, texts, tau)]
    loss = function(*leaves, **options)
    loss.backward()
    # In units of the scale 1/tau, where a rounding error of the similarities stays one.
    return [loss.detach(), leaves[0].grad, leaves[1].grad, leaves[2].grad * tau**2]


def explicit_info_nce(images, texts, tau, label_smoothing=0.0):
    logits = images @ texts.T / tau[:, None], texts @ images.T / tau[:, None]
    target = torch.arange(len(images))
    return sum(torch.nn.functional.cross_entropy(x, target, label_smoothing=label_smoothing) for x in logits) / 2


def explicit_max_margin(images, texts, margin):
    similarity, n = texts @ images.T, len(images)
    threshold = (similarity.diagonal() - margin)[:, None]
    hinges = torch.relu(similarity - threshold) + torch.relu(similarity.T - threshold)
    return hinges.masked_fill(torch.eye(n, dtype=torch.bool), 0).sum() / (2 * n * (n - 1))


def assert_same(ours, wanted, tolerance=1e-12):
    for mine, other in zip(ours, wanted):
        scale = max(other.abs().max().item(), 1.0)
        assert (mine - other).abs().max().item() <= tolerance * scale


@pytest.fixture(params=[(1, 1), (3, 5), (7, 2), (512, 2048)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def tiles(request, monkeypatch):
    """Tiles from one row to all: borders inside, at the end, and nowhere."""
    monkeypatch.setattr("mmts_plugins._tiles._HEIGHT", request.param[0])
    monkeypatch.setattr("mmts_plugins._tiles._WIDTH", request.param[1])


@pytest.mark.parametrize("budget", [0, 3000, 1 << 30], ids=["none-kept", "some-kept", "all-kept"])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 1), (13, 1), (13, 5), (40, 7)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_info_nce_in_tiles(tiles, budget, n, d, smoothing):
    images, texts = unit(n, d, n), unit(n, d, n + d)
    tau = torch.linspace(0.02, 0.5, n, dtype=torch.float64)
    ours = loss_and_grads(info_nce, images, texts, tau, label_smoothing=smoothing, memory_budget=budget)
    assert_same(ours, loss_and_grads(explicit_info_nce, images, texts, tau, label_smoothing=smoothing))


@pytest.mark.parametrize("margin", [-3.0, 0.05, 0.4, 3.0], ids=["none-active", "few", "some", "all-active"])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (13, 1), (13, 5), (40, 7)])
@pytest.mark.parametrize("sparse", [0.0, 2.1], ids=["dense", "sparse"])
def test_max_margin_in_tiles(tiles, margin, n, d, sparse, monkeypatch):
    monkeypatch.setattr("mmts_plugins._tiles._SPARSE_BELOW", sparse)
    # Not collinear with the hinge's corner: D = 1 gives similarities of exactly one and minus one.
    images, texts = unit(n, d, n), unit(n, d, n + d)
    margins = margin + torch.linspace(0.001, 0.0123, n, dtype=torch.float64)
    assert_same(
        loss_and_grads(max_margin, images, texts, margins), loss_and_grads(explicit_max_margin, images, texts, margins)
    )


@pytest.mark.parametrize("tau", [2e-3, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("relation", [-1.0, 0.0, 1.0], ids=["opposed", "unrelated", "matched"])
def test_extreme_temperatures_do_not_overflow(tau, relation):
    images = unit(30, 8, 1)
    texts = relation * images if relation else unit(30, 8, 2)
    tau = torch.full((30,), tau, dtype=torch.float64)
    ours = loss_and_grads(info_nce, images, texts, tau, memory_budget=0)
    assert_same(ours, loss_and_grads(explicit_info_nce, images, texts, tau))
    single = loss_and_grads(info_nce, images.float(), texts.float(), tau.float(), memory_budget=0)
    assert all(torch.isfinite(x).all() for x in single)
    assert single[0].item() == pytest.approx(ours[0].item(), rel=1e-5, abs=4e-7 / tau.max().item())


def test_only_what_requires_a_gradient_gets_one():
    images, texts = unit(6, 4, 1).requires_grad_(), unit(6, 4, 2)
    tau = torch.full((6,), 0.1, dtype=torch.float64)
    for function in (info_nce, max_margin):
        images.grad = None
        function(images, texts, tau).backward()
        assert images.grad is not None
        assert texts.grad is None
        assert not function(images.detach(), texts, tau).requires_grad


def test_backward_twice_over_the_same_graph():
    images, texts = unit(6, 4, 1).requires_grad_(), unit(6, 4, 2).requires_grad_()
    for function in (info_nce, max_margin):
        loss = function(images, texts, torch.full((6,), 0.3, dtype=torch.float64))
        first = torch.autograd.grad(loss, images, retain_graph=True)[0]
        second = torch.autograd.grad(-2 * loss, images)[0]
        assert torch.allclose(second, -2 * first, rtol=1e-14)


def test_double_backward_is_refused():
    images, texts = unit(6, 4, 1).requires_grad_(), unit(6, 4, 2).requires_grad_()
    for function in (info_nce, max_margin):
        loss = function(images, texts, torch.full((6,), 0.3, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="no double backward"):
            torch.autograd.grad(loss, images, create_graph=True)


def run_with_temperature_grad(rank, world_size, images, texts, temperature, smoothing):
    rows = slice(rank * len(images) // world_size, (rank + 1) * len(images) // world_size)
    out = []
    for flags in FLAGS:
        for kind in KINDS:
            leaves = [torch.from_numpy(x[rows]).requires_grad_() for x in (images, texts, temperature)]
            extra = {"label_smoothing": smoothing} if kind == "infonce" else {}
            loss = KINDS[kind](**flags, **extra, rank=rank, world_size=world_size)(*leaves)
            (loss * (rank + 1)).backward()  # ranks may weigh their losses differently
            out.append([loss.item(), *(leaf.grad.numpy() for leaf in leaves)])
    return out


def gathered_explicitly(rank, world_size, images, texts, temperature, smoothing):
    """The same by gathering everything on every rank with torch's own differentiable all-gather, and explicit forms."""
    from torch.distributed.nn.functional import all_gather

    def gather(leaf, flags, keep_own):
        if flags["gather_with_grad"]:
            return torch.cat(all_gather(leaf))
        blocks = [torch.empty_like(leaf) for _ in range(world_size)]
        torch.distributed.all_gather(blocks, leaf.detach())
        if keep_own:
            blocks[rank] = leaf
        return torch.cat(blocks)

    rows = slice(rank * len(images) // world_size, (rank + 1) * len(images) // world_size)
    out = []
    for flags in FLAGS:
        for kind in KINDS:
            leaves = [torch.from_numpy(x[rows]).requires_grad_() for x in (images, texts, temperature)]
            local = flags["local_loss"] and kind == "infonce"
            everyone = [gather(leaf, flags, keep_own=not local) for leaf in leaves]
            if local:
                target = torch.arange(rows.start, rows.stop)
                logits = leaves[0] @ everyone[1].T, leaves[1] @ everyone[0].T
                cross = torch.nn.functional.cross_entropy
                loss = sum(cross(x / leaves[2][:, None], target, label_smoothing=smoothing) for x in logits) / 2
            elif kind == "infonce":
                loss = explicit_info_nce(*everyone, label_smoothing=smoothing)
            else:
                unit_rows = [x / x.norm(dim=1, keepdim=True) for x in everyone[:2]]
                loss = explicit_max_margin(*unit_rows, everyone[2])
            (loss * (rank + 1)).backward()
            out.append([loss.item(), *(leaf.grad.numpy() for leaf in leaves)])
    return out


def both(rank, world_size, *arguments):
    return run_with_temperature_grad(rank, world_size, *arguments), gathered_explicitly(rank, world_size, *arguments)


@pytest.mark.parametrize(("world", "smoothing"), [(2, 0.1), (3, 0.0), (4, 0.1)])
def test_ranks_equal_gathering_everything(world, smoothing):
    """Values, and gradients at features and temperatures, for each pair of flags, with a loss weight per rank."""
    n = 3 * world
    arguments = (unit(n, 5, 1).numpy(), unit(n, 5, 2).numpy(), np.linspace(0.05, 0.3, n), smoothing)
    for ours, explicit in on_ranks(world, both, *arguments):
        assert len(ours) == 8
        for mine, wanted in zip(ours, explicit):
            for a, b in zip(mine, wanted):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_memory_is_linear():
    """Nothing of size N x N: live bytes of the allocator, counted over forward and backward."""
    sizes = (2048, 4096)
    for function, options in ((info_nce, {"memory_budget": 0}), (max_margin, {})):
        peaks = []
        for n in sizes:
            images, texts = (unit(n, 16, seed).float().requires_grad_() for seed in (1, 2))
            peaks.append(peak_bytes(function, images, texts, torch.full((n,), 0.1), **options))
        square = 4 * sizes[1] ** 2
        assert peaks[1] < 0.25 * square
        assert peaks[1] < 2.2 * peaks[0]


def peak_bytes(function, *arguments, **options) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*arguments, **options).backward()
    live = peak = 0
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns() if hasattr(e, "start_ns") else e.start_us()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
