"""What lies in the cache: believed only as this user sealed it, else built anew; what killed runs left; no cache."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks

from mmts_plugins import _files
from mmts_plugins.data import cache
from mmts_plugins.distributed import first_on_node
from mmts_plugins.errors import MMTSError, TableError
from mmts_plugins.tables import ClusterTable, index, streamed
from mmts_plugins.tables.index import KeyLookup, TokenLookup

CPU = torch.device("cpu")
KEYS = [f"caption {number} {'X' if number % 7 else 'x'}" for number in range(1300)]
SIZES = np.arange(1, 14, dtype=float)  # of 13 clusters
CLUSTER = np.arange(1300) % 13
COUNT = np.arange(1300) % 5 + 1


def tokenizer(captions: list[str]) -> torch.Tensor:
    packed = np.array([caption.lower().encode()[:24] for caption in captions], "S24").view(np.uint8)
    return torch.from_numpy(packed.reshape(len(captions), 24).astype(np.int64))


def table(**changes: Any) -> ClusterTable:
    columns = {"keys": KEYS, "cluster": CLUSTER, "frequency": SIZES[CLUSTER], "count": COUNT, **changes}
    return ClusterTable.build(**columns)


def alike(place: int, key: str) -> list[str]:
    return [key if row == place else each for row, each in enumerate(KEYS)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_CACHE_FROM", 10)
    monkeypatch.setattr(index, "_MOST_WORKERS", 0)
    monkeypatch.setattr(_files, "_told", set())
    monkeypatch.setattr(_files, "_swept", set())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def frequencies(find: TokenLookup, keys: list[str] = KEYS) -> list[float]:
    values = np.append(find.frequencies, np.nan)
    found: list[float] = values[find(tokenizer(keys)).numpy()].tolist()
    return found


class Kind:
    """One kind of cached file: how it comes about, what it says, and a count of how often it was built."""

    builds = 0

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.prepare(tmp_path)

    def counting(self, module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(*args: Any) -> Any:
            self.builds += 1
            return real(*args)

        self.patch.setattr(module, name, counted)


class Index(Kind):
    pattern = "tokens-*.npy"
    expected = SIZES[CLUSTER].tolist()

    def prepare(self, tmp_path: Path) -> None:
        self.counting(index, "_build_index")

    def get(self) -> list[float]:
        return frequencies(TokenLookup(table(), tokenizer, 0, CPU))

    def stored(self) -> np.ndarray:
        find = TokenLookup(table(), tokenizer, 0, CPU)
        hashes, rows = index._build_index(table(), tokenizer, 0)
        assert len(find._hashes) == len(hashes)
        self.builds = 0
        return np.stack([hashes, rows])


class Mapped(Kind):
    pattern = "tokens-*/hashes.i64"
    expected = SIZES[CLUSTER].tolist()

    def prepare(self, tmp_path: Path) -> None:
        self.patch.setattr(streamed, "LARGE_FROM", 1000)
        self.counting(index, "_write_index")
        self.path = tmp_path / "t.parquet"
        table().save(self.path)

    def get(self) -> list[float]:
        return frequencies(TokenLookup(streamed.open_table(self.path), tokenizer, 0, CPU))


class Codes(Mapped):
    pattern = "tokens-*/codes.i16"


class Facts(Mapped):
    pattern = "tables/*.json"
    expected: Any = (table().content_hash, 1300, 13, int(COUNT.sum()), 1.0, 13.0)

    def prepare(self, tmp_path: Path) -> None:
        super().prepare(tmp_path)
        self.counting(streamed, "_read_through")

    def get(self) -> Any:
        seen = streamed.open_table(self.path)
        return (seen.content_hash, len(seen), seen.clusters, seen.samples, seen.summary.low, seen.summary.high)


class Embeddings(Kind):
    pattern = "embeddings/*/*.npy"
    expected: Any = np.array([[len(key), 1.0] for key in KEYS[:40]]).tolist()

    def prepare(self, tmp_path: Path) -> None:
        pass

    def encode(self, captions: Any) -> np.ndarray:
        self.builds += 1
        return np.array([[len(caption), 1] for caption in captions], np.float32)

    def get(self) -> list[list[float]]:
        return cache.embed(self.encode, "an encoder", KEYS[:40], "--encoder x").take(np.arange(40)).tolist()


KINDS = [Index, Mapped, Codes, Facts, Embeddings]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return request.param(tmp_path, monkeypatch)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flipped_first(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def without_seal(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -_files._TRAILER])


def sealed_as_another(path: Path) -> None:
    content = path.read_bytes()[: -_files._TRAILER]
    with _files.sealing(path, "another") as file:
        file.write(content)


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def writable_by_others(path: Path) -> None:
    path.chmod(0o666)


ODD = [cut, cut_short, emptied, longer, flipped, flipped_first, without_seal, sealed_as_another, a_link, a_folder,
       a_pipe, writable_by_others]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
def test_an_odd_file_is_built_anew_with_one_warning(home, kind, odd, caplog):
    assert kind.get() == kind.expected
    assert kind.builds == 1
    assert kind.get() == kind.expected
    assert kind.builds == 1
    (path,) = home.glob(kind.pattern)
    odd(path)
    assert kind.get() == kind.expected
    assert kind.builds == 2
    (warning,) = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert f"{path} cannot be used (" in warning
    assert warning.endswith("again")
    assert kind.get() == kind.expected
    assert kind.builds == 2
    assert len(caplog.records) == 1 or all(each.levelno < logging.WARNING for each in caplog.records[1:])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_not_used(home, kind, caplog):
    kind.get()
    (path,) = home.glob(kind.pattern)
    os.chown(path, 12345, 12345)
    assert kind.get() == kind.expected
    assert kind.builds == 2
    assert "belongs to another user" in caplog.text


def sealed_array(label: Callable[[Path], str], array: np.ndarray) -> Callable[[Path], None]:
    def plant(path: Path) -> None:
        with _files.sealing(path, label(path)) as file:
            np.save(file, array)

    return plant


def planted(kind: Kind, path: Path, array: Any) -> None:
    """By somebody who knows how to seal: what a file says is looked at too."""
    if isinstance(kind, Embeddings):
        label = f"an encoder {path.name}"
    elif isinstance(kind, Index):
        label = path.name
    elif isinstance(kind, Facts):
        label = path.stem
    else:
        label = f"{path.parent.name}/{path.name}"
    with _files.sealing(path, label) as file:
        if isinstance(array, bytes):
            file.write(array)
        else:
            np.save(file, array)


def test_what_is_sealed_is_still_looked_at_index(home, tmp_path, monkeypatch, caplog):
    kind = Index(tmp_path, monkeypatch)
    stored = kind.stored()
    (path,) = home.glob(kind.pattern)
    planted(kind, path, stored)
    assert (kind.get(), kind.builds) == (kind.expected, 0)  # so that what follows is refused for what it says
    beyond, negative, swapped, twice = (stored.copy() for _ in range(4))
    beyond[1, 3], negative[1, 3] = 1300, -1
    swapped[:, [5, 6]] = swapped[:, [6, 5]]
    twice[0, 5] = twice[0, 6]
    odd = [beyond, negative, swapped, twice, stored.astype(np.int32), stored.astype(float), stored.astype(">i8"),
           stored[:1], np.vstack([stored, stored]), stored.ravel(), stored[:, :0],
           np.asfortranarray(stored)]  # fmt: skip
    for number, array in enumerate(odd, 1):
        planted(kind, path, array)
        assert (kind.get(), kind.builds) == (kind.expected, number)
    assert len([each for each in caplog.records if "building it again" in each.getMessage()]) == len(odd)


def test_what_is_sealed_is_still_looked_at_mapped(home, tmp_path, monkeypatch, caplog):
    kind = Mapped(tmp_path, monkeypatch)
    kind.get()
    (hashes,), (codes,) = home.glob(Mapped.pattern), home.glob(Codes.pattern)
    right = [path.read_bytes()[: -_files._TRAILER] for path in (hashes, codes)]
    assert [len(each) for each in right] == [8 * 1300, 2 * 1300]
    for path, content in zip((hashes, codes), right):
        planted(kind, path, content)
    assert (kind.get(), kind.builds) == (kind.expected, 1)
    odd = [
        (hashes, right[0][8:16] + right[0][:8] + right[0][16:]),
        (hashes, right[0][:8] + right[0][:-8]),
        (hashes, right[0][:-8]),
        (hashes, right[0] + b"xyz"),
        (hashes, b""),
        (codes, right[1][:-2]),
        (codes, np.full(1300, 13, "<i2").tobytes()),
        (codes, np.full(1300, -1, "<i2").tobytes()),
        (codes, b""),
    ]
    for number, (path, content) in enumerate(odd, 2):
        planted(kind, path, content)
        assert (kind.get(), kind.builds) == (kind.expected, number)
    assert len([each for each in caplog.records if "building it again" in each.getMessage()]) == len(odd)


def test_what_is_sealed_is_still_looked_at_facts(home, tmp_path, monkeypatch, caplog):
    import json

    kind = Facts(tmp_path, monkeypatch)
    kind.get()
    (path,) = home.glob(kind.pattern)
    right = json.loads(path.read_bytes()[: -_files._TRAILER])
    summary, levels = right["summary"], right["levels"]
    assert (right["rows"], levels) == (1300, SIZES.tolist())
    planted(kind, path, json.dumps(right).encode())
    assert (kind.get(), kind.builds) == (kind.expected, 1)
    odd: list[Any] = [
        {**right, "rows": 1299}, {**right, "samples": 0}, {**right, "clusters": "13"}, {**right, "kind": "clas"},
        {**right, "levels": levels[::-1]}, {**right, "levels": levels[:-1]}, {**right, "levels": []},
        {**right, "levels": [1.0, float("nan"), 13.0]}, {**right, "levels": "x"}, {**right, "info": []},
        {**right, "summary": {**summary, "mean": float("nan")}}, {**right, "summary": {**summary, "tail": 0.5}},
        {**right, "summary": {**summary, "mean": 99.0}}, {**right, "summary": {**summary, "low": "1"}},
        {**right, "summary": {}}, {**right, "more": 1}, {**right, "longest": [1]}, {**right, "groups": []}, [], None,
    ]  # fmt: skip
    for number, facts in enumerate(odd, 2):
        planted(kind, path, json.dumps(facts).encode())
        assert (kind.get(), kind.builds) == (kind.expected, number), facts
    assert len([each for each in caplog.records if "building it again" in each.getMessage()]) == len(odd)


def test_what_is_sealed_is_still_looked_at_embeddings(home, tmp_path, monkeypatch, caplog):
    kind = Embeddings(tmp_path, monkeypatch)
    kind.get()
    (path,) = home.glob(kind.pattern)
    right = np.array(kind.expected, np.float16)
    planted(kind, path, right)
    assert (kind.get(), kind.builds) == (kind.expected, 1)
    nan = right.copy()
    nan[3, 1] = np.nan
    odd = [right[:-1], np.vstack([right, right[:1]]), nan, right.astype(np.float32), right.ravel(), right[:, :0],
           right.astype(">f2"), np.asfortranarray(right), b"x" * 10]  # fmt: skip
    for number, array in enumerate(odd, 2):
        planted(kind, path, array)
        assert (kind.get(), kind.builds) == (kind.expected, number)
    assert len([each for each in caplog.records if "captions again" in each.getMessage()]) == 1  # of many parts, one


# --- the folder


def test_the_folder_is_this_users_alone(home, kind):
    kind.get()
    folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
    assert [oct(path.stat().st_mode & 0o777) for path in folders] == ["0o700"] * len(folders)
    files = [path for path in home.rglob("*") if path.is_file()]
    assert [oct(path.stat().st_mode & 0o777) for path in files] == ["0o600"] * len(files)
    assert files


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(home, kind, mode, caplog):
    home.mkdir()
    home.chmod(mode)
    assert kind.get() == kind.get() == kind.expected
    assert kind.builds == 2
    assert list(home.iterdir()) == []
    (warning,) = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert f"{home} cannot serve as a cache (it can be written to by others; chmod go-w it)" in warning


def test_the_folder_may_be_a_link_to_one_that_is_this_users_alone(home, tmp_path, monkeypatch, caplog):
    kind = Embeddings(tmp_path, monkeypatch)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk").chmod(0o700)
    home.symlink_to(tmp_path / "disk")
    assert kind.get() == kind.get() == kind.expected
    assert kind.builds == 1
    (tmp_path / "disk").chmod(0o770)
    assert kind.get() == kind.expected
    assert kind.builds == 2
    assert "can be written to by others" in caplog.text


@pytest.mark.parametrize("spoil", ["another's", "a file", "below a file", "a name too long", "read-only"])
def test_a_folder_that_cannot_be_used(home, kind, spoil, caplog, monkeypatch):
    if spoil == "another's":
        home.mkdir(0o700)
        real = _files._require_own

        def of_folders(status: os.stat_result, what: str) -> None:
            with monkeypatch.context() as patch:
                if stat.S_ISDIR(status.st_mode):
                    patch.setattr(os, "geteuid", lambda: 54321)
                real(status, what)

        monkeypatch.setattr(_files, "_require_own", of_folders)
    elif spoil == "a file":
        home.write_text("x")
    elif spoil == "below a file":
        home.write_text("x")
        monkeypatch.setenv("MMTS_CACHE", str(home / "cache"))
    elif spoil == "a name too long":
        monkeypatch.setenv("MMTS_CACHE", str(home / ("n" * 300)))
    else:
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    assert kind.get() == kind.get() == kind.expected
    assert kind.builds == 2
    (warning,) = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert "cannot serve as a cache" in warning


def test_no_cache_leaves_nothing_anywhere(tmp_path, kind, monkeypatch, caplog):
    for name in ("home", "xdg", "tmp", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("MMTS_CACHE", "")
    assert kind.get() == kind.get() == kind.expected
    assert kind.builds == 2
    assert [path for name in ("home", "xdg", "tmp", "here") for path in (tmp_path / name).iterdir()] == []
    assert not (tmp_path / "cache").exists()
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("xdg", [True, False])
def test_where_the_cache_is(tmp_path, monkeypatch, xdg):
    monkeypatch.delenv("MMTS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if xdg else "")
    expected = tmp_path / "xdg" if xdg else tmp_path / "home" / ".cache"
    assert _files.cache_folder("tables") == expected / "mmts-plugins" / "tables"
    assert (expected / "mmts-plugins" / "tables").is_dir()


def test_a_disk_that_is_full(kind, monkeypatch, caplog):
    """Only where there is room for no index at all is it an error: embeddings and indexes of large tables."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.Sealed, "write", full)
    if isinstance(kind, (Index, Facts)):
        assert kind.get() == kind.get() == kind.expected
        assert kind.builds == 2
        assert "cannot be cached (No space left on device)" in caplog.text
    else:
        with pytest.raises(MMTSError, match=r"cannot be .*No space left on device"):
            kind.get()


