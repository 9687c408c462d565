"""Cluster tables and caches, damaged: refused in one line (a cache: built anew), or exactly the true numbers."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzzing import fuzz, survives
from hypothesis import strategies as st

from mmts_plugins import _files
from mmts_plugins.data import cache
from mmts_plugins.tables import index
from mmts_plugins.tables import streamed as large
from mmts_plugins.tables.index import TokenLookup
from mmts_plugins.tables.table import ClusterTable, legacy_hash

KEYS = ["a dog", "A cat", "zwei Vögel", "", "a dog and a cat", "boat \n tree", "x" * 90]
CLUSTER, FREQUENCY, COUNT = [0, 0, 1, 2, 0, 1, 3], [9.5, 9.5, 4.25, 1.0, 9.5, 4.25, 0.5], [3, 2, 4, 1, 4, 1, 1]
TRUE = ClusterTable.build(KEYS, CLUSTER, FREQUENCY, COUNT, info={"k": 4, "runs": 2, "stability": {"verdict": "steady"}})
OTHER = ClusterTable.build([key + "!" for key in KEYS], CLUSTER[::-1], FREQUENCY[::-1], COUNT, info=TRUE.info)


def rows(table: ClusterTable, low: int, high: int) -> ClusterTable:
    return ClusterTable.build(table.keys.slice(low, high - low), table.cluster[low:high], table.frequency[low:high],
                              table.count[low:high], info=table.info)  # fmt: skip


def in_parts(folder: Path, table: ClusterTable, word: str) -> None:
    for number, (low, high) in enumerate(((0, 2), (2, 3), (3, 7))):
        rows(table, low, high).save(folder / f"part-{number}.parquet", {
            "clusters": table.clusters, "samples": table.samples, "parts": 3, "part": number, "table": word,
        })  # fmt: skip


def as_of_old(table: ClusterTable, path: Path, **whole: int) -> None:
    """As release 0.1 wrote it."""
    info = {**table.info, "format": 1, "kind": "caption", "clusters": 4, "samples": table.samples,
            "frequency_min": 1.0, "frequency_max": 2.0, "content_hash": table.legacy_hash, **whole}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = pa.table(table._columns).replace_schema_metadata({b"mmts": json.dumps(info).encode()})
    pq.write_table(stored, path, compression="zstd")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables in every form, each in a folder."""
    root = tmp_path_factory.mktemp("sound")
    TRUE.save(root / "single" / "t.parquet")
    in_parts(root / "parts", TRUE, "one")
    in_parts(root / "other", OTHER, "two")
    as_of_old(TRUE, root / "old single" / "t.parquet")
    for number, (low, high) in enumerate(((0, 2), (2, 3), (3, 7))):
        as_of_old(rows(TRUE, low, high), root / "old parts" / f"part-{number}.parquet", parts=3, samples=16, seed=0)
        as_of_old(rows(OTHER, low, high), root / "old other" / f"part-{number}.parquet", parts=3, samples=16, seed=1)
    pq.write_table(pa.table(TRUE._columns), root / "single" / "plain", compression="none", use_dictionary=False)
    return root


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder or file opened whole and in a stream."""
    logging.disable(logging.WARNING)  # thousands of them, about the cache

    def opened(path: Path, streamed: bool) -> Any:
        large.LARGE_FROM = 1 if streamed else 2_000_000
        return large.open_table(path)

    monkeypatch.setattr(large, "LARGE_FROM", 1)
    monkeypatch.setattr(index, "_CACHE_FROM", 1)
    monkeypatch.setattr(index, "_MOST_WORKERS", 0)
    yield opened
    logging.disable(logging.NOTSET)


def hashes_of(table: Any) -> Any:
    return None if table is None else (table.content_hash, table.legacy_hash)


def is_true(table: Any, old: bool) -> bool:
    """What must hold of a damaged table that is taken: to the bit, but for the counts of release 0.1."""
    if old:
        return table.legacy_hash == TRUE.legacy_hash and table.samples == TRUE.samples
    return hashes_of(table) == hashes_of(TRUE)


def damaged(content: bytes, how: str, where: float, what: int, chunk: bytes) -> bytes:
    place = int(where * len(content))
    if how == "flip" and content:
        changed = bytearray(content)
        changed[min(place, len(content) - 1)] ^= what
        return bytes(changed)
    if how == "cut":
        return content[:place]
    if how == "insert":
        return content[:place] + chunk + content[place:]
    if how == "drop":
        return content[:place] + content[place + what :]
    return content[:place] + chunk + content[place + len(chunk) :]


DAMAGE = st.tuples(
    st.sampled_from(["flip", "flip", "flip", "cut", "insert", "drop", "write"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 255),
    st.binary(min_size=1, max_size=16),
)


@fuzz(
    form=st.sampled_from(["single", "parts", "old single", "old parts"]),
    damages=st.lists(DAMAGE, min_size=1, max_size=2),
    which=st.integers(0, 2),
    streamed=st.booleans(),
)
def test_bytes(sound: Path, tmp_path_factory: Any, both: Any, form: Any, damages: Any, which: int, streamed: bool):
    folder = sound.parent / "bytes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in (sound / form).glob("*.parquet"):
        shutil.copy(path, folder)
    path = sorted(folder.iterdir())[which % len(list(folder.iterdir()))]
    content = path.read_bytes()
    for damage in damages:
        content = damaged(content, *damage) or b"\0"
    path.write_bytes(content)
    table = survives(lambda: both(folder, streamed))
    assert table is None or is_true(table, form.startswith("old"))


@fuzz(damages=st.lists(DAMAGE, min_size=1, max_size=3), streamed=st.booleans())
def test_bytes_of_a_table_without_a_hash(sound: Path, both: Any, damages: Any, streamed: bool):
    """Another tool's: nothing tells what was there, but what is read makes a sound table."""
    path = sound.parent / "plain.parquet"
    content = (sound / "single" / "plain").read_bytes()
    for damage in damages:
        content = damaged(content, *damage) or b"\0"
    path.write_bytes(content)
    table = survives(lambda: both(path, streamed))
    if table is not None:
        summary = table.summary
        assert 0 < summary.low <= summary.mean * (1 + 1e-9) <= summary.high * (1 + 1e-8)
        assert table.samples >= len(table)


