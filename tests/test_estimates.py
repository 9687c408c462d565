"""How common a caption is: K-Means, densities, their stability, the embedding cache, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from test_clustering import CAPTIONS, cluster, refused, write

from mmts_plugins.cli import main
from mmts_plugins.clustering import density, kmeans, stability
from mmts_plugins.clustering.estimate import Estimate, Recipe, estimate, resolve
from mmts_plugins.clustering.sampling import priorities, sample
from mmts_plugins.clustering.stages import Job, Worker, plan_merge, read_part
from mmts_plugins.data import cache, encoders, images
from mmts_plugins.data.rows import Rows
from mmts_plugins.data.source import Source
from mmts_plugins.errors import MMTSError
from mmts_plugins.tables import ClusterTable
from mmts_plugins.tables.hashing import hash_strings

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
    hashes = hash_strings(captions)
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


@pytest.mark.parametrize("algorithm", kmeans.ALGORITHMS)
def test_weights_pull_in_the_fit_and_in_the_inertia(algorithm: str) -> None:
    if algorithm == "faiss":
        pytest.importorskip("faiss")
    line, weight = np.array([[0.0], [1.0], [2.0]], np.float32), np.array([1.0, 1.0, 40.0])
    rows = Rows(line)
    centre = kmeans.fit_runs(rows, weight, 1, 1, 0, 1, algorithm, None, 256, "cpu")
    assert centre == pytest.approx(np.array([[[81 / 42]]]), abs=1e-5)  # the plain mean is 1
    done = kmeans.cluster(rows, weight, 1, algorithm=algorithm, device="cpu")
    expected = sum(w * (x - 81 / 42) ** 2 for x, w in zip((0.0, 1.0, 2.0), weight))
    assert done.inertia == pytest.approx([expected], rel=1e-4)
    assert done.sizes.tolist() == [[42.0]]
    # Two clusters that touch: of the three ways to cut the line one is best, for the weights.
    line = np.array([[0.0], [1.0], [2.0], [3.2]], np.float32)
    weight = np.array([40.0, 40.0, 1.0, 1.0])
    best = min(
        (kmeans.cluster(Rows(line), weight, 2, seed=seed, algorithm=algorithm, device="cpu") for seed in range(5)),
        key=lambda one: one.inertia[0],
    )
    cost = {}
    for cut in (1, 2, 3):
        parts = [(line[:cut, 0], weight[:cut]), (line[cut:, 0], weight[cut:])]
        means = [np.average(x, weights=w) for x, w in parts]
        cost[cut] = sum(float((w * (x - mean) ** 2).sum()) for (x, w), mean in zip(parts, means))
    cut = min(cost, key=lambda each: cost[each])
    assert cut == 1  # with equal weights it would be 2
    assert np.count_nonzero(best.cluster == best.cluster[0]) == cut
    assert best.inertia[0] == pytest.approx(cost[cut], rel=1e-4)


def test_lloyd_over_all_rows_weighs_them_too() -> None:
    import torch

    step = kmeans._Sums(torch.tensor([[0.0], [10.0]]))
    step.add(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 1.0, 40.0]))
    assert step.mass.tolist() == [42, 0]
    assert step.means().flatten().tolist() == pytest.approx([81 / 42, 10])
    assert step.empty.tolist() == [1]
    step = kmeans._Sums(torch.tensor([[0.0], [10.0]]))
    step.add(torch.tensor([[0.0], [1.0], [8.0]]), None)
    assert step.means().flatten().tolist() == [0.5, 8]


def test_the_same_seed_gives_the_same_labels() -> None:
    points, weight = Rows(blobs(3000, 50)), np.ones(3000)
    first, again, other = (kmeans.cluster(points, weight, 20, seed=seed, threads=1).cluster for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_cluster_is_left_empty_where_rows_repeat() -> None:
    points = np.repeat(np.random.default_rng(0).normal(size=(12, 4)), 50, axis=0)
    done = kmeans.cluster(Rows(points), np.ones(600), 12, runs=3)
    assert done.sizes.min() == 50
    with pytest.raises(MMTSError, match=r"only 12 of 13 clusters .*lower -k "):
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


@pytest.mark.parametrize("estimator", ["radius", "knn"])
def test_every_run_of_a_density_has_a_seed_of_its_own(estimator: str) -> None:
    rows, weight = Rows(blobs(400, 10)), np.random.default_rng(0).integers(1, 5, 400).astype(float)
    hashes = np.arange(400, dtype=np.uint64)
    recipe = Recipe(estimator=estimator, clusters=5, runs=3, seed=7, radius=0.7, references=50, threads=1)
    done = estimate(rows, weight, recipe, hashes, with_cluster=False)
    for run in range(3):
        if estimator == "radius":
            alone = density.radius_counts(rows, weight, hashes, 0.7, 50, 7 + run)
        else:
            alone = density.nearness(rows, weight, hashes, 50, 50, 7 + run)
        assert np.array_equal(done.densities[run], alone)
        assert not np.array_equal(done.densities[run], done.densities[run - 1])
    assert np.allclose(done.frequency, np.mean(done.densities, axis=0))
    assert not done.exact


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
    far = np.array([0, 2**31 - 1, 5])[a % 3]  # no table of all numbers below
    assert stability.adjusted_rand_index(far, b, count) == pytest.approx(
        metrics.adjusted_rand_score(long_a % 3, long_b)
    )


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


@pytest.mark.parametrize(
    ("expected", "word"),
    [(0.89, "usable"), (0.9, "steady"), (0.8999, "usable"), (0.7, "usable"), (0.69, "noisy"), (0.6999, "noisy")],
)
def test_the_verdict_at_its_thresholds(expected: float, word: str) -> None:
    assert stability.verdict({"spearman_expected": expected, "runs": 4}).startswith(f"{word}: rank correlation ")


def of_densities(*runs: list[float], exact: bool = False) -> dict[str, Any]:
    done = Estimate(np.zeros(len(runs[0])), None, [np.array(run, float) for run in runs], exact)
    return stability.of_runs(done, np.ones(len(runs[0])), Recipe(estimator="radius", runs=len(runs)))


def test_what_more_runs_would_give_is_spearman_browns() -> None:
    # Ranks 1234 and 1243: rho = 1 - 6 * 2 / (4 * 15) = 0.8, and the whole has twice as many runs as a half of it.
    two = of_densities([1, 2, 3, 4], [1, 2, 4, 3])
    assert two["spearman_between_seeds"] == two["spearman_between_halves"] == 0.8
    assert two["spearman_expected"] == round(2 * 0.8 / 1.8, 4) == 0.8889
    assert two["verdict"].startswith("usable")
    # Three runs: halves of one run each, so that the whole has three times as many: means of equal runs.
    three = of_densities([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 4, 3])
    assert three["spearman_between_seeds"] == round((1 + 0.8 + 0.8) / 3, 4)
    between = three["spearman_between_halves"]
    assert 0.8 < between < 1
    assert three["spearman_expected"] == pytest.approx(3 * between / (1 + 2 * between), abs=1e-4)
    draw = np.random.default_rng(0)
    for runs, factor in ((4, 2), (5, 2.5), (9, 2.25)):
        many = of_densities(*(list(np.arange(9) + 2 * draw.normal(size=9)) for _ in range(runs)))
        between = many["spearman_between_halves"]
        assert 0.5 < between < 1
        assert many["spearman_expected"] == pytest.approx(factor * between / (1 + (factor - 1) * between), abs=1e-4)
    # Runs that contradict each other: no division by zero, and no forecast above what was seen.
    against = of_densities([1, 2, 3, 4], [4, 3, 2, 1])
    assert (against["spearman_between_halves"], against["spearman_expected"]) == (-1, -1)
    assert against["verdict"].startswith("noisy")


def test_the_runs_of_a_table_are_compared_in_pairs() -> None:
    labels = np.array([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2]])
    weight = np.array([1.0, 2, 3, 4, 5, 6])
    sizes = np.stack([np.bincount(row, weights=weight, minlength=3) for row in labels])
    done = kmeans.Clustering(labels, sizes, np.zeros(3))
    measured = stability.of_runs(Estimate(done.cluster, done), weight, Recipe(clusters=3, runs=3))
    samples = np.repeat(np.arange(6), weight.astype(int))
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    pairs = [(0, 1), (0, 2), (1, 2)]
    ari = np.mean([metrics.adjusted_rand_score(labels[i][samples], labels[j][samples]) for i, j in pairs])
    frequency = [sizes[run][labels[run]][samples] for run in range(3)]
    rank = np.mean([stats.spearmanr(frequency[i], frequency[j])[0] for i, j in pairs])
    assert (measured["ari"], measured["spearman_between_seeds"]) == (round(ari, 4), round(rank, 4))


def test_equal_frequencies_are_neither_steady_nor_noisy() -> None:
    equal = of_densities([0.1 + 0.2, 0.3 + 1e-17, 0.1 + 0.2], [5, 5, 5])
    assert "all frequencies are equal: nothing to be unstable" not in equal["verdict"]  # the first run tells two apart
    for measured in (of_densities([0.1] * 7, [0.7] * 7), of_densities([3.0]), of_densities([2, 2], exact=True)):
        assert measured["verdict"].startswith("all frequencies are equal: nothing to be unstable")
        json.dumps(measured, allow_nan=False)
    one = np.full(7, 0.1)
    weight = np.array([3.0, 1, 1, 1, 1, 1, 7])
    assert stability.spearman(one, one * 3, weight) == 1
    assert stability.spearman(one, np.arange(7.0), weight) == 0
    assert stability.spearman(np.array([1.0, 1, 2]), np.array([1.0, 2, 3]), np.array([1.0, 1, 0])) == 0
    assert stability.adjusted_rand_index(np.array([0]), np.array([0]), np.array([1.0])) == 1
    # One run of several clusters may be even by chance: that says nothing.
    even = kmeans.Clustering(np.array([[0, 1]]), np.array([[1.0, 1.0]]), np.zeros(1))
    assert stability.of_runs(Estimate(even.cluster, even), np.ones(2), Recipe())["verdict"].startswith("not measured")


@pytest.mark.parametrize("texts", [["a kite"], ["a kite on a string"] * 200])
@pytest.mark.parametrize("flags", [["-k", 1], ["-k", 1, "--runs", 1], ["--estimator", "radius", "-k", 1]])
def test_one_caption_makes_a_table_and_a_verdict(
    tmp_path: Path, texts: list[str], flags: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "equal.txt", "\n".join(texts) + "\n"), tmp_path / "t.parquet"
    assert cluster(source, "--encoder", "hashing", *flags, "-o", out) == 0
    table = ClusterTable.load(out)
    assert (table.keys.to_pylist(), table.frequency.tolist(), table.count.tolist()) == (
        [texts[0]],
        [len(texts)],
        [len(texts)],
    )
    assert table.info["stability"]["verdict"].startswith("all frequencies are equal")
    written = tmp_path / "s.json"
    assert main(["stability", str(source), "--encoder", "hashing", *map(str, flags), "-o", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "all frequencies are equal: nothing to be unstable" in shown
    assert "nan" not in shown
    measured = json.loads(written.read_text(), parse_constant=pytest.fail)
    assert measured["spearman_data_halves"] == (1 if len(texts) > 1 else None)
    assert ("halves of the data   not measured" in shown) == (len(texts) == 1)


def test_what_is_odd_is_said_before_the_work_by_both_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.tsv", 'title\n"a kite\na boat"\na dog\na cat\n')

    def stop(*_: object, **__: object) -> None:
        raise MMTSError("stopped before embedding")

    monkeypatch.setattr(encoders.TextEncoder, "encode", stop)
    for command in (["cluster", "-o", str(tmp_path / "t.parquet")], ["stability"]):
        assert main([command[0], str(source), "--encoder", "hashing", "-k", "1", *command[1:]]) == 2
        said = capsys.readouterr().err
        assert f"warning: {source}: 1 cells hold line breaks: a stray quote?" in said
        assert said.index("stray quote") < said.index("stopped before embedding")


def test_a_package_without_metadata_does_not_cost_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "packages", lambda encoder: ("no-such-package",))
    source = write(tmp_path / "a.txt", "a dog\na cat\n")
    assert cluster(source, "--encoder", "hashing", "-k", 2, "-o", tmp_path / "t.parquet") == 0
    assert ClusterTable.load(tmp_path / "t.parquet").info["versions"]["no-such-package"] is None


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
    assert main(["stability", "--table", str(out)]) == 0
    assert stored["verdict"] in capsys.readouterr().out


def test_tables_are_compared_by_caption(tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (str(tmp_path / f"{name}.parquet") for name in "abc")
    for seed, path in enumerate((a, b)):
        cluster(tsv, "--encoder", "hashing", "-k", 5, "--runs", 1, "--seed", seed, "-o", path)
    ClusterTable.build(["other"], [0], [1.0]).save(c)
    assert main(["stability", "--table", a, b, "-o", str(tmp_path / "s.json")]) == 0
    (pair,) = json.loads((tmp_path / "s.json").read_text())["pairs"].values()
    assert -1 <= pair["spearman"] <= 1
    capsys.readouterr()
    assert main(["stability", "--table", a, c]) == 2
    assert "not of the same captions" in capsys.readouterr().err
    ClusterTable.build(["other"], [0], [1.0], info={"stability": ["x"]}).save(tmp_path / "d.parquet")
    assert main(["stability", "--table", str(tmp_path / "d.parquet")]) == 2
    assert "'stability' is ['x']: it must be a mapping" in capsys.readouterr().err
    assert main(["stability", "--table", c]) == 2
    assert "was not measured" in capsys.readouterr().err
    assert main(["stability", "--table", a, "--runs", "3"]) == 2
    assert "--runs has no effect with --table" in capsys.readouterr().err


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


def test_an_openclip_identity_names_model_weights_and_precision(tmp_path: Path) -> None:
    weights = write(tmp_path / "epoch_1.pt", "1")

    def identity(name: str, device: str = "cpu") -> Optional[str]:
        return encoders.TextEncoder(f"openclip:{name}", device=device).identity()

    first = identity(f"ViT-B-32/{weights}")
    assert first is not None
    assert first == identity(f"ViT-B-32/{weights}")
    assert first != identity(f"ViT-B-16/{weights}")
    assert first != identity(f"ViT-B-32/{weights}", "cuda:0")  # bfloat16 there
    assert identity("ViT-B-32/openai") != identity("ViT-B-32/laion2b_s34b_b79k")
    assert identity("hf-hub:some/model") is None
    write(weights, "2")
    assert first != identity(f"ViT-B-32/{weights}")
    for name in ("one", "two"):
        write(tmp_path / name / "x.json", "1")
    local = identity(f"local-dir:{tmp_path / 'one'}")
    assert local == identity(f"local-dir:{tmp_path / 'two'}")  # by content, wherever it lies
    write(tmp_path / "two" / "x.json", "2")
    assert local != identity(f"local-dir:{tmp_path / 'two'}")


def test_a_digest_tells_names_from_contents(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x", "yz")
    write(tmp_path / "b" / "xy", "z")
    write(tmp_path / "c" / "x", "y")
    write(tmp_path / "c" / "z", "")
    assert len({encoders.digest(tmp_path / name) for name in "abc"}) == 3


def test_tfidf_is_drawn_with_its_seed() -> None:
    draw = np.random.default_rng(0)
    captions = [" ".join(f"word{number}" for number in draw.integers(0, 900, 9)) for _ in range(700)]
    first, again, other = (encoders.tfidf(captions, seed) for seed in (3, 3, 4))
    assert first.shape == (700, 256)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)


def test_any_hugging_face_encoder_is_pooled_by_the_mean_over_its_tokens(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "runs"]
    write(tmp_path / "vocab.txt", "\n".join(words))
    write(tmp_path / "tokenizer_config.json", '{"tokenizer_class": "BertTokenizer", "model_max_length": 32}')
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():  # each caption alone, so that nothing is padded
        ids = [[2, 5, 6, 7, 3], [2, 7, 3]]
        expected = [model(torch.tensor([one])).last_hidden_state[0].mean(0).numpy() for one in ids]
    given = encoders.TextEncoder(f"hf:{tmp_path}", device="cpu").encode(["a red dog", "dog"])
    assert np.allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda n: np.full((n, 3), np.nan, np.float32), "gives a NaN or an infinity for 'a dog'"),
        (lambda n: np.array([[1.0], [np.inf]]), "gives a NaN or an infinity for 'a cat'"),
        (lambda n: np.ones((n - 1, 3)), r"gives an array \[1, 3\] of float64 for 2 inputs"),
        (lambda n: np.ones(n), r"gives an array \[2\]"),
        (lambda n: np.ones((n, 0)), r"gives an array \[2, 0\]"),
        (lambda n: [["x"]] * n, r"gives an array \[2, 1\] of <U1"),
        (lambda n: 1 / 0, "--encoder x: cannot embed these captions .*division by zero"),
        (lambda n: [][n], "--encoder x: cannot embed these captions"),
    ],
)  # fmt: skip
def test_an_encoder_that_gives_nonsense_is_refused(gives: Callable[[int], Any], message: str) -> None:
    encoder = encoders.TextEncoder("x", device="cpu")
    encoder._model = lambda captions, progress: gives(len(captions))
    with pytest.raises(MMTSError, match=message):
        encoder.encode(["a dog", "a cat"])
    encoder._model = lambda captions, progress: np.arange(4.0).reshape(2, 2)
    assert encoder.encode(["a dog", "a cat"]).tolist() == [[0, 1], [2, 3]]


def test_an_encoder_that_changes_its_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PART", 2)
    widths = iter([3, 4])
    with pytest.raises(MMTSError, match="part 1 of the embeddings has 4 dimensions, part 0 has 3"):
        cache.embed(lambda texts: np.ones((len(texts), next(widths))), None, ["a", "b", "c"], "x")


def test_out_of_memory_names_the_batch_size() -> None:
    import torch

    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    encoder = encoders.TextEncoder("x", batch_size=77, device="cpu")
    encoder._model = full
    with pytest.raises(MMTSError, match="--encoder x: out of GPU memory at --batch-size 77; lower it"):
        encoder.encode(["a dog"])


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


class Pixels(images.ImageEncoder):
    """A model that gives an image's mean colour, and what it was asked for."""

    def __init__(self, frames: int, batch_size: int = 3) -> None:
        super().__init__("timm:x", frames, batch_size, "cpu")
        self.asked: list[int] = []

    def _load(self) -> tuple[Any, Any]:
        import torch

        def model(batch: Any) -> Any:
            self.asked.append(len(batch))
            return batch.float().mean((1, 2))

        return model, lambda image: torch.tensor(np.asarray(image))