# --- keys


@pytest.mark.parametrize(
    "changes",
    [
        {"count": np.where(np.arange(1300) == 77, 9, COUNT)},
        {"frequency": np.where(np.arange(1300) == 77, 8.5, SIZES[CLUSTER])},
        {"cluster": np.where(np.arange(1300) == 77, 0, CLUSTER)},
        {"keys": alike(77, "caption 77")},
    ],
    ids=["count", "frequency", "cluster", "key"],
)
def test_an_index_is_of_the_whole_table(home, changes, monkeypatch):
    assert KEYS[77] not in table().probes(512) + table().longest
    TokenLookup(table(), tokenizer, 0, CPU)
    assert len(list(home.glob("tokens-*"))) == 1
    other = table(**changes)
    assert frequencies(TokenLookup(other, tokenizer, 0, CPU), other.keys.to_pylist()) == other.frequency.tolist()
    assert len(list(home.glob("tokens-*"))) == 2


def test_captions_that_tokenize_alike_when_only_a_count_changes(home):
    """Which of two captions is the commoner one decides, so that the index of other counts is another index."""
    keys = alike(78, "CAPTION 77 x")
    for first, second, expected in ((2, 1, SIZES[CLUSTER[77]]), (1, 2, SIZES[CLUSTER[78]])):
        count = COUNT.copy()
        count[77:79] = first, second
        find = TokenLookup(table(keys=alike_pair(keys), count=count), tokenizer, 0, CPU)
        assert frequencies(find, ["caption 77 x"]) == [expected]
    assert len(list(home.glob("tokens-*"))) == 2


