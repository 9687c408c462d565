"""The controls: shuffled shifts, all samples at the table's mean, another start of the cosine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import resolving
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scale import parts, tokenizer  # noqa: F401  # parts: a fixture

from mmts_plugins.cli import main
from mmts_plugins.config import Config
from mmts_plugins.errors import ConfigError, TableError
from mmts_plugins.options import split_flags
from mmts_plugins.preview import Preview, adapter_of, named_table
from mmts_plugins.schedule import CosineSchedule
from mmts_plugins.tables import ClusterTable, index, streamed
from mmts_plugins.temperature import Temperatures

CPU = torch.device("cpu")


def made(counts: list[int], seed: int = 0, kind: str = "caption") -> ClusterTable:
    frequency = np.random.default_rng(seed).integers(1, 9, len(counts)).astype(float)
    return ClusterTable.build(
        [f"caption {i}" for i in range(len(counts))], frequency.astype(int), frequency, counts, kind
    )


@given(
    counts=st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=8, max_size=60).map(lambda some: [1] * 10 + some),
    seed=st.integers(0, 2**32 - 1),
)
def test_shuffled_shifts_have_exactly_the_tables_distribution(counts, seed):
    table = made(counts)
    shuffled = table.shuffled(seed)
    assert shuffled.keys.equals(table.keys)
    for count in set(counts):
        rows = table.count == count
        np.testing.assert_array_equal(np.sort(shuffled.frequency[rows]), np.sort(table.frequency[rows]))
    assert shuffled.summary == pytest.approx(table.summary)
    assert shuffled.content_hash == table.content_hash
    np.testing.assert_array_equal(table.shuffled(seed).frequency, shuffled.frequency)


def test_another_seed_is_another_assignment_and_none_is_the_tables_own():
    table = made([1] * 400)
    drawn = [table.shuffled(seed).frequency for seed in range(4)]
    same = [np.mean(one == other) for i, one in enumerate([table.frequency, *drawn]) for other in drawn[i:]]
    assert len(same) == 10
    assert max(same) < 0.3  # of eight values: one in eight stays by chance


def test_classes_swap_with_any_other():
    table = made(list(range(1, 200)), kind="class")
    shuffled = table.shuffled(0).frequency
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(table.frequency))
    assert np.mean(shuffled == table.frequency) < 0.4


def test_where_hardly_anything_could_swap_there_is_no_control(tmp_path):
    lonely = made([1, 1, 1, 7, 8, 9])
    lonely.save(tmp_path / "t.parquet")
    flags, _ = split_flags(
        ["--loss", "mmts", "--mmts-clusters", str(tmp_path / "t.parquet"), "--mmts-shuffle-shifts", "1"]
    )
    with pytest.raises(TableError, match=r"only 11% of the samples have such a caption; there is no such control"):
        adapter_of("openclip").resolve(flags)


def tied(often: float) -> ClusterTable:
    """Captions that occur twice are more often in the cluster of ``often`` samples than those that occur once."""
    count = np.repeat([1, 2], 500)
    frequency = np.where(np.arange(1000) % 500 < np.where(count == 1, 20, 200), often, 100.0)
    keys = [f"caption {i}" for i in range(1000)]
    return ClusterTable.build(keys, (frequency == often).astype(int), frequency, count)


def correlation(one: np.ndarray, other: np.ndarray, count: np.ndarray) -> float:
    covariance = np.cov(one, other, fweights=count)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


@pytest.mark.filterwarnings("error")
def test_a_shuffle_says_how_much_it_leaves_as_it_was(caplog):
    table = tied(300)
    after = [correlation(table.frequency, table.shuffled(seed).frequency, table.count) for seed in range(100)]
    assert len(caplog.messages) == 100
    assert f"much alike: the shifts before and after correlate by {np.mean(after):.2f}," in caplog.text
    caplog.clear()
    made([1] * 400).shuffled(0)
    made([1] * 400, kind="class").shuffled(0)
    # One frequency, at which rounding alone tells counts apart: another warning's.
    ClusterTable.build(list("abcd"), [0] * 4, [0.1] * 4, [1, 1, 2, 2]).shuffled(0)
    assert caplog.messages == []


def test_a_large_table_says_it_with_its_index(tmp_path, monkeypatch, caplog):
    tied(300).save(tmp_path / "t.parquet")
    monkeypatch.setattr(streamed, "LARGE_FROM", 100)
    large = streamed.open_table(tmp_path / "t.parquet")
    assert isinstance(large, streamed.LargeTable)
    index.TokenLookup(large.shuffled(1), tokenizer, 0, CPU)
    tied(300).shuffled(1)
    by_large, by_loaded = (line.partition("--mmts-shuffle-shifts")[2] for line in caplog.messages if "alike" in line)
    assert by_large == by_loaded


def test_a_large_table_is_shuffled_with_its_index(parts: Path) -> None:  # noqa: F811
    seen, whole = streamed.open_table(parts), ClusterTable.load(parts)
    assert isinstance(seen, streamed.LargeTable)
    batch = tokenizer(whole.keys.to_pylist()[:3000])
    plain, *shuffled = (index.TokenLookup(table, tokenizer, 0, CPU) for table in (seen, *map(seen.shuffled, (1, 2, 1))))
    own, one, other, again = (find.frequencies[find(batch).numpy()] for find in (plain, *shuffled))
    for count in np.unique(whole.count[:3000]):
        rows = whole.count[:3000] == count  # the copies in capitals stand for some; the others swap among themselves
        assert abs(np.sort(one[rows]).sum() - np.sort(own[rows]).sum()) <= 0.2 * own[rows].sum()
    _, codes, drawn = (np.sort(find._codes.numpy()) for find in (plain, plain, shuffled[0]))
    np.testing.assert_array_equal(codes, drawn)
    np.testing.assert_array_equal(one, again)
    assert np.mean(one != own) > 0.3
    assert np.mean(one != other) > 0.3


def resolve(*argv: str) -> Config:
    return resolving.resolve(split_flags(["--loss", "mmts", *argv])[0])


def temperatures(config: Config, table: ClusterTable) -> Temperatures:
    return Temperatures(config, table, np.unique(table.frequency), 40, CPU)


def test_all_samples_get_the_mean_that_the_table_would_give():
    table = made([1, 5, 2, 9, 4, 4])
    shifted = temperatures(resolve("--mmts-clusters", "t"), table)
    matched = resolve("--mmts-clusters", "t", "--mmts-no-shifts", "--mmts-mean-matched")
    constant = temperatures(matched, table)
    of_samples = np.repeat(table.shifts(0.05, 0.10), table.count)
    assert constant.mean_shift == pytest.approx(of_samples.mean(), abs=1e-12)
    assert constant.mean_shift == shifted.mean_shift
    assert constant.shift(torch.tensor([0, 3])).tolist() == [constant.mean_shift] * 2
    assert Preview(matched.values, 40, table).shifts == {"all": constant.mean_shift}
    with pytest.raises(ConfigError, match="not known without the table"):
        _ = Preview(matched.values, 40).shifts


def test_another_start_of_the_cosine():
    for start in (0.0, 0.25, 0.5, 1.0):
        schedule = CosineSchedule(0.04, 100, start)
        assert schedule.offset(7) == pytest.approx(0.02 * np.cos(2 * np.pi * (0.07 + start)))
        assert schedule.phase(7) == pytest.approx((0.07 + start) % 1)
    assert CosineSchedule(0.04, 97).offset(13) == CosineSchedule(0.04, 97, 0.0).offset(13)
    with pytest.raises(ConfigError, match=r"the start is 1.5 periods.*--mmts-start-phase"):
        CosineSchedule(0.04, 100, 1.5)
    flags = ("--mmts-no-shifts", "--mmts-num-oscillations", "0.5", "--mmts-start-phase", "0.5")
    preview = Preview(resolve(*flags).values, 101)
    steps = np.arange(101)
    assert preview.base(steps) == pytest.approx([preview.schedule.offset(step) for step in steps])
    assert preview.base(steps)[[0, 100]] == pytest.approx([-0.02, 0.02], abs=1e-5)  # it ends high


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mmts-clusters", "t", "--mmts-mean-matched"), "it goes with --mmts-no-shifts"),
        (("--mmts-no-shifts", "--mmts-shuffle-shifts", "1"), "leaves no shifts to shuffle"),
        (("--mmts-clusters", "t", "--mmts-shuffle-shifts", "-1"), "--mmts-shuffle-shifts is -1"),
        (("--mmts-no-shifts", "--mmts-start-phase", "2"), "--mmts-start-phase is 2"),
    ],
)
def test_controls_that_make_no_sense(flags, message):
    with pytest.raises(ConfigError, match=message):
        resolve(*flags)


def test_the_mean_needs_a_table():
    flags, _ = split_flags(["--loss", "mmts", "--mmts-no-shifts", "--mmts-mean-matched"])
    with pytest.raises(ConfigError, match="needs the cluster table"):
        adapter_of("openclip").resolve(flags)


def test_a_report_shows_the_shuffled_shifts_of_the_run(tmp_path, capsys):
    table = made(list(range(1, 60)), kind="class")  # of classes the thirds' means move with the draw
    table.save(tmp_path / "t.parquet")
    record = {"clusters": "t.parquet", "table_hash": table.content_hash, "shuffle_shifts": 3}
    found, why = named_table(record, tmp_path / "mmts.yaml")
    assert why == ""
    np.testing.assert_array_equal(found.frequency, table.shuffled(3).frequency)
    flags = ["--mmts-clusters", str(tmp_path / "t.parquet"), "--mmts-shuffle-shifts", "3"]
    assert main(["schedule", "--host", "avion", "--total-steps", "100", *flags]) == 0
    shown = capsys.readouterr().out
    assert "shuffle_shifts 3" in " ".join(shown.split())
    head = 0.17 + (0.30 - 0.17) * (table.shuffled(3).summary.head - table.summary.low) / np.ptp(table.frequency)
    assert f"{head + 0.1:.4f}" in shown