# --- columns of any type


def numbers(least: int, most: int) -> Any:
    extremes = [least, most, 0, -1, 1, 2**31 - 1, 2**31, 2**24, 2**53, 2**62, -(2**63), 2**63 - 1]
    return st.one_of(st.integers(1, 5), st.integers(0, 9), st.sampled_from(extremes))


CELLS: dict[str, Any] = {
    "text": st.text(max_size=4),
    "bytes": st.binary(max_size=4),
    "whole": numbers(-(2**63), 2**63 - 1),
    "small": st.integers(0, 6),
    "one": st.integers(1, 6),
    "float": st.floats(allow_nan=True),
    "positive": st.floats(0.1, 100),
    "bool": st.booleans(),
    "list": st.lists(st.integers(0, 3), max_size=2),
    "nothing": st.none(),
}
TYPES: dict[str, list[Any]] = {
    "text": [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    "bytes": [pa.binary(), pa.large_binary()],
    "whole": [pa.int64()],
    "small": [pa.int8(), pa.uint8(), pa.int32(), pa.int64(), pa.float64(), pa.decimal128(9, 2), pa.date32()],
    "one": [pa.int16(), pa.uint64(), pa.float32(), pa.dictionary(pa.int8(), pa.int64()), pa.timestamp("s")],
    "float": [pa.float64(), pa.float32()],
    "positive": [pa.float64(), pa.float32()],
    "bool": [pa.bool_()],
    "list": [pa.list_(pa.int64())],
    "nothing": [pa.null(), pa.string(), pa.int64(), pa.float64()],
}
USUAL = {"key": ["text"] * 5 + ["bytes", "small"], "cluster": ["small"] * 5 + ["whole", "one"],
         "frequency": ["positive"] * 5 + ["one", "float"], "count": ["one"] * 5 + ["whole", "small"]}  # fmt: skip


@st.composite
def columns(draw: Any, without_counts: bool) -> tuple[list[str], list[pa.Array]]:
    many = draw(st.integers(0, 6))
    names, arrays = [], []
    for name in draw(st.permutations(list(USUAL))):
        if draw(st.integers(0, 59)) == 59 or (name == "count" and without_counts):
            continue
        odd = draw(st.integers(0, 19))
        cell = draw(st.sampled_from(USUAL[name][:1] if odd < 14 else USUAL[name] if odd < 19 else list(CELLS)))
        values = draw(st.lists(CELLS[cell], min_size=many, max_size=many, unique=name == "key" and cell == "text"))
        if values and draw(st.integers(0, 59)) == 59:
            values[0] = None
        kind = draw(st.sampled_from(TYPES[cell]))
        try:
            array = pa.array(values, kind)
        except (pa.ArrowException, OverflowError):
            array = pa.array([None] * many, kind)
        names.append(draw(st.sampled_from([name] * 60 + ["key", "count", "other"])))
        arrays.append(array)
    return names, arrays


def plain(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


@fuzz(parts=st.booleans().flatmap(lambda bare: st.lists(columns(bare), min_size=1, max_size=2)))
def test_columns(sound: Path, both: Any, parts: Any):
    """Whatever is taken is what Arrow, asked for plain Python values, says is there; both ways of reading agree."""
    folder = sound.parent / "columns"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, (names, arrays) in enumerate(parts):
        pq.write_table(pa.Table.from_arrays(arrays, names), folder / f"{number}.parquet")
    keys = [str(plain(value)) for value in _values(parts, "key")]
    table, seen = (survives(lambda streamed=streamed: both(folder, streamed)) for streamed in (False, True))
    if table is None:
        assert seen is None or len(set(keys)) < len(keys)  # which is noticed only in tables that are loaded
        return
    assert keys == table.keys.to_pylist()
    assert _values(parts, "cluster") == table.cluster.tolist()
    assert [float(value) for value in _values(parts, "frequency")] == table.frequency.tolist()
    assert (_values(parts, "count") or [1] * len(table)) == table.count.tolist()
    assert seen is not None
    assert (seen.content_hash, seen.legacy_hash, len(seen), seen.samples, seen.clusters) == (
        table.content_hash, table.legacy_hash, len(table), table.samples, table.clusters)  # fmt: skip
    assert np.allclose(seen.summary, table.summary, rtol=1e-9, atol=0)
    assert legacy_hash(table.kind, lambda name: [table._columns[name]]) == table.legacy_hash


def _values(parts: Any, column: str) -> list[Any]:
    return [value for names, arrays in parts if column in names for value in arrays[names.index(column)].to_pylist()]


# --- metadata

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers(-1, 10**30), st.floats(), st.text(max_size=5), st.just(10**400),
              st.just("x" * 9000)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)  # fmt: skip
FIELDS = ["format", "kind", "clusters", "samples", "parts", "part", "table", "content_hash", "runs", "stability", "k",
          "frequency_min", "created", "versions", "x"]  # fmt: skip


@fuzz(
    old=st.booleans(),
    raw=st.one_of(st.none(), st.none(), st.none(), st.binary(max_size=30), JSON.map(lambda x: json.dumps(x).encode()),
                  st.integers(1, 5000).map(lambda deep: b'{"format": 2, "x": ' + b"[" * deep + b"]" * deep + b"}")),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=2),
    dropped=st.sets(st.sampled_from(FIELDS), max_size=1),
    streamed=st.booleans(),
)  # fmt: skip
def test_metadata(sound: Path, both: Any, old: bool, raw: Optional[bytes], changes: Any, dropped: Any, streamed: bool):
    """The content is sound, and stays what it is; the kind that it is taken for is the one that it was hashed with."""
    stored = pq.read_table(sound / ("old single" if old else "single") / "t.parquet")
    info = {**json.loads(stored.schema.metadata[b"mmts"]), **changes}
    for name in dropped:
        info.pop(name, None)
    path = sound.parent / "metadata.parquet"
    pq.write_table(stored.replace_schema_metadata({b"mmts": json.dumps(info).encode() if raw is None else raw}), path)
    table = survives(lambda: both(path, streamed))
    if table is not None:
        hashed = "content_hash" in info and raw is None
        assert hashes_of(table) == hashes_of(TRUE) or not hashed
        survives(lambda: ClusterTable.load(path).save(sound.parent / "again.parquet"))
        again = survives(lambda: both(sound.parent / "again.parquet", False))
        assert again.content_hash == table.content_hash