def alike_pair(keys: list[str]) -> list[str]:
    return ["caption 77 x" if row == 77 else key for row, key in enumerate(keys)]


def test_an_index_is_of_one_tokenizer(home):
    expected = SIZES[CLUSTER].tolist()
    assert frequencies(TokenLookup(table(), tokenizer, 0, CPU)) == expected

    def one_full_row(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions)
        tokens[:, -1] = torch.tensor([1 if caption == KEYS[79] else 2 for caption in captions])
        return tokens

    for pad_id in (0, 1):  # which counts for this caption alone, and it is no probe
        assert KEYS[79] not in table().probes(512) + table().longest
        find = TokenLookup(table(), one_full_row, pad_id, CPU)
        assert find.frequencies[find(one_full_row(KEYS))].tolist() == expected
    assert len(list(home.glob("tokens-*"))) == 3
    shifted = TokenLookup(table(), lambda captions: tokenizer(captions) + 1, 0, CPU)
    assert len(list(home.glob("tokens-*"))) == 4
    assert shifted.frequencies[shifted(tokenizer(KEYS) + 1)].tolist() == expected
    # Another context length shows in the longest captions alone.
    long = table(keys=alike(77, "a caption so long that it is cut"))
    assert long.keys[77].as_py() not in long.probes(512)
    TokenLookup(long, tokenizer, 0, CPU)
    TokenLookup(long, lambda captions: tokenizer([caption[:23] for caption in captions]), 0, CPU)
    assert len(list(home.glob("tokens-*"))) == 6


