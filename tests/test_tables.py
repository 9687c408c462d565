"""Cluster tables in files: what their hash covers, parts, tables of other tools and of earlier releases, damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmts_plugins.errors import ConfigError, TableError
from mmts_plugins.preview import named_table
from mmts_plugins.record import check_resume, write_record
from mmts_plugins.tables import ClusterTable, streamed
from mmts_plugins.tables import parts as table_parts

COLUMNS: dict[str, Any] = {
    "keys": ["a dog", "A cat", "zwei Vögel", ""],
    "cluster": [0, 0, 1, 2],
    "frequency": [5.0, 5.0, 3.25, 1.0],
    "count": [3, 2, 4, 1],
}
HASH = "e4a151f163d532a5995e02291605813d"
# Written by release 0.1, whose hash left the counts out.
OLD_HASH = "bcb9a9ea4bf3797f3dc1ee6991a38ee3"
OLD_INFO = {"clusters": 3, "content_hash": OLD_HASH, "encoder": "tfidf", "format": 1, "frequency_max": 5.0,
            "frequency_min": 1.0, "k": 3, "kind": "caption", "runs": 2, "samples": 10}  # fmt: skip
OLD_PARTS = ("a9ac0d14df742755bcacad4877d62bc2", "01b20dc3e6d3133e8673b5a8afb47922")


def made(**changes: Any) -> ClusterTable:
    return ClusterTable.build(**{**COLUMNS, **changes})


def arrow(rows: slice = slice(None), **changes: Any) -> pa.Table:
    columns = {**COLUMNS, **changes}
    return pa.table({"key" if name == "keys" else name: columns[name][rows] for name in columns})


def write(path: Path, table: pa.Table, info: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = info if isinstance(info, bytes) else json.dumps(info).encode()
    pq.write_table(table if info is None else table.replace_schema_metadata({b"mmts": raw}), path)
    return path


def in_parts(folder: Path, table: ClusterTable, cuts: list[int], word: str = "one") -> Path:
    ends = [0, *cuts, len(table)]
    for number, (low, high) in enumerate(zip(ends, ends[1:])):
        part = ClusterTable.build(table.keys.slice(low, high - low), table.cluster[low:high],
                                  table.frequency[low:high], table.count[low:high], table.kind)  # fmt: skip
        part.save(folder / f"part-{number}.parquet", {
            "clusters": table.clusters, "samples": table.samples, "parts": len(ends) - 1, "part": number, "table": word,
        })  # fmt: skip
    return folder


def old_parts(folder: Path) -> Path:
    for number, rows in enumerate((slice(0, 2), slice(2, 4))):
        info = {"clusters": 3, "content_hash": OLD_PARTS[number], "format": 1, "frequency_max": (5.0, 3.25)[number],
                "frequency_min": (5.0, 1.0)[number], "k": 3, "kind": "caption", "parts": 2, "runs": 2,
                "samples": 10}  # fmt: skip
        write(folder / f"part-{number:06d}.parquet", arrow(rows), info)
    return folder


@pytest.fixture(params=["loaded", "streamed"])
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways of reading a table: whole, and as one that is too large for that."""
    if request.param == "streamed":
        monkeypatch.setattr(streamed, "LARGE_FROM", 1)
    return streamed.open_table


def test_the_hash_is_the_one_that_is_documented():
    """One digest for each column, then one of those: written down here once more, from docs/cluster-tables.md."""
    text = [key.encode() for key in COLUMNS["keys"]]
    columns = [np.array([len(each) for each in text], "<i8").tobytes(), b"".join(text),
               np.array(COLUMNS["cluster"], "<i4").tobytes(), np.array(COLUMNS["frequency"], "<f8").tobytes(),
               np.array(COLUMNS["count"], "<i8").tobytes()]  # fmt: skip
    digests = b"".join(hashlib.blake2b(column, digest_size=16).digest() for column in columns)
    whole = hashlib.blake2b(b"caption" + digests, digest_size=16, person=b"mmts table 2")
    assert made().content_hash == whole.hexdigest() == HASH
    assert made().legacy_hash == OLD_HASH
    assert ClusterTable.build(["1", "2"], [0, 1], [5, 3], [5, 3], "class").legacy_hash == (
        "f6306456eeaa2d72c92eab79a7d40bb2"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": ["a dog", "A cat", "zwei Vögel", "x"]},
        {"keys": ["a dogA", " cat", "zwei Vögel", ""]},
        {"cluster": [0, 0, 1, 1]},
        {"frequency": [5.0, 5.0, 3.5, 1.0]},
        {"count": [2, 3, 4, 1]},
        {"kind": "class"},
        {name: [*COLUMNS[name][1:], COLUMNS[name][0]] for name in COLUMNS},
    ],
    ids=["key", "border", "cluster", "frequency", "count", "kind", "order"],
)
def test_the_hash_covers_each_thing_that_training_reads(changes):
    assert made(**changes).content_hash != made().content_hash