def frames_of(folder: Path, colours: list[int]) -> str:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for number, colour in enumerate(colours):
        image.new("RGB", (4, 4), (colour, 0, 255 - colour)).save(folder / f"{number:02d}.png")
    write(folder / "notes.txt", "no frame")
    return str(folder)


def test_frames_are_evenly_spaced_and_their_mean_is_the_embedding(tmp_path: Path) -> None:
    many = frames_of(tmp_path / "many", [0, 10, 20, 30, 40, 50, 60])
    few = frames_of(tmp_path / "few", [100, 104])
    image = f"{few}/01.png"
    encoder = Pixels(frames=3, batch_size=4)
    stamps = images.stamped([many, few, image], None, "x")
    vectors = encoder.encode(stamps)
    # Of seven frames the first, the middle and the last; of two both; a file is itself.
    assert vectors.tolist() == [[30, 0, 225], [102, 0, 153], [104, 0, 151]]
    assert encoder.asked == [4, 2]  # in batches over the borders of folders
    assert Pixels(frames=1).encode(stamps)[:, 0].tolist() == [0, 100, 104]


def test_an_image_is_known_by_its_path_size_and_time(tmp_path: Path) -> None:
    folder = frames_of(tmp_path / "a", [1, 2])
    before = images.stamped([folder], None, "x")
    assert images.stamped(["a"], str(tmp_path), "x") == before
    (facts,) = before
    assert facts.startswith(f"{folder}|")
    frame = tmp_path / "a" / "01.png"
    os.utime(frame, ns=(1, 1))
    assert images.stamped([folder], None, "x") != before
    before = images.stamped([folder], None, "x")
    frame.write_bytes(frame.read_bytes() + b"x")
    os.utime(frame, ns=(1, 1))
    assert images.stamped([folder], None, "x") != before