def test_a_large_table_is_known_by_its_path_and_each_files_name_length_time_and_place():
    from types import SimpleNamespace

    status = {"st_size": 1, "st_mtime_ns": 2, "st_ctime_ns": 3, "st_ino": 4, "st_dev": 5}

    def name(path: str = "/t", file: str = "a", **changes: int) -> str:
        return streamed.name_of(
            Path(path), [(file, SimpleNamespace(**{**status, **changes})), ("b", SimpleNamespace(**status))]
        )

    names = [name(), name("/u"), name(file="c"), *(name(**{field: 9}) for field in status)]
    assert len(set(names)) == 8
    assert name() == name()


def test_a_large_table_that_is_touched_is_read_again(tmp_path, monkeypatch):
    kind = Facts(tmp_path, monkeypatch)
    kind.get()
    os.utime(kind.path, ns=(1, 1))
    kind.get()
    assert kind.builds == 2


def test_rot_between_reading_a_large_table_and_indexing_it(tmp_path, monkeypatch):
    """Neither length nor time tell: the same file by other bytes."""
    kind = Mapped(tmp_path, monkeypatch)
    monkeypatch.setattr(streamed, "name_of", lambda *_: "the same")
    kind.get()
    table(frequency=SIZES[CLUSTER][::-1].copy()).save(kind.path)
    seen = streamed.open_table(kind.path)
    assert seen.content_hash == table().content_hash
    with pytest.raises(TableError, match="changed since it was read through"):
        TokenLookup(seen, lambda captions: tokenizer(captions) + 1, 0, CPU)