def test_the_hash_is_of_the_content_and_not_of_its_files(tmp_path, opened):
    made(info={"k": 3}).save(tmp_path / "t.parquet")
    for name in ("once", "twice"):
        ClusterTable.load(tmp_path / "t.parquet").save(tmp_path / f"{name}.parquet")
        assert opened(tmp_path / f"{name}.parquet").content_hash == HASH
    stored = pq.read_table(tmp_path / "t.parquet")
    pq.write_table(stored, tmp_path / "t.parquet", compression="none", row_group_size=1, use_dictionary=False)
    assert opened(tmp_path / "t.parquet").content_hash == HASH
    for cuts in ([1], [3], [1, 2, 3]):
        folder = in_parts(tmp_path / str(len(cuts) * 10 + cuts[0]), made(), cuts)
        table = opened(folder)
        assert (table.content_hash, table.legacy_hash, table.samples) == (HASH, OLD_HASH, 10)
    # A folder that is saved as a file is a table like any other.
    ClusterTable.load(folder).save(tmp_path / "joined.parquet")
    assert opened(tmp_path / "joined.parquet").content_hash == HASH
    assert pq.read_schema(tmp_path / "joined.parquet").metadata[b"mmts"].count(b"part") == 0


CHANGED = {"keys": "a cow", "cluster": 2, "frequency": 4.5, "count": 2}


# The hash of format 1 leaves the counts out; only their sum is known, see below.
@pytest.mark.parametrize(
    ("kind", "column"),
    [(kind, column) for kind in ("file", "parts", "old file", "old parts") for column in CHANGED
     if column != "count" or not kind.startswith("old")],
)  # fmt: skip
def test_a_changed_value_is_refused(tmp_path, opened, column, kind):
    if kind == "file":
        made().save(tmp_path / "t" / "part-0.parquet")
    elif kind == "parts":
        in_parts(tmp_path / "t", made(), [2])
    elif kind == "old file":
        write(tmp_path / "t" / "part-0.parquet", arrow(), OLD_INFO)
    else:
        old_parts(tmp_path / "t")
    assert opened(tmp_path / "t").content_hash == HASH
    part = sorted((tmp_path / "t").iterdir())[-1]
    stored = pq.read_table(part)
    name = "key" if column == "keys" else column
    values = stored[name].to_pylist()
    values[0] = CHANGED[column]
    place = stored.schema.get_field_index(name)
    pq.write_table(stored.set_column(place, stored.schema.field(place), pa.array(values, stored.schema.types[place])),
                   part)  # fmt: skip
    with pytest.raises(TableError, match="does not match its own hash"):
        opened(tmp_path / "t")


def test_tables_of_earlier_releases_are_read_and_their_runs_go_on(tmp_path, opened):
    single, folder = write(tmp_path / "t.parquet", arrow(), OLD_INFO), old_parts(tmp_path / "big")
    for path in (single, folder):
        table = opened(path)
        assert (table.content_hash, table.legacy_hash) == (HASH, OLD_HASH)
        assert {"k", "runs"} <= set(table.info)
        assert not {"format", "content_hash", "parts"} & set(table.info)
        record = tmp_path / "mmts.yaml"
        values = {"loss": "mmts-infonce", "clusters": "t", "table_hash": table.content_hash}
        write_record(record, {**values, "table_hash": OLD_HASH})
        check_resume(record, values, False, table)
        write_record(record, {**values, "table_hash": OLD_HASH.replace("b", "c")})
        with pytest.raises(ConfigError, match="table_hash was"):
            check_resume(record, values, False, table)
        for stated, found in ((OLD_HASH, True), (HASH, True), (OLD_HASH[::-1], False)):
            known, why = named_table({"clusters": str(path), "table_hash": stated}, record)
            assert (known is not None) == found, why
    # Their hash says nothing of the counts, but the sum of these is written down.
    write(single, arrow(count=[3, 2, 4, 2]), OLD_INFO)
    with pytest.raises(TableError, match="holds 11 samples, its metadata say 10"):
        opened(single)


