"""``mmts analyze``: every number against one computed by brute force, then the command on the real thing."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmts_plugins.geometry import product_geodesic, product_normalize

pytest.importorskip("matplotlib", reason="needs the extra: pip install 'mmts-plugins[report]'")

from mmts_plugins.analysis import distances, equilibrium, landscape, probe
from mmts_plugins.cli import main
from mmts_plugins.errors import ConfigError


def features(count: int, width: int = 16, seed: int = 0, noise: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that belong together, more or less."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, width, generator=draw)
    texts = images + noise * torch.randn(count, width, generator=draw)
    return F.normalize(images, dim=1), F.normalize(texts, dim=1)


def ratios(images: torch.Tensor, texts: torch.Tensor, scale: float) -> torch.Tensor:
    """Eq. 1 written out: the pair over all of its negatives, of both kinds."""
    weight = (scale * images.double() @ texts.double().T).exp()
    other = weight.masked_fill(torch.eye(len(weight), dtype=torch.bool), 0.0)
    return weight.diagonal() / (other.sum(1) + other.sum(0))


SCALES = [1.0, 5.0, 20.0, 100.0]


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.integers(0, 2**31), st.floats(0, 1))
def test_ratios_of_shuffled_pairs_equal_brute_force(count, seed, share):
    images, texts = (each.double() for each in features(count, seed=seed, noise=2.0))
    other = equilibrium._shuffled(count, share, torch.Generator().manual_seed(seed))
    assert sorted(other.tolist()) == list(range(count))
    moved = int((other != torch.arange(count)).sum())
    assert moved == (round(share * count) if round(share * count) >= 2 else 0)
    at = torch.tensor(SCALES, dtype=torch.float64)
    plain, shuffled = equilibrium.log_ratios(images, texts, at, [torch.arange(count), other], F.linear)
    for number, scale in enumerate(SCALES):
        torch.testing.assert_close(plain[number].exp(), ratios(images, texts, scale), rtol=1e-9, atol=0)
        expected = ratios(images, texts[other], scale)
        torch.testing.assert_close(shuffled[number].exp(), expected, rtol=1e-7, atol=0)


def test_a_wrong_pair_that_fits_far_better_than_any_other():
    """What is taken off a sum is all of it but the seventeenth digit: then the sum is taken anew."""
    images = torch.eye(4, dtype=torch.float64)
    texts = images[[1, 0, 2, 3]]  # the first two have each other's caption
    other = torch.tensor([1, 0, 2, 3])
    at = torch.tensor([100.0], dtype=torch.float64)
    (found,) = equilibrium.log_ratios(images, texts, at, [other], F.linear)
    torch.testing.assert_close(found[0].exp(), ratios(images, texts[other], 100.0), rtol=1e-9, atol=0)


def test_the_curves_and_where_they_pass_one():
    images, texts = features(600)
    scales = np.geomspace(1, 100, 31)
    curves = equilibrium.equilibrium(images, texts, scales, [64, 256], [0.0, 0.25], F.linear, batches=2, seed=3)
    assert [(c.batch_size, c.shuffled, c.batches) for c in curves] == [
        (64, 0.0, 2), (64, 0.25, 2), (256, 0.0, 2), (256, 0.25, 2)]  # fmt: skip
    order = torch.randperm(600, generator=torch.Generator().manual_seed(3))
    rows = [order[:256], order[256:512]]
    found = torch.cat([ratios(images[each], texts[each], float(scales[20])) for each in rows])
    assert curves[2].geometric[20] == pytest.approx(float(found.log().mean().exp()), rel=1e-5)
    assert curves[2].arithmetic[20] == pytest.approx(float(found.mean()), rel=1e-5)
    # A larger batch and noisier pairs are in equilibrium at a larger scale.
    places = {(c.batch_size, c.shuffled): c.scale for c in curves}
    assert places[64, 0.0] < places[256, 0.0]
    at = places[256, 0.0]
    near = torch.cat([ratios(images[each], texts[each], at) for each in rows]).log().mean()
    assert abs(float(near)) < 0.02
    assert places[256, 0.25] is None or places[256, 0.25] > at
    with pytest.raises(ConfigError, match="a batch size of 601: there are 600 pairs"):
        equilibrium.equilibrium(images, texts, scales, [601], [0.0], F.linear)


def test_a_large_batch_takes_blocks(monkeypatch):
    images, texts = features(150)
    at = torch.tensor(SCALES, dtype=torch.float64)
    whole = equilibrium.log_sums(images, texts, at, F.linear)
    monkeypatch.setattr(equilibrium, "_BLOCK", 150 * 7)
    for one, other in zip(whole, equilibrium.log_sums(images, texts, at, F.linear)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def counted(scores: torch.Tensor, keep: torch.Tensor, bins: int, low: float, high: float) -> np.ndarray:
    return np.histogram(scores[keep].numpy(), bins=bins, range=(low, high))[0]


@pytest.mark.parametrize("side", [200, 41, 7])
def test_histograms_count_every_pair_once(side, monkeypatch):
    monkeypatch.setattr(distances, "_SIDE", side)
    images, texts = features(123)
    calls = []
    found = distances.histogram(images, texts, F.linear, -1, 1, bins=64, watch=lambda: calls.append(1))
    assert len(calls) == distances.blocks(123) == math.ceil(123 / side)
    same = torch.eye(123, dtype=torch.bool)
    scores = {"negative": images @ texts.T, "image_image": images @ images.T, "text_text": texts @ texts.T}
    for kind, score in scores.items():
        assert found.counts[kind].sum() == 123 * 122
        expected = counted(score, ~same, 64, -1, 1)
        assert np.abs(found.counts[kind] - expected).sum() <= 4, kind  # on an edge, by rounding
        assert found.mean[kind] == pytest.approx(float(score[~same].double().mean()), abs=1e-7)
    assert found.counts["positive"].sum() == 123
    assert np.abs(found.counts["positive"] - counted(scores["negative"], same, 64, -1, 1)).sum() <= 2
    median = scores["negative"].diagonal().median()
    assert found.overlap == pytest.approx(float((scores["negative"][~same] >= median).double().mean()), abs=0.02)


def test_histogram_of_geodesic_distances():
    m = 4
    images, texts = (product_normalize(each, m) for each in features(60))
    low = -math.sqrt(m) * math.pi
    found = distances.histogram(images, texts, lambda a, b: -product_geodesic(a, b, m), low, 0.0)
    assert {kind: int(count.sum()) for kind, count in found.counts.items()} == {
        "positive": 60, "negative": 3540, "image_image": 3540, "text_text": 3540}  # fmt: skip
    assert found.mean["positive"] == pytest.approx(
        -float(product_geodesic(images, texts, m).diagonal().mean()), rel=1e-4
    )


# -- landscape and probe, on OpenCLIP's models ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("open_clip")
    import open_clip
    import test_product_sphere

    model = test_product_sphere.converted(True)
    torch.manual_seed(1)
    images, texts = torch.randn(10, 3, 16, 16), open_clip.tokenize([f"number {i}" for i in range(10)], 12)

    def encode(rows):
        return model.encode_image(images[rows]), model.encode_text(texts[rows])

    return model, encode


def test_the_middle_of_the_landscape_is_the_model(tiny):
    model, encode = tiny
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    seen = landscape.landscape(
        model, encode, 10, [1.0, 100.0], F.linear, grid=3, gradient_grid=3, part=4, watch=lambda: calls.append(1)
    )
    assert len(calls) == 3 * 3 + 3 * 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        images, texts = (each.double() for each in encode(slice(None)))
    own = torch.arange(10)
    for number, scale in enumerate((1.0, 100.0)):
        logits = scale * images @ texts.T
        loss = float((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
        assert seen.losses[number, 1, 1] == pytest.approx(loss, abs=1e-6)
        assert seen.centre[number] == pytest.approx(loss, abs=1e-6)
        assert np.abs(seen.losses[number] - loss).max() > 1e-4, "nothing moved"
        model.zero_grad()
        landscape.contrastive(*encode(slice(None)), scale, F.linear).backward()
        norm = math.sqrt(sum(float(w.grad.square().sum()) for w in model.parameters() if w.grad is not None))
        assert seen.gradients[number, 1] == pytest.approx(norm, rel=1e-4)
        model.zero_grad(set_to_none=True)


def test_directions_have_the_norms_of_the_weights(tiny):
    model, _ = tiny
    found = landscape.direction(model, torch.Generator().manual_seed(0))
    weights = dict(model.named_parameters())
    for name in ("visual.conv1.weight", "token_embedding.weight", "visual.positional_embedding"):
        lengths = (each[name].detach().flatten(1).norm(dim=1) for each in (found, weights))
        torch.testing.assert_close(*lengths)
    for name in ("visual.proj", "text_projection"):
        torch.testing.assert_close(found[name].norm(dim=0), weights[name].detach().norm(dim=0))
    for name, many in (("visual.class_embedding", 1), ("visual.extra_class_embedding", 7), ("cls_emb", 8)):
        lengths = (each[name].detach().view(many, -1).norm(dim=1) for each in (found, weights))
        torch.testing.assert_close(*lengths)
    for name in ("logit_scale", "ln_final.weight", "transformer.resblocks.0.attn.in_proj_bias"):
        assert not found[name].any(), name


@pytest.mark.parametrize("solver", [probe.LBFGS, probe.SGD])
def test_a_probe_tells_apart_what_can_be_told_apart(solver):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    centres = torch.randn(3, 20, generator=draw)
    x = centres[labels] + 0.5 * torch.randn(600, 20, generator=draw)
    rounds = []
    found = probe.probe((x[:400], labels[:400]), (x[400:], labels[400:]), 3, solver, epochs=30, batch_size=100,
                        watch=lambda: rounds.append(1))  # fmt: skip
    assert found.test > 0.95
    assert found.train >= found.test - 0.05
    assert len(rounds) == (30 if solver == probe.SGD else 3)
    wrong = probe.probe((x[:400], labels[:400]), (x[400:], (labels[400:] + 1) % 3), 3, solver, epochs=30)
    assert wrong.test < 0.1


def test_lbfgs_finds_what_scikit_learn_finds():
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(300, 8, generator=draw), torch.randint(0, 3, (300,), generator=draw)
    scaled = ((x - x.mean(0)) / x.std(0)).double().numpy()
    theirs = linear_model.LogisticRegression(C=1 / (300 * 1e-2), max_iter=1000, tol=1e-8).fit(scaled, labels.numpy())
    found = probe.probe((x.double(), labels), (x.double(), labels), 3, decay=1e-2, epochs=300)
    assert found.test == pytest.approx(theirs.score(scaled, labels.numpy()), abs=0.01)
    log_loss = -theirs.predict_log_proba(scaled)[np.arange(300), labels.numpy()].mean()
    assert found.loss == pytest.approx(log_loss, abs=2e-3)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A checkpoint with class tokens, and data with classes."""
    pytest.importorskip("open_clip_train")
    import test_product_sphere as sphere
    from conftest import write_model
    from open_clip_train.main import main as train

    folder = tmp_path_factory.mktemp("analyzed")
    model = write_model(folder / "model", **sphere.CONFIG)
    train(sphere.flags(model, data, folder, *sphere.MULTI, epochs=1))
    rows = [line.split("\t") for line in data.csv.read_text().splitlines()[1:]]
    lines = [f"{path}\t{title}\t{title.split()[-1]}" for path, title in rows]
    (folder / "set.tsv").write_text("\n".join(["filepath\ttitle\tlabel", *lines]) + "\n")
    return folder


