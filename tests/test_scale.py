"""Many captions: the stages behind ``--engine ray``, the real Ray, and tables that are never loaded whole."""

from __future__ import annotations

import io
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_clustering import cluster, make_tar, refused

from mmts_plugins.clustering import ray_engine, stages
from mmts_plugins.errors import MMTSError, TableError
from mmts_plugins.tables import ClusterTable, index, streamed

pytest.importorskip("sklearn")

COMMON = ["--encoder", "hashing", "-k", 6, "--runs", 3, "--fit-rows", 20, "--threads", 1]


class Serial:
    """The stages one after another in this process: what a pool does, without Ray."""

    stop_at: tuple[str, int] = ("", 0)

    def __init__(self, job: stages.Job, workers: object) -> None:
        self.worker = stages.Worker(job)
        self.done: list[tuple[str, int]] = []

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, stage: str, arguments: list[dict[str, Any]]) -> None:
        for part, given in enumerate(arguments):
            if (stage, part) == self.stop_at:
                raise KeyboardInterrupt
            self.worker.run(stage, part, **given)


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> type[Serial]:
    class Pool(Serial):
        pass

    monkeypatch.setattr(ray_engine, "_Pool", Pool)
    monkeypatch.setattr("mmts_plugins.versions.metadata.version", lambda name: "0")
    small = stages.Job
    monkeypatch.setattr(stages, "Job", lambda *args: small(*args, part_rows=200))
    return Pool


def texts(rows: int = 900) -> list[str]:
    draw = np.random.default_rng(0)
    words = np.array([f"{a}{b}" for a in ("dog", "cat", "boat", "tree", "car") for b in "abcdefghij"])
    return [" ".join(words[np.minimum(draw.zipf(1.5, 3), 49)]) for _ in range(rows)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    captions = texts()
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"caption": captions[:500]}), tmp_path / "in" / "a.parquet", row_group_size=100)
    pq.write_table(pa.table({"caption": captions[500:]}), tmp_path / "in" / "b.parquet")
    return tmp_path / "in"


def rows(path: Path) -> dict[str, tuple[int, float, int]]:
    table = ClusterTable.load(path)
    return {k: (int(c), float(f), int(n)) for k, c, f, n in
            zip(table.keys.to_pylist(), table.cluster, table.frequency, table.count)}  # fmt: skip


def test_the_stages_make_the_table_that_the_local_engine_makes(
    serial: type[Serial], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster(folder, "--format", "parquet", *COMMON, "-o", tmp_path / "local.parquet")
    cluster(folder, "--format", "parquet", *COMMON, "--engine", "ray", "-o", tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.parquet"))) > 1
    assert rows(tmp_path / "parts") == rows(tmp_path / "local.parquet")
    assert not (tmp_path / "parts.work").exists()
    local, parts = ClusterTable.load(tmp_path / "local.parquet"), ClusterTable.load(tmp_path / "parts")
    assert parts.info["stability"] == local.info["stability"]
    assert parts.info["stability"]["verdict"] in capsys.readouterr().out


def test_every_part_names_its_table_and_its_place(serial: type[Serial], folder: Path, tmp_path: Path) -> None:
    flags = ["--format", "parquet", *COMMON, "--engine", "ray"]
    cluster(folder, *flags, "-o", tmp_path / "one")
    cluster(folder, *flags, "-o", tmp_path / "again")
    cluster(folder, *flags, "--seed", 1, "-o", tmp_path / "seed")
    other = tmp_path / "other"
    other.mkdir()  # the same clusters and counts of other captions: the encoder sees no order of words
    pq.write_table(pa.table({"caption": [" ".join(reversed(text.split())) for text in texts()]}), other / "a.parquet")
    cluster(other, *flags, "-o", tmp_path / "turned")
    words = {}
    for name in ("one", "again", "seed", "turned"):
        infos = [json.loads(pq.read_schema(part).metadata[b"mmts"]) for part in sorted((tmp_path / name).iterdir())]
        assert [info["part"] for info in infos] == list(range(len(infos)))
        assert {info["parts"] for info in infos} == {len(infos)}
        assert len(infos) > 2
        assert len({info["content_hash"] for info in infos}) == len(infos)
        (words[name],) = {info["table"] for info in infos}
    assert words["one"] == words["again"]
    assert len(set(words.values())) == 3
    part = "part-000001.parquet"
    (tmp_path / "one" / part).write_bytes((tmp_path / "again" / part).read_bytes())
    assert rows(tmp_path / "one") == rows(tmp_path / "again")
    (tmp_path / "one" / part).write_bytes((tmp_path / "seed" / part).read_bytes())
    with pytest.raises(TableError, match="are of different tables: 'table' is"):
        ClusterTable.load(tmp_path / "one")


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_killed_run_goes_on_from_the_finished_parts(
    serial: type[Serial], folder: Path, tmp_path: Path, stage: str
) -> None:
    flags = [folder, "--format", "parquet", *COMMON, "--engine", "ray", "-o", tmp_path / "t"]
    serial.stop_at = (stage, 1)
    with pytest.raises(KeyboardInterrupt):
        cluster(*flags)
    assert not (tmp_path / "t").exists()
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "t.work").rglob("0*")}
    assert first
    serial.stop_at = ("finish", 1)
    with pytest.raises(KeyboardInterrupt):
        cluster(*flags)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert "with another recipe" in refused(*flags, "--seed", 3)
    serial.stop_at = ("", 0)
    cluster(*flags)
    cluster(folder, "--format", "parquet", *COMMON, "-o", tmp_path / "local.parquet")
    assert rows(tmp_path / "t") == rows(tmp_path / "local.parquet")