def replaced(folder: Path, part: int, by: Path) -> None:
    shutil.copy(by, folder / f"part-{part}.parquet")


def other_table(folder: Path) -> None:
    other = in_parts(folder.parent / "other", made(cluster=[1, 1, 0, 2]), [2], "two")
    replaced(folder, 1, other / "part-1.parquet")


def same_part_twice(folder: Path) -> None:
    replaced(folder, 1, folder / "part-0.parquet")


def one_too_many(folder: Path) -> None:
    replaced(folder, 2, folder / "part-1.parquet")


def a_whole_table(folder: Path) -> None:
    made().save(folder / "part-1.parquet")


def two_whole_tables(folder: Path) -> None:
    made().save(folder / "part-0.parquet")
    made(keys=list("abcd")).save(folder / "part-1.parquet")


def another_tools(folder: Path) -> None:
    write(folder / "part-1.parquet", arrow(slice(2, 4)))


def an_old_one(folder: Path) -> None:
    replaced(folder, 1, old_parts(folder.parent / "old") / "part-000001.parquet")


def one_uncounted(folder: Path) -> None:
    write(folder / "part-0.parquet", arrow(slice(0, 2)))
    write(folder / "part-1.parquet", arrow(slice(2, 4)).drop_columns(["count"]))


def old_ones_of_another_seed(folder: Path) -> None:
    shutil.rmtree(folder)
    old_parts(folder)
    part = folder / "part-000001.parquet"
    info = json.loads(pq.read_schema(part).metadata[b"mmts"])
    write(part, arrow(slice(2, 4)), {**info, "runs": 3})


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (other_table, "part-0.parquet and part-1.parquet are of different tables: 'table' is 'one' and 'two'"),
        (same_part_twice, "a part is there twice"),
        (one_too_many, "holds 3 parts of a table of 2"),
        (a_whole_table, "are of different tables: 'parts' is 2 and None"),
        (two_whole_tables, "holds 2 whole tables"),
        (another_tools, "are of different tables"),
        (an_old_one, "are of different tables: 'format' is 2 and 1"),
        (one_uncounted, "part-1.parquet: column 'count' is missing, which part-0.parquet has"),
        (old_ones_of_another_seed, "are of different tables: 'runs' is 2 and 3"),
    ],
)
def test_a_folder_holds_the_parts_of_one_table(tmp_path, opened, mix, message):
    folder = in_parts(tmp_path / "t", made(), [2])
    assert opened(folder).content_hash == HASH
    mix(folder)
    with pytest.raises(TableError, match=message):
        opened(folder)


def test_a_killed_run_that_went_on_left_other_times_in_its_old_parts(tmp_path, opened):
    folder = old_parts(tmp_path / "big")
    part = folder / "part-000001.parquet"
    info = json.loads(pq.read_schema(part).metadata[b"mmts"])
    write(part, arrow(slice(2, 4)), {**info, "created": "2026-01-01", "versions": {"numpy": "3"}})
    assert opened(folder).content_hash == HASH


# --- tables of other tools


def dictionary(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, kind).dictionary_encode()


@pytest.mark.parametrize(
    "columns",
    [
        {"key": dictionary(COLUMNS["keys"], pa.string())},
        {"key": pa.array([key.encode() for key in COLUMNS["keys"]], pa.binary())},
        {"cluster": pa.array(COLUMNS["cluster"], pa.uint64())},
        {"cluster": pa.array(COLUMNS["cluster"], pa.float64())},
        {"frequency": pa.array(COLUMNS["frequency"], pa.float32())},
        {"count": pa.array(COLUMNS["count"], pa.int8())},
        {"count": dictionary(COLUMNS["count"], pa.int64())},
    ],
    ids=lambda columns: "-".join(f"{name} {array.type}" for name, array in columns.items()),
)
def test_columns_of_other_types_that_say_the_same(tmp_path, opened, columns):
    table = arrow()
    for name, array in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, array)
    assert opened(write(tmp_path / "t.parquet", table)).content_hash == HASH


def test_parts_may_be_empty_and_of_other_types(tmp_path, opened):
    write(tmp_path / "t" / "a.parquet", arrow(slice(0, 0)))
    write(tmp_path / "t" / "b.parquet", pa.table({name: pa.array([], pa.null()) for name in arrow().schema.names}))
    write(tmp_path / "t" / "c.parquet", arrow(slice(0, 3)))
    last = arrow(slice(3, 4))
    write(tmp_path / "t" / "d.parquet", last.set_column(0, "key", pa.array([""], pa.large_string())))
    table = opened(tmp_path / "t")
    assert (table.content_hash, len(table)) == (HASH, 4)
    assert {"a dog", ""} <= set(table.probes(8)) <= set(COLUMNS["keys"])