# --- folders of parts

STEP = st.tuples(
    st.sampled_from(["copy", "swap", "delete", "rename", "mix", "mix", "whole", "plain", "empty", "junk"]),
    st.integers(0, 3),
    st.integers(0, 3),
)


@fuzz(old=st.booleans(), steps=st.lists(STEP, min_size=1, max_size=4), streamed=st.booleans())
def test_parts(sound: Path, both: Any, old: bool, steps: Any, streamed: bool):
    """Files come and go and change places: only all parts of one table, in any order, make that table."""
    folder = sound.parent / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound / ("old parts" if old else "parts"), folder)
    for what, one, other in steps:
        first, second = (folder / f"part-{number}.parquet" for number in (one, other))
        if what == "mix":
            source = sound / ("other" if old != (other == 3) else "old other") / f"part-{other % 3}.parquet"
            shutil.copy(source, first)
        elif what == "whole":
            shutil.copy(sound / "single" / "t.parquet", first)
        elif what == "plain":
            pq.write_table(pa.table(rows(OTHER, 0, 2)._columns), first)
        elif what == "empty":
            pq.write_table(pa.table(TRUE._columns).slice(0, 0), first)
        elif what == "junk":
            first.write_bytes(b"PAR1junkPAR1")
        elif first.exists() and what == "delete":
            first.unlink()
        elif first.exists() and first != second:
            if what == "copy":
                shutil.copy(first, second)
            elif what == "rename":
                first.rename(second)
            elif second.exists():
                first.rename(folder / "aside")
                second.rename(first)
                (folder / "aside").rename(second)
    table = survives(lambda: both(folder, streamed))
    if table is None:
        return
    read = {
        key: row
        for part in folder.glob("*.parquet")
        for row in pq.read_table(part).to_pylist()
        if (key := row["key"]) is not None
    }
    allowed = [{key: (c, f, n) for key, c, f, n in zip(each.keys.to_pylist(), each.cluster.tolist(),
                                                      each.frequency.tolist(), each.count.tolist())}
               for each in (TRUE, OTHER)]  # fmt: skip
    found = {key: (row["cluster"], row["frequency"], row["count"]) for key, row in read.items()}
    # Without metadata (another tool's) nothing tells which parts belong together.
    unnamed = not any(b"mmts" in (pq.read_schema(part).metadata or {}) for part in folder.glob("*.parquet"))
    assert found in allowed or unnamed, steps
    assert unnamed or table.samples == sum(row["count"] for row in read.values())


