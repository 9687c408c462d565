"""How common a caption is: K-Means, densities, their stability, the embedding cache, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_clustering import CAPTIONS, cluster, refused, write

from mmts_plugins.cli import main
from mmts_plugins.clustering import cache, density, encoders, kmeans, stability
from mmts_plugins.clustering.estimate import Recipe, estimate, resolve
from mmts_plugins.clustering.rows import Rows, caption_hashes, priorities, sample
from mmts_plugins.clusters import ClusterTable
from mmts_plugins.errors import MMTSError

sklearn_cluster = pytest.importorskip("sklearn.cluster")


def blobs(rows: int, centres: int, width: int = 16, seed: int = 0) -> np.ndarray:
    """Unit vectors around centres of uneven sizes."""
    draw = np.random.default_rng(seed)
    share = 1 / np.arange(1, centres + 1)
    x = draw.normal(size=(centres, width))[draw.choice(centres, rows, p=share / share.sum())]
    x = x + 0.4 * draw.normal(size=x.shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# --- rows and samples


def test_parts_read_like_one_array(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).normal(size=(1000, 5)).astype(np.float16)
    parts = []
    for number, piece in enumerate(np.split(whole, [300, 301, 950])):
        np.save(tmp_path / f"{number}.npy", piece)
        parts.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    rows = Rows(parts)
    assert np.array_equal(np.concatenate([block for _, block in rows.blocks(64)]), whole.astype(np.float32))
    index = np.random.default_rng(1).permutation(1000)[:400]
    assert np.array_equal(rows.take(index), whole[index].astype(np.float32))


def test_a_sample_does_not_depend_on_order_and_is_unbiased() -> None:
    captions = [f"caption {number}" for number in range(2000)]
    weight = np.random.default_rng(0).zipf(1.5, 2000).clip(1, 500).astype(float)
    hashes = caption_hashes(captions)
    order = np.random.default_rng(1).permutation(2000)
    sums = []
    for seed in range(200):
        chosen, mass = sample(priorities(hashes, weight, seed), weight, 200)
        again, mass_again = sample(priorities(hashes[order], weight[order], seed), weight[order], 200)
        assert np.array_equal(order[again], chosen)
        assert np.array_equal(mass_again, mass)
        sums.append(mass[chosen < 1000].sum())
    # The mean of 200 unbiased estimates, within four of its standard errors.
    assert abs(np.mean(sums) - weight[:1000].sum()) < 4 * np.std(sums) / np.sqrt(200)
    assert np.array_equal(sample(priorities(hashes, weight, 0), weight, 2000)[1].sum(), weight.sum())


# --- K-Means


@pytest.mark.parametrize("fit_rows", [32, 256])
def test_inertia_is_close_to_scikit_learns(fit_rows: int) -> None:
    points = blobs(4000, 60)
    weight = np.random.default_rng(0).integers(1, 9, 4000).astype(float)
    ours = kmeans.cluster(Rows(points), weight, 30, runs=3, fit_rows=fit_rows).inertia
    theirs = [
        sklearn_cluster.KMeans(30, n_init=1, random_state=seed).fit(points, sample_weight=weight).inertia_
        for seed in range(3)
    ]
    assert np.mean(ours) < (1.015 if fit_rows == 256 else 1.06) * np.mean(theirs)


@pytest.mark.parametrize("algorithm", kmeans.ALGORITHMS)
def test_every_algorithm_weighs_and_counts_in_samples(algorithm: str) -> None:
    if algorithm == "faiss":
        pytest.importorskip("faiss")
    points = np.repeat(np.eye(3, dtype=np.float32) * 9, 4, axis=0)
    points += np.random.default_rng(0).normal(size=points.shape).astype(np.float32) * 0.1
    done = kmeans.cluster(Rows(points), np.repeat([1.0, 2.0, 40.0], 4), 3, algorithm=algorithm)
    assert sorted(done.sizes[0]) == [4, 8, 160]


def test_the_same_seed_gives_the_same_labels() -> None:
    points, weight = Rows(blobs(3000, 50)), np.ones(3000)
    first, again, other = (kmeans.cluster(points, weight, 20, seed=seed, threads=1).cluster for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_cluster_is_left_empty_where_rows_repeat() -> None:
    points = np.repeat(np.random.default_rng(0).normal(size=(12, 4)), 50, axis=0)
    done = kmeans.cluster(Rows(points), np.ones(600), 12, runs=3)
    assert done.sizes.min() == 50
    with pytest.raises(MMTSError, match=r"only 12 of 13 clusters .*-k/--clusters"):
        kmeans.cluster(Rows(points), np.ones(600), 13)


# --- densities


def test_densities_equal_the_plain_formulas() -> None:
    points = blobs(300, 10).astype(np.float64)
    weight = np.random.default_rng(0).integers(1, 5, 300).astype(float)
    samples = np.repeat(np.arange(300), weight.astype(int))
    similarity = points[samples] @ points[samples].T
    first = np.searchsorted(samples, np.arange(300))
    rows, hashes = Rows(points), np.arange(300, dtype=np.uint64)
    counts = density.radius_counts(rows, weight, hashes, 0.7)
    assert np.array_equal(counts, (similarity[first] >= 0.7).sum(1))
    np.fill_diagonal(similarity, -9)
    nearest = np.sort(similarity[first], axis=1)[:, ::-1][:, :20]
    assert np.allclose(density.nearness(rows, weight, hashes, 20), ((1 + nearest) / 2).mean(1), atol=1e-5)


def test_a_density_from_few_references_estimates_that_from_all() -> None:
    rows, weight, hashes = Rows(blobs(3000, 30)), np.ones(3000), np.arange(3000, dtype=np.uint64)
    exact = density.radius_counts(rows, weight, hashes, 0.7)
    few = np.mean([density.radius_counts(rows, weight, hashes, 0.7, 400, seed) for seed in range(8)], axis=0)
    assert stability.spearman(exact, few, weight) > 0.95
    assert abs(few.mean() / exact.mean() - 1) < 0.05


def test_the_automatic_radius_gives_as_many_neighbours_as_a_cluster() -> None:
    rows = Rows(blobs(2000, 30))
    counts = density.radius_counts(rows, np.ones(2000), np.arange(2000, dtype=np.uint64), density.auto_radius(rows, 50))
    assert counts.mean() == pytest.approx(2000 / 50, rel=0.05)


# --- stability


def test_measures_equal_those_of_scipy_and_scikit_learn() -> None:
    stats = pytest.importorskip("scipy.stats")
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 9, 200), draw.integers(0, 7, 200)
    count = draw.integers(1, 6, 200)
    long_a, long_b = np.repeat(a, count), np.repeat(b, count)
    assert stability.spearman(a + 0.5, b * 2.0, count) == pytest.approx(stats.spearmanr(long_a, long_b)[0])
    assert stability.adjusted_rand_index(a, b, count) == pytest.approx(metrics.adjusted_rand_score(long_a, long_b))
    assert stability.adjusted_rand_index(a, a, count) == 1


def test_more_runs_are_steadier_and_the_forecast_holds() -> None:
    points, weight = Rows(blobs(1500, 150, seed=3)), np.ones(1500)
    hashes = np.arange(1500, dtype=np.uint64)
    one, ten = (
        stability.of_recipe(points, weight, Recipe(clusters=40, runs=runs, threads=1), hashes, (0.05, 0.1))
        for runs in (1, 10)
    )
    assert one["spearman_expected"] is None
    assert "not measured" in one["verdict"]
    assert one["spearman_disjoint_seeds"] < ten["spearman_disjoint_seeds"]
    assert ten["spearman_expected"] == pytest.approx(ten["spearman_disjoint_seeds"], abs=0.06)
    assert 0 < ten["moved_seeds"]["mean"] < ten["moved_seeds"]["high"] < ten["moved_seeds"]["span"] == 0.05


def test_how_far_a_temperature_moves() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 1.0]), np.array([1.0, 3.0, 2.0, 1.0])
    gap = stability.moved(a, b, np.array([1.0, 1.0, 1.0, 7.0]), 0.1, 0.3)
    assert (gap.mean, gap.high, gap.span) == pytest.approx((0.02, 0.1, 0.2))


def test_an_exact_density_is_measured_on_halves_of_the_data() -> None:
    points, weight, hashes = Rows(blobs(1500, 50)), np.ones(1500), np.arange(1500, dtype=np.uint64)
    recipe = resolve(points, Recipe(estimator="radius", clusters=40, runs=5))
    measured = stability.of_recipe(points, weight, recipe, hashes)
    assert (recipe.runs, measured["spearman_disjoint_seeds"]) == (1, 1)
    assert 0.8 < measured["spearman_data_halves"] < 1
    assert estimate(points, weight, recipe, hashes).frequency.min() >= 1


# --- the commands


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    texts = [f"{text} number {number % 9}" for number in range(40) for text in CAPTIONS]
    return write(tmp_path / "train.tsv", "title\n" + "".join(f"{text}\n" for text in texts))


@pytest.mark.parametrize("estimator", ["kmeans", "radius", "knn"])
def test_the_verdict_is_printed_and_stored(
    tsv: Path, tmp_path: Path, estimator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.parquet"
    flags = ["--encoder", "hashing", "-k", 5, "--estimator", estimator]
    assert cluster(tsv, *flags, "--runs", 4, "-o", out) == 0
    table = ClusterTable.load(out)
    stored = table.info["stability"]
    assert stored["estimator"] == table.info["estimator"] == estimator
    assert stored["verdict"] in capsys.readouterr().out
    assert (stored["spearman_between_halves"] is None) == (estimator != "kmeans")
    assert main(["stability", str(tsv), *map(str, flags), "--runs", "4", "-o", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["spearman_data_halves"] <= 1
    assert main(["stability", "--tables", str(out)]) == 0
    assert stored["verdict"] in capsys.readouterr().out


def test_tables_are_compared_by_caption(tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (str(tmp_path / f"{name}.parquet") for name in "abc")
    for seed, path in enumerate((a, b)):
        cluster(tsv, "--encoder", "hashing", "-k", 5, "--runs", 1, "--seed", seed, "-o", path)
    ClusterTable.build(["other"], [0], [1.0]).save(c)
    assert main(["stability", "--tables", a, b, "-o", str(tmp_path / "s.json")]) == 0
    (pair,) = json.loads((tmp_path / "s.json").read_text())["pairs"].values()
    assert -1 <= pair["spearman"] <= 1
    capsys.readouterr()
    assert main(["stability", "--tables", a, c]) == 2
    assert "not of the same captions" in capsys.readouterr().err
    assert main(["stability", "--tables", c]) == 2
    assert "was not measured" in capsys.readouterr().err
    assert main(["stability", "--tables", a, "--runs", "3"]) == 2
    assert "--runs has no effect with --tables" in capsys.readouterr().err


# --- the cache


def test_nothing_is_embedded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PART", 10)
    captions = [f"caption {number}" for number in range(35)]
    asked: list[int] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.append(len(texts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return encoders.TextEncoder("hashing").encode(texts)

    with pytest.raises(KeyboardInterrupt):
        cache.embed(encode, "x", captions, "x")
    rows = cache.embed(encode, "x", captions, "x")
    assert asked == [10, 10, 10, 10, 5]  # killed in the third part, and on from there
    cache.embed(encode, "x", captions, "x")
    assert len(asked) == 5
    expected = encoders.TextEncoder("hashing").encode(captions)
    assert np.allclose(rows.take(np.arange(35)), expected, atol=1e-3)
    cache.embed(encode, "y", captions[:10], "x")
    assert len(asked) == 6  # another encoder


def test_a_damaged_cache_file_is_made_again(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    encode = encoders.TextEncoder("hashing").encode
    first = cache.embed(encode, "x", ["a dog", "a cat"], "x").take(np.arange(2))
    (file,) = (tmp_path / "cache").rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-30])
    assert np.array_equal(cache.embed(encode, "x", ["a dog", "a cat"], "x").take(np.arange(2)), first)
    assert "embedding its captions again" in caplog.text


def test_the_identity_of_a_local_model_is_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("1")
    one, other = (encoders.TextEncoder(str(tmp_path / name), device="cpu").identity() for name in "ab")
    assert one == other
    (tmp_path / "b" / "weights").write_text("2")
    assert encoders.TextEncoder(str(tmp_path / "b"), device="cpu").identity() != one


def test_an_openclip_text_tower(tsv: Path, tmp_path: Path, small_model: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch = pytest.importorskip("torch")
    config = json.loads((Path(small_model[len("local-dir:") :]) / "open_clip_config.json").read_text())
    folder = tmp_path / "tower"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.model.CLIP(**config["model_cfg"])
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    encoder = encoders.TextEncoder(f"openclip:local-dir:{folder}", device="cpu")
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a dog", "a cat"])
        expected = model.eval().encode_text(tokens, normalize=True)
    assert np.allclose(encoder.encode(["a dog", "a cat"]), expected.numpy(), atol=1e-6)
    assert encoders.public_name(encoder.name) == "openclip:local-dir:tower"


def test_images_and_frames_instead_of_captions(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "weights.pth")
    lines = ["filepath\ttitle"]
    for number in range(6):
        colour = (250, 0, 0) if number < 4 else (0, 0, 250)
        where = tmp_path / f"{number}.png" if number else tmp_path / "video" / "1.png"
        where.parent.mkdir(exist_ok=True)
        image.new("RGB", (20, 20), colour).save(where)
        lines.append(f"{'video' if not number else where.name}\tcaption {number % 5}")
    tsv = write(tmp_path / "t.tsv", "\n".join(lines) + "\n")
    out, encoder = tmp_path / "t.parquet", f"timm:test_vit/{tmp_path / 'weights.pth'}"
    flags = ["--images", "filepath", "--image-root", tmp_path, "--device", "cpu", "-k", 2, "--runs", 1, "-o", out]
    cluster(tsv, "--encoder", encoder, *flags)
    table = ClusterTable.load(out)
    assert table.keys.to_pylist() == [f"caption {number}" for number in range(5)]
    # Four red pictures and two blue ones; caption 0 has one of each.
    assert table.frequency.tolist() == [3, 4, 4, 4, 2]
    assert table.info["encoder"] == "images timm:test_vit/weights.pth"
    assert "does not read images" in refused(tsv, "--encoder", "hashing", *flags, "--force")
    (tmp_path / "3.png").write_bytes(b"no picture")
    assert "3.png: cannot be read as an image" in refused(tsv, "--encoder", encoder, *flags, "--force")
    (tmp_path / "3.png").unlink()
    assert "image 4: no file" in refused(tsv, "--encoder", encoder, *flags, "--force")


# --- what goes wrong


def test_one_clear_error_each_and_no_table(tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "t.parquet"
    parts = tmp_path / "parts"
    parts.mkdir()
    np.save(parts / "0.npy", np.zeros((140, 4), np.float32))
    np.save(parts / "1.npy", np.zeros((140, 5), np.float32))
    blank = write(tmp_path / "blank.txt", "one\n \ntwo\n")
    for args, expected in (
        ((tsv, "--embeddings", parts, "-k", 2), ["1.npy", "5 dimensions", "0.npy has 4"]),
        ((tsv, "--embeddings", tmp_path, "-k", 2), ["no .npy file"]),
        ((blank, "--encoder", "hashing", "-k", 2), ["1 samples", "sample 2", "--keep-blank"]),
        ((tsv, "--encoder", "hashing", "-k", 60), ["54 distinct captions", "60 clusters"]),
        ((tsv, "--estimator", "radius", "--neighbours", 3), ["--neighbours", "--estimator radius"]),
        ((tsv, "--estimator", "radius", "--radius", 7), ["--radius 7.0", "cosine"]),
        ((tsv, "--workers", 2), ["--workers", "--engine ray"]),
        ((tsv, "--encoder", "openclip:ViT-B-32", "-k", 2), ["no weights named"]),
    ):
        message = refused(*args, "-o", out)
        assert all(part in message for part in expected), message
    cut = parts / "1.npy"
    cut.write_bytes((parts / "0.npy").read_bytes()[:500])
    assert "1.npy: cannot be read" in refused(tsv, "--embeddings", parts, "-k", 2, "-o", out)

    nan = lambda self, texts, progress=False: np.full((len(texts), 3), np.nan, np.float32)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(encoders.TextEncoder, "encode", nan)
        assert "gives a NaN or an infinity for the caption 'a red dog" in refused(
            tsv, "--encoder", "hashing", "-k", 2, "-o", out
        )

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        message = refused(tsv, "--encoder", "hashing", "-k", 2, "-o", out)
        assert "No space left" in message
        assert "--no-cache" in message
    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.write_table", full)
        message = refused(tsv, "--encoder", "hashing", "-k", 2, "--no-cache", "-o", out)
        assert f"{out}: cannot write the cluster table" in message
    assert not [path for path in tmp_path.rglob("*") if "t.parquet" in path.name or path.name.endswith(".tmp")]