def analysis(*words: object) -> dict:
    words = tuple(map(str, words))
    assert main(["analyze", *words]) == 0
    folder = Path(words[words.index("-o") + 1])
    name = words[0]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert (folder / f"{name}.png").stat().st_size > 10_000
    found = json.loads((folder / "analysis.json").read_text())
    assert found["analysis"] == name
    return found


def test_every_analysis_of_a_checkpoint(run, tmp_path):
    import mmts_plugins

    checkpoint = run / "run" / "checkpoints" / "epoch_1.pt"
    given = (run / "set.tsv", "--checkpoint", checkpoint)
    found = analysis("equilibrium", *given, "-o", tmp_path / "e", "--batches-of", 8, 48, "--points", 9)
    assert len(found["curves"]) == 6
    assert found["geometry"] == "Multi(8, 8)"
    assert "42 of 48 captions repeat another" in (tmp_path / "e" / "report.html").read_text()
    assert found["factor"] == 8
    model = mmts_plugins.load_model(checkpoint)[0]
    assert found["logit_scale"] == pytest.approx(float(model.logit_scale.exp()))
    assert "(t = " in (tmp_path / "e" / "report.html").read_text()
    found = analysis("distances", *given, "-o", tmp_path / "d")
    assert sum(found["counts"]["positive"]) == 48
    assert sum(found["counts"]["negative"]) == 48 * 47
    found = analysis("landscape", *given, "-o", tmp_path / "l", "--grid", 3, "--gradient-grid", 3, "--pairs", 16)
    assert np.shape(found["losses"]) == (3, 3, 3)
    assert np.array(found["losses"])[:, 1, 1] == pytest.approx(np.array(found["centre"]), abs=1e-6)
    probed = ("--test", run / "set.tsv", "--label-column", "label")
    found = analysis("probe", *given, *probed, "-o", tmp_path / "p")
    assert found["features"] == 8 * 32, "all class tokens, before the projection"
    assert found["train"] == found["test"]
    assert found["classes"] == 6
    assert model.visual.proj is not None