def test_an_empty_part_of_another_type(tmp_path, opened):
    write(tmp_path / "t" / "a.parquet", arrow(slice(0, 0)).set_column(1, "cluster", pa.array([], pa.date32())))
    write(tmp_path / "t" / "b.parquet", arrow())
    with pytest.raises(TableError, match=r"a\.parquet: column 'cluster' has the wrong type: 'date32.day.'"):
        opened(tmp_path / "t")


HUGE = 2**31 - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": [0, 1, 2, HUGE]}, "'cluster' holds 2147483647: clusters are to be numbered from 0 without gaps"),
        ({"cluster": [0, 1, 2, 2**24]}, "'cluster' holds 16777216"),
        ({"cluster": [0, 1, 2, 2**40]}, "wrong type"),
        ({"cluster": [0, 1, 2, -1]}, "'cluster' holds a negative number"),
        ({"cluster": [True, True, False, False]}, "'cluster' has the wrong type: 'bool'"),
        ({"cluster": ["0", "1", "2", "3"]}, "'cluster' has the wrong type: 'string'"),
        ({"cluster": [[0], [1], [2], [3]]}, "'cluster' has the wrong type"),
        ({"frequency": [1.0, float("nan"), 1.0, 1.0]}, "'frequency' must hold finite numbers above zero"),
        ({"frequency": [1.0, float("inf"), 1.0, 1.0]}, "'frequency' must hold finite numbers above zero"),
        ({"frequency": [1.0, 0.0, 1.0, 1.0]}, "'frequency' must hold finite numbers above zero"),
        ({"frequency": [1.0, 1e300, 1.0, 1.0]}, "too large for a number of samples"),
        ({"frequency": [2**60, 1, 1, 1]}, "'frequency' has the wrong type|too large for a number"),
        ({"count": [1, 1, 1, 0]}, "'count' must hold numbers of at least one"),
        ({"count": [1.5, 1, 1, 1]}, "'count' has the wrong type"),
        ({"count": [2**52, 2**52, 1, 1]}, "'count' adds up to more than 9007199254740992 samples"),
        ({"count": [2**62, 2**62, 2**62, 2**62]}, "'count' adds up to more than"),
        ({"count": [1, 1, 1, None]}, "'count' holds 1 empty cells"),
        ({"keys": ["a", "b", "c", None]}, "'key' holds 1 empty cells"),
        ({"keys": [1.0, 2.0, 3.0, 4.0]}, "'key' has the wrong type: 'double'"),
        ({"keys": [b"a", b"b", b"c", b"\xff"]}, "'key' has the wrong type"),
    ],
)
def test_numbers_that_no_table_holds(tmp_path, opened, changes, message):
    with pytest.raises(TableError, match=message):
        opened(write(tmp_path / "t.parquet", arrow(**changes)))


def test_no_number_per_cluster_before_the_clusters_are_counted(monkeypatch):
    """2^31 - 1 took 16 GiB, and so did the hash of a part."""
    monkeypatch.setattr(np, "bincount", lambda *_, **__: pytest.fail("counts densely"))
    table = made(cluster=[0, 1, 2, 2**24 - 1])
    assert (table.clusters, table.samples) == (2**24, 10)