# --- caches


class Cached:
    """Everything that is cached of one small table, and its true values."""

    def __init__(self, root: Path) -> None:
        self.home, self.table = root / "cache", root / "t.parquet"
        TRUE.save(self.table)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        packed = np.array([caption.encode()[:96] for caption in captions], "S96").view(np.uint8)
        return torch.from_numpy(packed.reshape(len(captions), 96).astype(np.int64))

    def check(self) -> None:
        """Built from the cache as it is now."""
        tokens = self.tokenize([*KEYS, "not there"])
        for source in (TRUE, large._look_at(self.table, [self.table], len(TRUE))):
            find = TokenLookup(source, self.tokenize, 0, torch.device("cpu"))
            values = np.append(find.frequencies, -1)[find(tokens).numpy()]
            assert values.tolist() == [*FREQUENCY, -1]
        assert source.content_hash == TRUE.content_hash
        assert (source.samples, source.summary.mean) == (16, TRUE.summary.mean)
        encode = lambda captions: np.array([[len(caption), 1] for caption in captions], np.float32)  # noqa: E731
        stored = cache.embed(encode, "encoder", KEYS, "x").take(np.arange(len(KEYS)))
        assert stored.tolist() == [[len(key), 1] for key in KEYS]

    def files(self) -> list[Path]:
        return sorted(path for path in self.home.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Cached:
    return Cached(tmp_path_factory.mktemp("kept"))


@fuzz(
    which=st.integers(0, 4),
    damages=st.lists(DAMAGE, min_size=1, max_size=2),
    sealed=st.booleans(),
    moved=st.sampled_from([None, None, None, 0, 1, 2, 3, 4]),
)
def test_caches(kept: Cached, both: Any, monkeypatch: Any, which: int, damages: Any, sealed: bool, moved: Any):
    monkeypatch.setenv("MMTS_CACHE", str(kept.home))
    if len(kept.files()) != 5:
        kept.check()
    files = kept.files()
    assert len(files) == 5
    path = files[which]
    content = (files[which] if moved is None else files[moved]).read_bytes()
    if moved is None:
        for damage in damages:
            content = damaged(content, *damage)
    path.write_bytes(content)
    if sealed:  # by somebody who knows how, but not under which name
        with _files.sealing(path, path.name + "?") as file:
            file.write(content)
    survives(kept.check)


@fuzz(value=st.one_of(st.floats(), st.integers()), text=st.text(max_size=3))
def test_a_record_names_a_table_by_its_hash_alone(value: Union[int, float], text: str):
    for stated in (value, text, [value], {text: value}, None, True):
        assert survives(lambda stated=stated: TRUE.has_hash(stated)) is False
    assert not math.isnan(TRUE.summary.mean)
    assert TRUE.has_hash(TRUE.content_hash)
    assert TRUE.has_hash(TRUE.legacy_hash)