def test_an_image_encoders_identity_is_its_checkpoint_and_its_frames(tmp_path: Path) -> None:
    weights = write(tmp_path / "w.pth", "1")

    def identity(name: str = "timm:vit", frames: int = 8) -> str:
        return images.ImageEncoder(f"{name}/{weights}", frames, device="cpu").identity()

    first = identity()
    assert first == identity()
    assert len({first, identity(frames=4), identity("timm:resnet"), identity("openclip:vit")}) == 4
    write(weights, "2")
    assert identity() != first
    local = [images.ImageEncoder(f"openclip:local-dir:{tmp_path}", device="cpu").identity() for _ in range(2)]
    write(weights, "3")
    assert local[0] == local[1] != images.ImageEncoder(f"openclip:local-dir:{tmp_path}", device="cpu").identity()


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a" + b"\xff" * 30])
def test_what_is_no_image_is_one_line(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("PIL.Image")
    path = tmp_path / "0.png"
    path.write_bytes(content)
    with pytest.raises(MMTSError, match=r"0\.png: cannot be read as an image: "):
        Pixels(1).encode(images.stamped([str(path)], None, "x"))


def test_a_bomb_and_odd_paths_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (60, 60)).save(tmp_path / "0.png")
    stamps = images.stamped(["0.png"], str(tmp_path), "x")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MMTSError, match=r"0\.png: cannot be read as an image: .*bomb"):
        Pixels(1).encode(stamps)
    for name in ("x" * 5000, "a\0b", "none.png"):
        with pytest.raises(MMTSError, match=r"train\.tsv: image 2: no file "):
            images.stamped(["0.png", name], str(tmp_path), "train.tsv")
    (tmp_path / "video").mkdir()
    with pytest.raises(MMTSError, match="video: the folder holds no image"):
        images.stamped(["video"], str(tmp_path), "x")


