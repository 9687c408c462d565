"""Schedule, shift, cluster table, configuration, and the lookup of tokenized captions."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from resolving import resolve

from mmts_plugins.config import Config
from mmts_plugins.errors import ConfigError, TableError
from mmts_plugins.options import split_flags
from mmts_plugins.presets import presets
from mmts_plugins.record import check_resume, record, write_record
from mmts_plugins.schedule import CosineSchedule
from mmts_plugins.tables import ClusterTable, cluster_shift
from mmts_plugins.tables.index import TokenLookup, hash_tokens
from mmts_plugins.temperature import Temperatures

# -- schedule and shift ------------------------------------------------------------------------------------------------


@given(alpha=st.floats(0, 10), period=st.floats(0.1, 1e6), step=st.integers(0, 10**6))
def test_schedule_is_eq_7_and_periodic(alpha, period, step):
    schedule = CosineSchedule(alpha, period)
    assert schedule.offset(step) == pytest.approx(
        alpha * math.cos(2 * math.pi * step / period) / 2, abs=1e-6 * max(alpha, 1)
    )
    assert -alpha / 2 <= schedule.offset(step) <= alpha / 2
    assert schedule.offset(0) == alpha / 2
    assert schedule.offset(period / 2) == pytest.approx(-alpha / 2)
    assert 0 <= schedule.phase(step) < 1


@pytest.mark.parametrize(("alpha", "period"), [(-0.1, 5), (math.nan, 5), (0.1, 0), (0.1, -3), (0.1, math.inf)])
def test_schedule_refuses(alpha, period):
    with pytest.raises(ConfigError, match="--mmts-"):
        CosineSchedule(alpha, period)


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=30),
    low=st.floats(0, 1),
    spread=st.floats(0, 1),
)
def test_shift_is_eq_6(sizes, low, spread):
    shifts = cluster_shift(sizes, low, low + spread)
    np.testing.assert_allclose(shifts, reference.temperature(sizes, sizes, 0, low, low + spread, 0, 1), atol=1e-12)
    assert torch.equal(cluster_shift(torch.tensor(sizes), low, low + spread), torch.from_numpy(shifts))
    if len(set(sizes)) > 1:
        assert shifts.min() == pytest.approx(low)
        assert shifts.max() == pytest.approx(low + spread)


def test_equal_sizes_get_the_midpoint():
    assert cluster_shift([7, 7, 7], 0.05, 0.15).tolist() == pytest.approx([0.1] * 3)
    assert cluster_shift(torch.tensor([3.0], dtype=torch.float32), 0, 1).dtype == torch.float32


def test_shift_refuses():
    for sizes, low, high in (([], 0, 1), ([1, math.nan], 0, 1), ([1, 2], 0.2, 0.1)):
        with pytest.raises(ConfigError):
            cluster_shift(sizes, low, high)


# -- cluster table -----------------------------------------------------------------------------------------------------


def table(**changes) -> ClusterTable:
    columns = {
        "keys": ["a", "b", "c"],
        "cluster": [0, 1, 1],
        "frequency": [5.0, 3.0, 3.0],
        "count": [5, 2, 1],
        **changes,
    }
    return ClusterTable.build(**columns)


def test_table_survives_the_file(tmp_path):
    path = tmp_path / "t.parquet"
    table(info={"k": 2, "encoder": "tfidf"}).save(path)
    loaded = ClusterTable.load(path)
    assert loaded.keys.to_pylist() == ["a", "b", "c"]
    assert loaded.cluster.dtype == np.int32
    assert loaded.frequency.dtype == np.float64
    assert loaded.sizes.tolist() == [5, 3]
    assert loaded.info["encoder"] == "tfidf"
    assert loaded.content_hash == table().content_hash
    assert table(frequency=[5.0, 3.0, 3.5]).content_hash != loaded.content_hash
    assert table(count=[5, 1, 2]).content_hash != loaded.content_hash
    assert table(kind="class").content_hash != loaded.content_hash
    assert table(keys=["a", "bc", ""]).content_hash != loaded.content_hash


def test_table_of_parts_by_another_engine(tmp_path):
    """Plain columns, other integer types, no metadata, row order kept over parts."""
    for number, keys in enumerate((["a", "b"], ["c"])):
        columns = {
            "key": keys,
            "cluster": pa.array([number] * len(keys), pa.int64()),
            "frequency": [2, 1][number : number + 1] * len(keys),
        }
        pq.write_table(pa.table(columns), tmp_path / f"part-{number}.parquet")
    loaded = ClusterTable.load(tmp_path)
    assert loaded.keys.to_pylist() == ["a", "b", "c"]
    assert loaded.sizes.tolist() == [2, 1]
    assert loaded.content_hash == ClusterTable.build(["a", "b", "c"], [0, 0, 1], [2, 2, 1]).content_hash


def test_hash_ignores_the_layout(tmp_path):
    whole = ClusterTable.build([str(i) for i in range(100)], range(100), range(1, 101))
    pieces = pa.concat_arrays([whole.keys.slice(0, 30), whole.keys.slice(30)])
    again = ClusterTable.build(
        pa.concat_arrays([pa.array(["x"], pa.large_string()), pieces]).slice(1), range(100), range(1, 101)
    )
    assert again.content_hash == whole.content_hash


def test_bad_tables(tmp_path):
    def write(**columns):
        path = tmp_path / "t.parquet"
        pq.write_table(pa.table(columns), path)
        return path

    good = {"key": ["a", "b"], "cluster": [0, 1], "frequency": [1.0, 2.0]}
    for changes, message in (
        ({"frequency": [1.0, 0.0]}, "'frequency' must hold finite numbers above zero"),
        ({"frequency": [1.0, None]}, "'frequency' holds 1 empty cells"),
        ({"cluster": [0, -1]}, "'cluster' holds a negative number"),
        ({"cluster": [0.5, 1.0]}, "wrong type"),
        ({"key": ["a", "a"]}, "1 keys occur more than once"),
        ({"count": [0, 1]}, "'count'"),
    ):
        with pytest.raises(TableError, match=message):
            ClusterTable.load(write(**{**good, **changes}))
    with pytest.raises(TableError, match="empty"):
        ClusterTable.build([], [], [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(TableError, match="holds no"):
        ClusterTable.load(tmp_path / "folder")
    changed = tmp_path / "changed.parquet"
    table().save(changed)
    stored = pq.read_table(changed)
    pq.write_table(stored.set_column(2, "frequency", pa.array([5.0, 3.0, 4.0])), changed)
    with pytest.raises(TableError, match="does not match its own hash"):
        ClusterTable.load(changed)


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    table().save(path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(TableError, match="No space left"):
        table(frequency=[1.0, 1.0, 1.0]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_thirds_are_thirds_of_the_samples():
    wide = ClusterTable.build(["a", "b", "c"], [0, 1, 2], [6.0, 4.0, 2.0], [6, 4, 2])
    head, middle, tail = wide.third_means(np.array([3.0, 2.0, 1.0]))
    assert (head, middle, tail) == pytest.approx((3.0, 2.5, 1.5))


# -- configuration -----------------------------------------------------------------------------------------------------


def resolved(*argv: str) -> Config:
    flags, rest = split_flags(["--loss", "mmts", *argv])
    assert rest == []
    return resolve(flags)


def test_presets_are_the_papers():
    for name, preset in presets().items():
        flags, _ = split_flags(["--loss", preset.loss, "--mmts-preset", name, "--mmts-clusters", "t"])
        config = resolve(flags)
        assert (config.alpha, config.shift_min, config.shift_max) == preset[1:]
        assert config.lowest > 0 or preset.loss == "mmts-max-margin"


def test_flag_beats_file_beats_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("loss: mmts-infonce\nclusters: table.parquet\nalpha: 0.07\nshift_min: 0.06\nperiod: 30\n")
    config = resolved("--mmts-config", str(file), "--mmts-shift-min", "0.08")
    assert (config.alpha, config.shift_min, config.shift_max) == (0.07, 0.08, 0.10)
    assert (config.period, config.num_oscillations) == (30, None)
    config = resolved("--mmts-config", str(file), "--mmts-num-oscillations", "3", "--mmts-preset", "vast-clip")
    assert (config.alpha, config.shift_max) == (0.07, 0.09)
    assert (config.period, config.num_oscillations) == (None, 3)


def test_a_record_is_a_config(tmp_path):
    config = resolved("--mmts-clusters", "t", "--mmts-num-oscillations", "4", "--mmts-missing", "mean")
    write_record(tmp_path / "mmts.yaml", record(config, 100, "abc", "host", "1"))
    assert resolved("--mmts-config", str(tmp_path / "mmts.yaml")) == config


def test_host_flags_pass_through_in_order():
    argv = ["--lr", "1", "--loss", "mmts", "--aug-cfg", "scale=(0.9, 1.0)", "x=1", "--mmts-alpha=0.02", "--wd", "-0.5"]
    flags, rest = split_flags(argv)
    assert flags == {"loss": "mmts", "mmts_alpha": 0.02}
    assert rest == ["--lr", "1", "--aug-cfg", "scale=(0.9, 1.0)", "x=1", "--wd", "-0.5"]


def test_guards():
    for argv, message in (
        (["--mmts-alpha", "0.1"], r"lowest temperature of the run is 0 .*--mmts-shift-min or lower --mmts-alpha"),
        (["--mmts-alpha", "nan"], "--mmts-alpha is nan"),
        (["--mmts-alpha", "-1"], "--mmts-alpha is -1.0: it must be 0 or above"),
        (["--mmts-period", "0"], "--mmts-period is 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolved("--mmts-clusters", "t", *argv)
    assert resolved("--mmts-clusters", "t", "--mmts-alpha", "0.1", "--mmts-no-schedule").lowest == 0.05
    assert resolved("--mmts-alpha", "0.1", "--mmts-no-shifts").lowest == pytest.approx(0.025)
    margin = {"loss": "mmts-max-margin", "mmts_alpha": 0.34, "mmts_clusters": "t"}
    assert resolve(margin).lowest == 0  # a margin of zero is allowed
    with pytest.raises(ConfigError, match="lowest margin"):
        resolve({**margin, "mmts_alpha": 0.36})


def test_extremes_warn(caplog):
    resolved("--mmts-clusters", "t", "--mmts-shift-min", "0.025")
    assert "a logit scale of 200" in caplog.text
    caplog.clear()
    resolved("--mmts-clusters", "t", "--mmts-preset", "avion-max-margin")
    assert "was chosen for mmts-max-margin" in caplog.text


def test_resume_names_the_field(tmp_path, caplog):
    path = tmp_path / "mmts.yaml"
    values = record(resolved("--mmts-clusters", "t"), 100, "abc", "host", "1")
    write_record(path, values)
    check_resume(path, {**values, "clusters": "elsewhere"}, allow_change=False)
    with pytest.raises(ConfigError, match="table_hash was 'abc' and is 'abd'"):
        check_resume(path, {**values, "table_hash": "abd"}, allow_change=False)
    check_resume(path, {**values, "table_hash": "abd"}, allow_change=True)
    assert "table_hash was 'abc' and is 'abd' (allowed by --mmts-allow-config-change)" in caplog.text
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist: the checkpoint was not trained with MM-TS"):
        check_resume(tmp_path / "none.yaml", values, allow_change=False)


def test_temperatures_are_eq_8():
    concepts = ClusterTable.build(["a", "b", "c"], [0, 1, 2], [10, 4, 1], [10, 4, 1])
    config = resolved("--mmts-clusters", "t", "--mmts-period", "8")
    tau = Temperatures(config, concepts, np.array([1.0, 4.0, 10.0]), 40, torch.device("cpu"))
    tau.step = 3
    of_samples = tau.shift(torch.tensor([2, 0, 1, 3])) + tau.base
    expected = reference.temperature([10, 1, 4, 1], [1, 4, 10], 0.04, 0.05, 0.10, 3, 8)
    np.testing.assert_allclose(of_samples.numpy(), expected, atol=1e-15)
    assert tau.mean_temperature == pytest.approx(np.average(expected[[0, 2, 1]], weights=[10, 4, 1]))


# -- lookup ------------------------------------------------------------------------------------------------------------


def word_tokenizer(captions: list[str], length: int = 8) -> torch.Tensor:
    rows = torch.zeros(len(captions), length, dtype=torch.long)
    for row, caption in zip(rows, captions):
        ids = [1 + sum(ord(c) * 31**i for i, c in enumerate(word)) % (10**9 + 7) for word in caption.lower().split()][
            :length
        ]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return rows


def test_lookup_finds_each_caption_and_nothing_else():
    captions = [f"caption number {i}" for i in range(500)]
    frequency = np.arange(500) % 7 + 1.0
    find = TokenLookup(ClusterTable.build(captions, range(500), frequency), word_tokenizer, 0, torch.device("cpu"))
    batch = ["caption number 9", "not there", "CAPTION  number 499"]
    index = find(word_tokenizer(batch))
    assert index.tolist()[1] == find.missing == 7
    assert find.frequencies[index[[0, 2]]].tolist() == [frequency[9], frequency[499]]
    padded = torch.nn.functional.pad(word_tokenizer(batch), (0, 30))
    assert find(padded).tolist() == index.tolist()
    assert find(word_tokenizer(batch).int()).tolist() == index.tolist()


def test_captions_that_tokenize_alike_take_the_commonest():
    concepts = ClusterTable.build(
        ["A dog", "a dog", "a  DOG", "a cat"], [0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0], [5, 9, 2, 1]
    )
    find = TokenLookup(concepts, word_tokenizer, 0, torch.device("cpu"))
    assert find.merged == 2
    assert find.frequencies[find(word_tokenizer(["a dog"]))] == 2.0


def test_a_table_of_classes_is_refused():
    classes = ClusterTable.build(["1"], [0], [3], kind="class")
    with pytest.raises(TableError, match="keyed by class"):
        TokenLookup(classes, word_tokenizer, 0, torch.device("cpu"))


def test_large_tables_are_indexed_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("mmts_plugins.tables.index._CACHE_FROM", 10)
    monkeypatch.setattr("mmts_plugins.tables.index._PARALLEL_FROM", 3000)
    captions = [f"caption number {i}" for i in range(5000)]
    concepts = ClusterTable.build(captions, [0] * 5000, np.arange(5000) + 1.0)
    first = TokenLookup(concepts, word_tokenizer, 0, torch.device("cpu"))
    (cached,) = (tmp_path / "cache").iterdir()
    tokenized = []

    def counting(batch):
        tokenized.extend(batch)
        return word_tokenizer(batch)

    again = TokenLookup(concepts, counting, 0, torch.device("cpu"))
    assert len(tokenized) == 512 + 64 + (512 // 8 + 64 + 8 * 32)  # probes and the longest, and some again
    tokens = word_tokenizer(captions)
    assert torch.equal(first(tokens), again(tokens))
    assert first.frequencies[first(tokens)].tolist() == concepts.frequency.tolist()
    cached.write_bytes(cached.read_bytes()[:1000])
    assert torch.equal(TokenLookup(concepts, word_tokenizer, 0, torch.device("cpu"))(tokens), first(tokens))
    assert "building it again" in caplog.text
    other = TokenLookup(concepts, lambda batch: word_tokenizer(batch) + 1, 1, torch.device("cpu"))
    assert torch.equal(other(tokens + 1), first(tokens))


def test_hashes_do_not_collide():
    tokens = torch.cartesian_prod(*[torch.arange(1, 33)] * 3)
    hashes = hash_tokens(torch.nn.functional.pad(tokens, (0, 5)))
    assert len(hashes.unique()) == len(tokens) == 32768
    assert len(hash_tokens(torch.tensor([[1, 2, 0], [2, 1, 0], [1, 0, 2], [0, 1, 2], [0, 0, 0]])).unique()) == 5
    ones = (hashes.unsqueeze(1) >> torch.arange(64)) & 1
    assert (ones.float().mean(0) - 0.5).abs().max() < 0.02