@pytest.mark.parametrize(
    ("one", "other"),
    [(["ab", "c"], ["a", "bc"]), (["abc"], ["ab", "c"]), (["a", "b"], ["b", "a"]), (["a", ""], ["", "a"])],
)
def test_embeddings_are_of_their_captions(home, one, other):
    def encode(captions: Any) -> np.ndarray:
        return np.array([[len(caption), ord((caption or "_")[0])] for caption in captions], np.float32)

    for captions in (one, other, one):
        assert np.array_equal(cache.embed_part(encode, "e", captions, "x"), encode(captions))
    assert len(list(home.glob("embeddings/*/*.npy"))) == 2


def test_embeddings_are_of_their_encoder(home):
    for identity, value in (("one", 1.0), ("two", 2.0), ("one", 1.0)):
        stored = cache.embed_part(lambda captions, value=value: np.full((1, 2), value), identity, ["a"], "x")
        assert stored.tolist() == [[value, value]]
    assert len(list(home.glob("embeddings/*/*.npy"))) == 2


@pytest.mark.parametrize("many", [128, 129, 255, 256, 257, 1300])
def test_as_many_frequencies_as_there_are(many):
    """Eight bits hold 256 of them, signed ones 128."""
    frequency = np.arange(1300) % many + 0.5
    by_key, by_token = KeyLookup(table(frequency=frequency)), TokenLookup(table(frequency=frequency), tokenizer, 0, CPU)
    assert by_key.missing == by_token.missing == many
    assert by_key.frequencies[by_key(KEYS)].tolist() == frequency.tolist() == frequencies(by_token)
    assert by_key(["not there"]).tolist() == by_token(tokenizer(["not there"])).tolist() == [many]