def test_saved_features_and_what_is_refused(tmp_path, capsys):
    images, texts = features(100)
    np.save(tmp_path / "i.npy", images.numpy())
    np.save(tmp_path / "t.npy", texts.numpy())
    saved = ("--image-features", tmp_path / "i.npy", "--text-features", tmp_path / "t.npy")
    found = analysis("equilibrium", *saved, "-o", tmp_path / "e", "--batches-of", 100, "--shuffled", 0)
    expected = [float(ratios(images, texts, scale).log().mean().exp()) for scale in found["scales"]]
    assert found["curves"][0]["geometric"] == pytest.approx(expected, rel=1e-4)
    assert analysis("distances", *saved, "-o", tmp_path / "d", "--sample", 40)["pairs"] == 40
    for words, message in (
        (["equilibrium", *saved, "-o", tmp_path / "e"], "holds a report already; pass --force"),
        (["equilibrium", *saved, "-o", tmp_path / "n", "--batches-of", 101], "a batch size of 101"),
        (["equilibrium", *saved, "-o", tmp_path / "n", "--from", 9, "--to", 3], "--from 9 is not below --to 3"),
        (["equilibrium", "-o", tmp_path / "n"], "no data given"),
        (["distances", *saved[:2], "-o", tmp_path / "n"], "--image-features needs --text-features too"),
        (["distances", "x.tsv", *saved, "-o", tmp_path / "n"], "leave them out"),
        (["landscape", "x.tsv", "--grid", 4, "-o", tmp_path / "n"], "is not an odd number"),
        (["landscape", "x.tsv", "-o", tmp_path / "n"], "this analysis needs a model"),
    ):
        assert main(["analyze", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "n").exists()


MEASURED = """
import resource, sys
from mmts_plugins.cli import main
assert main(["analyze", *sys.argv[1:]]) == 0
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="needs getrusage")
def test_memory_does_not_grow_with_the_square(tmp_path):
    """12,000 pairs: N x N in float32 alone would be 576 MB."""
    peaks = []
    for count in (2_000, 12_000):
        images, texts = features(count, 32)
        np.save(tmp_path / "i.npy", images.numpy())
        np.save(tmp_path / "t.npy", texts.numpy())
        words = ["distances", "--image-features", tmp_path / "i.npy", "--text-features", tmp_path / "t.npy"]
        command = [sys.executable, "-c", MEASURED, *words, "-o", tmp_path / str(count)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.split("PEAK ")[1]))
    assert peaks[1] - peaks[0] < 250