def test_an_image_model_that_gives_nonsense_is_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    stamps = images.stamped(["0.png"], str(tmp_path), "x")
    encoder = Pixels(1)
    model, transform = encoder._load()
    encoder._model = lambda batch: model(batch) * float("nan"), transform
    with pytest.raises(MMTSError, match=r"--encoder timm:x gives a NaN or an infinity for '.*0\.png'"):
        encoder.encode(stamps)
    encoder._model = lambda batch: model(batch)[:, 0], transform
    with pytest.raises(MMTSError, match=r"gives an array \[1\] of float32"):
        encoder.encode(stamps)


# --- stages over files


def a_job(folder: Path, work: str = "work") -> Job:
    source = Source(str(folder / "train.txt"))
    return Job(str(folder / work), source, "hashing", 256, "cpu", False, False, Recipe(clusters=2))


def test_an_unfinished_run_is_not_continued_with_another_input(tmp_path: Path) -> None:
    source = write(tmp_path / "train.txt", "one\ntwo\n")
    os.utime(source, ns=(5, 5))
    job, files = a_job(tmp_path), [str(source)]
    job.claim(files)
    job.claim(files)  # the same again goes on

    def differs(job: Job, files: list[str]) -> str:
        with pytest.raises(MMTSError) as caught:
            job.claim(files)
        return str(caught.value)

    os.utime(source, ns=(6, 6))
    assert "with another files;" in differs(job, files)
    write(source, "one\nSIX\n")  # as long as before
    os.utime(source, ns=(6, 6))
    assert "with another files;" in differs(job, files)
    write(source, "one\nthree\n")
    os.utime(source, ns=(5, 5))
    assert "with another files;" in differs(job, files)
    write(source, "one\ntwo\n")
    os.utime(source, ns=(5, 5))
    job.claim(files)
    assert "another files and units;" in differs(job, [*files, str(write(tmp_path / "more.txt", "x"))])
    for change, name in (
        ({"encoder": "x"}, "encoder"),
        ({"recipe": Recipe(clusters=3)}, "recipe"),
        ({"source": Source(str(source), column="x")}, "source"),
        ({"keep_blank": True}, "keep_blank"),
        ({"part_rows": 7}, "part_rows"),
    ):
        assert f"with another {name};" in differs(dataclasses.replace(job, **change), files)
    note = tmp_path / "work" / "job.json"
    for text in ("", "[1", "3", '{"a": "\\ud800', "[" * 100_000):
        note.write_text(text)
        assert "a damaged note of an unfinished run; delete its folder" in differs(job, files)