# --- locks and leftovers


def test_a_lock_does_not_follow_links_and_truncates_nothing(home, tmp_path, monkeypatch, caplog):
    kind = Mapped(tmp_path, monkeypatch)
    kind.get()
    (lock,) = home.glob("tokens-*.lock")
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    for path in (lock, next(home.glob("tables/*.lock"))):
        path.unlink()
        path.symlink_to(precious)
    assert kind.get() == kind.expected
    assert precious.read_text() == "years of work"
    assert caplog.text.count("cannot be locked") == 2
    lock.unlink()
    os.link(precious, lock)
    assert kind.get() == kind.expected
    assert precious.read_text() == "years of work"


def _hold(path: str, ready: Any) -> None:
    with _files.one_at_a_time(Path(path)):
        ready.set()
        time.sleep(60)


def test_who_comes_second_waits_until_the_first_is_gone(home):
    path = _files.cache_folder() / "x.json"
    context = multiprocessing.get_context("fork")
    holds = [context.Event() for _ in range(2)]
    first, second = (context.Process(target=_hold, args=(str(path), ready)) for ready in holds)
    first.start()
    assert holds[0].wait(30)
    second.start()
    assert not holds[1].wait(0.3)
    os.kill(first.pid, signal.SIGKILL)
    assert holds[1].wait(30)
    second.kill()
    for process in (first, second):
        process.join(30)


def _killed(path: str, folder: bool, ready: Any) -> None:
    with (_files.replacing_folder if folder else _files.replacing)(path) as temporary:
        ((temporary / "x") if folder else temporary).write_text("half")
        ready.set()
        time.sleep(60)


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_run_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path, folder, monkeypatch):
    target = tmp_path / "out" / "t"
    context = multiprocessing.get_context("fork")
    processes = []
    for _ in range(2):
        ready = context.Event()
        process = context.Process(target=_killed, args=(str(target), folder, ready))
        process.start()
        assert ready.wait(30)
        processes.append(process)
    left = set(target.parent.iterdir())
    assert len(left) == 2
    monkeypatch.setattr(_files, "_swept", set())
    with _files.replacing(target.parent / "other") as temporary:
        temporary.write_text("x")
        assert set(target.parent.iterdir()) == {*left, temporary}  # two live ones
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].join(30)
    monkeypatch.setattr(_files, "_swept", set())
    mine = target.parent / ".mine.tmp"
    mine.write_text("x")
    with _files.replacing(target.parent / "other"):
        pass
    assert len(left & set(target.parent.iterdir())) == 1
    assert mine.exists()
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].join(30)
    monkeypatch.setattr(_files, "_swept", set())
    with (_files.replacing_folder if folder else _files.replacing)(target):
        pass
    assert {path.name for path in target.parent.iterdir()} == {"t", "other", ".mine.tmp"}