def test_text_that_is_not_utf8(tmp_path, opened):
    path = write(tmp_path / "t.parquet", arrow())
    content = path.read_bytes()
    assert content.count("Vögel".encode()) >= 1
    path.write_bytes(content.replace("Vögel".encode(), b"V\xff\xffgel"))
    with pytest.raises(TableError, match="column 'key' is damaged"):
        opened(path)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (b"{", "metadata cannot be read"),
        (b"\xff\xfe", "metadata cannot be read"),
        (b"[1]", "metadata cannot be read: not a mapping"),
        (b"[" * 100_000, "metadata cannot be read: nested too deeply"),
        ({"format": 2, "deep": json.loads("[" * 20 + "]" * 20)}, "metadata cannot be read: nested too deeply"),
        (b'{"format": 1, "encoder": "\\ud800"}', "metadata cannot be read"),
        ({}, "'format' is None: it must be a whole number"),
        ({"format": "2"}, "'format' is '2': it must be a whole number"),
        ({"format": True}, "'format' is True: it must be a whole number"),
        ({"format": 10**400}, "'format' is <a whole number of 1329 bits>: too large"),
        ({"format": 0}, "'format' is 0: it must be 1 or above"),
        ({"format": 3}, r"written by a newer mmts-plugins \(format 3, this one reads 2\)"),
        ({"format": 2}, "does not match its own hash"),
        ({"format": 2, "content_hash": 7}, "'content_hash' is 7: it must be text"),
        ({"format": 2, "content_hash": HASH, "kind": "clas"}, "'kind' is 'clas'; did you mean class"),
        ({"format": 2, "content_hash": HASH, "kind": ["caption"]}, "'kind' is .'caption'.: it must be text"),
        ({"format": 2, "content_hash": HASH, "parts": "2"}, "'parts' is '2': it must be a whole number"),
        ({"format": 2, "content_hash": HASH, "parts": 2}, "holds 1 parts of a table of 2"),
        ({"format": 2, "content_hash": HASH, "samples": 11}, "holds 10 samples, its metadata say 11"),
        ({"format": 2, "content_hash": HASH, "stability": "steady"}, "'stability' is 'steady': it must be a mapping"),
        ({"format": 2, "content_hash": HASH, "runs": -1}, "'runs' is -1: it must be 1 or above"),
    ],
    ids=range(21),
)
def test_metadata_that_say_what_they_may_not(tmp_path, opened, info, message):
    with pytest.raises(TableError, match=message) as caught:
        opened(write(tmp_path / "t.parquet", arrow(), info))
    assert len(str(caught.value)) <= 480


def test_a_column_twice(tmp_path, opened):
    table = arrow()
    with pytest.raises(TableError, match="column 'count' is there 2 times"):
        opened(write(tmp_path / "t.parquet", table.append_column("count", table["count"])))


def test_what_is_no_file(tmp_path, opened):
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder" / "x.parquet").mkdir(parents=True)
    for path, message in (
        (tmp_path / "missing", "no such cluster table"),
        (tmp_path / "pipe", "pipe: not a file"),
        (tmp_path / "folder", r"x\.parquet: not a file"),
        (tmp_path / ("long" * 200), "File name too long"),
    ):
        with pytest.raises(TableError, match=message):
            opened(path)


def test_names_that_are_not_utf8_and_names_too_long(tmp_path, opened):
    import os

    path = tmp_path / os.fsdecode(b"t\xff.parquet")
    made().save(path)
    assert opened(path).content_hash == HASH
    longest = tmp_path / ("n" * 247 + ".parquet")  # the temporary file's name must not be longer
    made().save(longest)
    assert opened(longest).content_hash == HASH
    with pytest.raises(TableError, match="cannot write the cluster table: File name too long"):
        made().save(tmp_path / ("n" * 300))


def test_a_table_that_changes_while_it_is_read_in_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "LARGE_FROM", 1)
    path = tmp_path / "t.parquet"
    made().save(path)
    summary = streamed._summary

    def and_meanwhile(*args: Any) -> Any:
        made(frequency=[9.0, 8.0, 7.0, 6.0]).save(path)
        return summary(*args)

    monkeypatch.setattr(streamed, "_summary", and_meanwhile)
    with pytest.raises(TableError, match="changed while it was read"):
        streamed.open_table(path)
    assert not list((tmp_path / "cache" / "tables").glob("*.json"))


def test_thirds_of_frequencies_that_are_nearly_equal(tmp_path, opened):
    """Less than a 65,536th of the range lies between two of them."""
    made(keys=list("abc"), cluster=[0, 0, 0], frequency=[1.0, 1.00001, 2.0], count=[1, 1, 1]).save(tmp_path / "t")
    summary = opened(tmp_path / "t").summary
    assert summary[:2] + summary[3:] == (1.0, 2.0, 2.0, 1.00001, 1.0, 2.0, 1.00001)


def test_the_layout_is_the_one_that_is_documented(tmp_path):
    path = tmp_path / "t.parquet"
    made(info={"k": 3}).save(path)
    assert json.loads(pq.read_schema(path).metadata[b"mmts"]) == {
        "clusters": 3, "content_hash": HASH, "format": 2, "frequency_max": 5.0, "frequency_min": 1.0, "k": 3,
        "kind": "caption", "samples": 10,
    }  # fmt: skip
    assert table_parts.FORMAT == 2