def test_the_parts_of_a_stage_that_are_damaged_are_named(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    worker = Worker(job)
    write(tmp_path / "train.txt", "one kite\ntwo boats\ntwo boats\n")
    worker.count(0, str(tmp_path / "train.txt"))
    assert plan_merge(job, 1) == [(0, 256)]
    worker.merge(0, (0, 256), 1)
    merged = read_part(job.path("merge", 0))
    assert sorted(zip(merged["key"].to_pylist(), merged["count"].to_pylist())) == [("one kite", 1), ("two boats", 2)]
    for path, again in (
        (job.path("count", 0, ".arrow"), lambda: plan_merge(job, 1)),
        (job.path("merge", 0), lambda: read_part(job.path("merge", 0))),
        (tmp_path / "work" / "centres.npy", lambda: worker.assign(0)),
    ):
        for content in (b"", b"x" * 3000, path.read_bytes()[:-7] if path.exists() else b"\x93NUMPY\x01\0"):
            kept = path.read_bytes() if path.exists() else None
            path.write_bytes(content)
            with pytest.raises(
                MMTSError, match=f"{path.name}: a damaged part; delete it and run the same command again"
            ):
                again()
            if kept is not None:
                path.write_bytes(kept)
    empty = a_job(tmp_path, "other")
    path = empty.path("count", 0, ".arrow")
    path.parent.mkdir(parents=True)
    schema = pa.schema([("key", pa.large_string()), ("count", pa.int64()), ("hash", pa.uint64())])
    with pa.ipc.new_file(str(path), schema) as writer:
        for _ in range(256):
            writer.write_batch(pa.RecordBatch.from_pylist([], schema=schema))
    with pytest.raises(MMTSError, match=r"train\.txt: holds no samples"):
        plan_merge(empty, 1)


# --- what goes wrong


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--seed", "-1"), ("--seed", "4294967296"), ("--seed", "9" * 5000), ("-k", "0"), ("--runs", "10001"),
     ("--threads", "x"), ("--threads", "1025"), ("-k", "1_0"), ("-k", "\u0663")],
)  # fmt: skip
def test_numbers_that_no_package_takes_are_refused_at_once(
    tsv: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cluster(tsv, "-o", "t.parquet", flag, value)
    assert f"argument {flag}" in capsys.readouterr().err


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