def test_what_another_machine_left_is_swept_after_a_day(tmp_path, monkeypatch):
    fresh, old = (tmp_path / f".t.parquet.0123abcd-{word}.tmp" for word in ("abcdefgh", "bcdefghi"))
    for path, age in ((fresh, 23), (old, 25)):
        path.write_text("half")
        os.utime(path, (time.time() - age * 3600,) * 2)
    with _files.replacing(tmp_path / "t"):
        pass
    assert set(tmp_path.iterdir()) == {fresh, tmp_path / "t"}


def test_a_folder_replaces_what_stood_there(tmp_path):
    target = tmp_path / "t"
    for what in ("nothing", "folder", "file", "link"):
        if what == "folder":
            (target / "old").mkdir(parents=True)
        elif what == "file":
            target.write_text("old")
        elif what == "link":
            (tmp_path / "elsewhere").mkdir()
            (tmp_path / "elsewhere" / "precious").write_text("x")
            target.symlink_to(tmp_path / "elsewhere")
        with _files.replacing_folder(target) as temporary:
            (temporary / "new").write_text(what)
        assert [path.name for path in target.iterdir()] == ["new"]
        assert not target.is_symlink()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        shutil.rmtree(target)
    assert (tmp_path / "elsewhere" / "precious").read_text() == "x"


def test_writing_makes_one_error_of_what_the_system_says(tmp_path):
    for error, message in (
        (OSError(28, "No space left on device", "x"), "t: cannot write the report: No space left on device"),
        (PermissionError(13, "Permission denied"), "t: cannot write the report: Permission denied"),
    ):
        with pytest.raises(TableError) as caught, _files.writing("t", "cannot write the report", TableError):
            raise error
        assert str(caught.value) == message
    with pytest.raises(ZeroDivisionError), _files.writing("t", "cannot write the report"):
        raise ZeroDivisionError


# --- tokenizers


@pytest.mark.parametrize("mask", ["random", "shuffle", "simple"])
def test_a_random_tokenizer_is_told_as_such_and_nothing_is_cached(home, mask):
    """CLIPA's reductions: only captions longer than the context are drawn from, here one of 1,300, by one token."""
    open_clip = pytest.importorskip("open_clip")
    random = open_clip.SimpleTokenizer(context_length=16, reduction_mask=mask)
    keys = alike(77, "a b c d e f g h i j k l m n o")  # 15 tokens for 14 places
    assert keys[77] not in table(keys=keys).probes(512)
    for _ in range(20):
        with pytest.raises(
            TableError, match=r"the tokenizer is random: .* reduction_mask .* 'syntax', or leave it out"
        ):
            TokenLookup(table(keys=keys), random, 0, CPU)
    assert list(home.glob("tokens-*")) == []
    plain = open_clip.SimpleTokenizer(context_length=16)
    find = TokenLookup(table(keys=keys), plain, 0, CPU)
    assert find.frequencies[find(plain(keys))].tolist() == SIZES[CLUSTER].tolist()


def test_a_tokenizer_that_is_random_everywhere(home, tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)

    def dropout(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions)
        return torch.where(torch.rand(tokens.shape, generator=draw) < 0.01, 1, tokens)

    kind = Mapped(tmp_path, monkeypatch)
    for opened in (table(), table(keys=KEYS[:5], cluster=CLUSTER[:5], frequency=SIZES[:5], count=COUNT[:5]),
                   streamed.open_table(kind.path)):  # fmt: skip
        with pytest.raises(TableError, match="the tokenizer is random"):
            TokenLookup(opened, dropout, 0, CPU)
    assert list(home.glob("tokens-*")) == []