def test_the_stages_read_webdataset(serial: type[Serial], tmp_path: Path) -> None:
    pytest.importorskip("braceexpand")
    captions = texts(300)
    for shard in range(3):
        members = []
        for number in range(shard * 100, shard * 100 + 100):
            members += [(f"{number}.jpg", b"x"), (f"{number}.txt", captions[number].encode())]
        make_tar(tmp_path / f"{shard}.tar", members)
    pattern = f"{tmp_path}/{{0..2}}.tar"
    cluster(pattern, *COMMON, "--no-cache", "--engine", "ray", "-o", tmp_path / "t")
    cluster(pattern, *COMMON, "--no-cache", "-o", tmp_path / "local.parquet")
    assert rows(tmp_path / "t") == rows(tmp_path / "local.parquet")


def test_errors_of_the_stages_leave_no_table(
    serial: type[Serial], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--format", "parquet", *COMMON, "--engine", "ray", "-o", tmp_path / "t"]
    assert "only" in refused(folder, *flags, "-k", 800)
    blank = tmp_path / "blank.parquet"
    pq.write_table(pa.table({"caption": ["a", " "]}), blank)
    assert "--keep-blank" in refused(blank, *flags[:-1], tmp_path / "u")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((folder / "a.parquet").read_bytes()[:-100])
    assert "cut.parquet: cannot be read as parquet" in refused(cut, *flags[:-1], tmp_path / "v")
    assert "--estimator kmeans only" in refused(folder, *flags, "--estimator", "knn")
    assert "not with --embeddings" in refused(folder, *flags, "--algorithm", "lloyd")

    serial.stop_at = ("assign", 0)
    out = tmp_path / "w"
    with pytest.raises(KeyboardInterrupt):
        cluster(folder, *flags[:-1], out)
    part = tmp_path / "w.work" / "merge" / "000000.parquet"
    part.write_bytes(part.read_bytes()[:-50])
    serial.stop_at = ("", 0)
    assert f"{part}: a damaged part" in refused(folder, *flags[:-1], out)
    assert not [path for name in "tuvw" for path in [tmp_path / name] if path.exists()]


def test_an_error_in_a_worker_is_one_line() -> None:
    class Full:
        def run(self, stage: str, part: int) -> None:
            raise OSError(28, "No space left on device", "x/000003.parquet")

    actor = ray_engine._Actor.__new__(ray_engine._Actor)
    actor._worker, actor._stage = Full(), "assign"
    (error,) = actor({"part": np.array([3]), "arguments": np.array([{}])})["error"]
    assert "stage assign, part 3" in error
    assert "No space left" in error


def test_the_real_ray(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    cluster(folder, "--format", "parquet", *COMMON, "--engine", "ray", "--workers", 2, "-o", tmp_path / "t")
    cluster(folder, "--format", "parquet", *COMMON, "-o", tmp_path / "local.parquet")
    assert rows(tmp_path / "t") == rows(tmp_path / "local.parquet")


# --- large tables


def tokenizer(captions: list[str]) -> torch.Tensor:
    packed = np.array([caption.lower().encode()[:24] for caption in captions], "S24").view(np.uint8)
    return torch.from_numpy(packed.reshape(len(captions), 24).astype(np.int64))


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(streamed, "LARGE_FROM", 1000)
    monkeypatch.setattr(index, "_CHUNK", 64)
    draw = np.random.default_rng(0)
    keys = [f"caption {number} {'X' if number % 10 else 'x'}" for number in range(3000)]
    keys += [key.upper() for key in keys[:50]]  # tokenize like others
    cluster = draw.integers(0, 30, len(keys))
    frequency = draw.zipf(1.4, 30).astype(float)[cluster]
    count = draw.integers(1, 9, len(keys))
    for number, piece in enumerate(np.array_split(np.arange(len(keys)), 3)):
        table = ClusterTable.build([keys[i] for i in piece], cluster[piece], frequency[piece], count[piece])
        table.save(tmp_path / "big" / f"{number}.parquet", {"clusters": 30, "samples": int(count.sum()), "parts": 3})
    return tmp_path / "big"


def test_a_large_table_is_the_same_table(parts: Path) -> None:
    seen, whole = streamed.open_table(parts), ClusterTable.load(parts)
    assert isinstance(seen, streamed.LargeTable)
    assert (len(seen), seen.content_hash, seen.kind) == (len(whole), whole.content_hash, whole.kind)
    assert (seen.clusters, seen.samples) == (whole.clusters, whole.samples)
    assert tuple(seen.summary) == pytest.approx(tuple(whole.summary), rel=1e-9)

    device = torch.device("cpu")
    by_stream, by_load = (index.TokenLookup(table, tokenizer, 0, device) for table in (seen, whole))
    assert by_stream.merged == by_load.merged == 50
    batch = tokenizer([*whole.keys.to_pylist(), "not there"])
    found, expected = by_stream(batch), by_load(batch)
    assert found[-1] == by_stream.missing
    assert np.array_equal(by_stream.frequencies[found[:-1]], by_load.frequencies[expected[:-1]])


def test_frequencies_beyond_sixteen_bits_are_rounded_to_even_levels(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "LEVELS", 5)
    seen = streamed.open_table(parts)
    low, high = seen.summary.low, seen.summary.high
    values = np.linspace(low, high, 999)
    assert len(seen.levels) == 5
    assert np.abs(seen.levels[seen.code(values)] - values).max() <= (high - low) / 4 / 2 * (1 + 1e-9)


def _open(parts: str, results: Any) -> None:
    streamed.LARGE_FROM = 1000
    built = []
    real = index._write_index
    index._write_index = lambda *args: built.append(1) or real(*args)  # type: ignore[func-returns-value]
    table = index.TokenLookup(streamed.open_table(parts), tokenizer, 0, torch.device("cpu"))
    mapped = "codes.i16" in Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else True
    results.put((len(built), mapped, int(table(tokenizer(["caption 7 X"]))[0])))


def test_ranks_that_start_together_build_the_index_once(parts: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_open, args=(str(parts), results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(built for built, _, _ in found) == [0, 1]
    assert all(mapped for _, mapped, _ in found)
    assert found[0][2] == found[1][2]


def test_a_large_table_that_is_wrong_is_one_error(parts: Path) -> None:
    part = parts / "1.parquet"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(TableError, match=r"1\.parquet: not a readable Parquet file"):
        streamed.open_table(parts)
    part.unlink()
    with pytest.raises(TableError, match="holds 2 parts of a table of 3"):
        streamed.open_table(parts)
    with pytest.raises(TableError, match="holds 2 parts of a table of 3"):
        ClusterTable.load(parts)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"] * 5000, "cluster": [0] * 5000, "frequency": [0.0] * 5000}), buffer)
    for path in parts.iterdir():
        path.unlink()
    part.write_bytes(buffer.getvalue())
    with pytest.raises(TableError, match="'frequency' must hold finite numbers above zero"):
        streamed.open_table(parts)


def test_what_was_read_of_a_large_table_is_kept(parts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = streamed.open_table(parts)
    assert len(list((tmp_path / "cache" / "tables").glob("*.json"))) == 1
    monkeypatch.setattr(streamed, "_read_through", lambda *_: pytest.fail("read again"))
    assert streamed.open_table(parts).content_hash == first.content_hash
    (file,) = (tmp_path / "cache" / "tables").glob("*.json")
    assert json.loads(file.read_text().splitlines()[0])["rows"] == len(first) == 3050
    with pytest.raises(MMTSError, match="no such cluster table"):
        streamed.open_table(parts / "missing.parquet")