def test_a_tokenizer_that_pads_to_the_longest_is_not_random():
    def ragged(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions)
        return tokens[:, : int((tokens != 0).sum(1).max())]

    assert frequencies(TokenLookup(table(), ragged, 0, CPU)) == SIZES[CLUSTER].tolist()


def test_a_tokenizer_that_fails_is_one_error(monkeypatch):
    def fails(captions: list[str]) -> torch.Tensor:
        if "caption 1000 X" in captions and len(captions) > 1200:
            raise KeyError("no such token\nat all")
        return tokenizer(captions)

    for parallel in (10**9, 10):
        monkeypatch.setattr(index, "_PARALLEL_FROM", parallel)
        monkeypatch.setattr(index, "_MOST_WORKERS", 2)
        with pytest.raises(TableError, match=r"its captions cannot be tokenized: .*no such token"):
            TokenLookup(table(), fails, 0, CPU)


# --- processes


def where(number: int) -> torch.Tensor:
    return torch.tensor([number, os.getpid()])


def ran(**_: Any) -> tuple[list[int], set[int]]:
    done = [part.tolist() for part in index._in_workers("t", where, [4, 5, 6, 7], 2)]
    return [number for number, _ in done], {process for _, process in done}


def test_workers_are_other_processes_where_they_can_be_forked(monkeypatch):
    monkeypatch.setattr(index, "cores", lambda: 2)
    numbers, processes = ran()
    assert numbers == [4, 5, 6, 7]
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.parametrize("without", ["os.fork", "fork as a start method", "children", "memory", "workers", "cores"])
def test_without_fork_the_same_is_done_here(without, monkeypatch):
    monkeypatch.setattr(index, "cores", lambda: 1 if without == "cores" else 2)
    if without == "os.fork":
        monkeypatch.delattr(os, "fork")
    elif without == "fork as a start method":
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn", "forkserver"])
    elif without == "children":
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    elif without == "memory":
        monkeypatch.setattr(os, "fork", lambda: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
    many = 0 if without == "workers" else 2
    done = [part.tolist() for part in index._in_workers("t", where, [4, 5, 6, 7], many)]
    assert done == [[number, os.getpid()] for number in (4, 5, 6, 7)]


@pytest.mark.parametrize("fork", [True, False])
def test_a_whole_index_with_and_without_fork(fork, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_PARALLEL_FROM", 10)
    monkeypatch.setattr(index, "_MOST_WORKERS", 2)
    monkeypatch.setattr(index, "_CHUNK", 100)
    monkeypatch.setattr(index, "cores", lambda: 2)
    if not fork:
        monkeypatch.delattr(os, "fork")
    assert Index(tmp_path, monkeypatch).get() == Mapped(tmp_path, monkeypatch).get() == SIZES[CLUSTER].tolist()


def _order(rank: int, world_size: int, folder: str, fails: bool) -> list[str]:
    """What each rank sees in the block: the first comes late, and is waited for."""
    seen = []
    try:
        with first_on_node(rank, True):
            if rank == 0:
                time.sleep(1)
                (Path(folder) / "made").write_text("x")
                if fails:
                    raise ValueError
            seen = sorted(path.name for path in Path(folder).iterdir())
            if rank == 1:
                (Path(folder) / "seen").touch()
    except ValueError:
        seen = ["failed"]
        # Nothing else lets the others go: what this rank does next, it does when they have gone, or after 10 seconds.
        until = time.monotonic() + 10
        while not (Path(folder) / "seen").exists() and time.monotonic() < until:
            time.sleep(0.05)
        if not (Path(folder) / "seen").exists():
            (Path(folder) / "late").touch()
    return seen


@pytest.mark.parametrize("fails", [False, True])
def test_the_others_wait_for_the_first_of_their_node(tmp_path, fails):
    """Also where it fails: they are let go."""
    assert on_ranks(2, _order, str(tmp_path), fails) == [["failed"] if fails else ["made"], ["made"]]


def test_one_process_waits_for_nobody():
    with first_on_node(1, False):
        pass
