"""``mmts cluster``: reading samples, building tables, and what it says when something is wrong."""

from __future__ import annotations

import argparse
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from mmts_plugins.clustering import build, kmeans
from mmts_plugins.commands.cluster import add_parser
from mmts_plugins.data import captions, captions_parquet
from mmts_plugins.data.captions import caption_batches, left_out, read_samples, units
from mmts_plugins.data.classes import load_classes, read_class_counts
from mmts_plugins.data.embeddings import read_embeddings
from mmts_plugins.data.rows import Rows
from mmts_plugins.data.source import Source
from mmts_plugins.errors import MMTSError
from mmts_plugins.tables import CAPTION, CLASS, ClusterTable

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = [
    "a red dog",
    "a red dog runs",
    "two blue boats",
    "a blue boat",
    "the green tree",
    "green trees",
    "a red dog",
]


def cluster(*args: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["cluster", *map(str, args)])
    return parsed.run(parsed)


def refused(*args: object) -> str:
    with pytest.raises(MMTSError) as caught:
        cluster(*args)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    return write(tmp_path / "train.tsv", "filepath\ttitle\n" + "".join(f"i.jpg\t{text}\n" for text in CAPTIONS))


@pytest.fixture
def data() -> Path:
    folder = Path(os.environ.get("MMTS_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the evaluation data: no folder {folder}; set MMTS_DATA")
    return folder


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# --- sources


@pytest.mark.parametrize("cells", [["1", "007", "2"], ["1.0", "", "2"], ["True", "False", "True"], ["7", "x", "NA"]])
def test_csv_captions_are_those_of_openclip(tmp_path: Path, cells: list[str]) -> None:
    path = write(tmp_path / "a.csv", "filepath,title,other\n" + "".join(f"i,{cell},z\n" for cell in cells))
    expected = [str(value) for value in pd.read_csv(path, sep=",")["title"].tolist()]
    samples = read_samples(Source(str(path), separator=","))
    assert samples.captions == expected
    assert len(samples.notes) == (1 if "nan" in expected else 0)


HOSTILE = [
    'a "quoted" kite',
    '"a kite"',
    '"two, parts"',
    "007",
    "NA",
    "",
    " spaces ",
    "caf\u00e9",
    "\u2028",
    "1.50",
    "True",
    "a\rb",
    "x''y",
    "\ufeffz",
]


@pytest.mark.filterwarnings("ignore::pandas.errors.ParserWarning")  # of the host's own call
@pytest.mark.parametrize("separator", ["\t", "\\t", ",", ";", "\\|", "::", "[,;]", " "])
def test_csv_equals_what_openclip_itself_reads(tmp_path: Path, separator: str) -> None:
    data = pytest.importorskip("open_clip_train.data")
    written = {"\\t": "\t", "\\|": "|", "[,;]": ";"}.get(separator, separator)
    for texts in (HOSTILE, HOSTILE[:2], HOSTILE[3:4] * 3, HOSTILE[3:6], ["x y"] * (written != " ")):
        rows = [("filepath", "title"), *((f"{number}.jpg", text) for number, text in enumerate(texts))]
        path = tmp_path / "a.csv"
        path.write_bytes("".join(f"{name}{written}{text}\n" for name, text in rows).encode())
        try:
            theirs = data.CsvDataset(str(path), None, "filepath", "title", sep=separator).captions
        except Exception as error:
            with pytest.raises(MMTSError, match=re.escape(" ".join(str(error).split()))):
                read_samples(Source(str(path), separator=separator))
            continue
        if theirs:
            assert read_samples(Source(str(path), separator=separator)).captions == [str(x) for x in theirs]


def test_a_separator_of_two_characters_leaves_quotes_through_the_command(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'title\tfilepath\n"a kite"\t1.jpg\n"a ""red"" dog"\t2.jpg\na boat\t3.jpg\n')
    for flag, keys, noted in (
        (("--csv-separator", "\\t"), ['"a kite"', '"a ""red"" dog"', "a boat"], True),
        (("--separator", "\t"), ["a kite", 'a "red" dog', "a boat"], False),
        ((), ["a kite", 'a "red" dog', "a boat"], False),
    ):
        out = tmp_path / "t.parquet"
        cluster(path, "-o", out, "--encoder", "hashing", "-k", 2, "--force", *flag)
        assert ClusterTable.load(out).keys.to_pylist() == keys
        notes = read_samples(Source(str(path), separator=flag[1] if flag else "\t")).notes
        assert [("2 captions keep their quotes" in note) for note in notes] == [True] * noted


@pytest.mark.parametrize("captions", [True, False])
@pytest.mark.parametrize(
    "text", ["title,noun\nopen drawer,3\ntake plate, put cup,2\n", "title,noun\na,1\nb,2\nc,3,4,5\n"]
)
def test_a_row_that_is_too_long_is_the_error_of_pandas(tmp_path: Path, text: str, captions: bool) -> None:
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(pd.errors.ParserError) as theirs:
        pd.read_csv(path)
    with pytest.raises(MMTSError) as ours:
        read_samples(Source(str(path), separator=","), () if captions else ["noun"], captions)
    assert str(ours.value) == f"{path}: cannot be read as csv: {str(theirs.value).strip()}"


def test_csv_whose_rows_are_longer_than_the_header_shifts_as_in_openclip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "filepath,title\ni,one,two\nj,three,four\n")
    samples = read_samples(Source(str(path), separator=","))
    assert samples.captions == ["two", "four"]
    assert len(samples.notes) == 1
    assert "column 'filepath' holds the field after them" in samples.notes[0]


def test_labels_stay_as_written_and_a_column_that_is_caption_and_label_as_trained(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "title,noun\n1,007\n2,1.0\n")
    samples = read_samples(Source(str(path), separator=",", column="title"), ["noun"])
    assert (samples.captions, samples.labels) == (["1", "2"], ["007", "1.0"])
    path = write(tmp_path / "b.csv", "title\n007\n8\n")
    assert read_samples(Source(str(path), column="title"), ["title"]).captions == ["7", "8"]


def test_cells_with_line_breaks_are_counted(tmp_path: Path) -> None:
    rows = 'filepath\ttitle\n1.jpg\ta 7" pan\n"2.jpg\ta kite\n3.jpg\ta gate"\tone\n4.jpg\t"a\nboat"\n5.jpg\tx\n'
    samples = read_samples(Source(str(write(tmp_path / "a.tsv", rows))))
    assert samples.captions == ['a 7" pan', "one", "a\nboat", "x"]
    (note,) = samples.notes
    assert "2 cells hold line breaks: a stray quote?" in note


@pytest.mark.parametrize(
    ("text", "flags", "captions"),
    [
        ("1.jpg,a kite\n1.jpg,a 7 pan\n2.jpg,he said\n", "--no-header --column 1 --separator ,",
         ["a kite", "a 7 pan", "he said"]),
        ("picture,text\n1.jpg,a kite\n1.jpg,a boat\n", "--column text --separator ,", ["a kite", "a boat"]),
        ("a kite\t0.7\na boat\t0.2\n", "--no-header --column 1 --separator '\\t'", None),
    ],
)  # fmt: skip
def test_lines_of_a_table_are_not_captions(
    tmp_path: Path, text: str, flags: str, captions: Optional[list[str]]
) -> None:
    path = write(tmp_path / "lines.txt", text)
    with pytest.raises(MMTSError) as caught:
        read_samples(Source(str(path)))
    assert f"is a row of a table, such as {text.splitlines()[int('picture' in text[:7])]!r}" in str(caught.value)
    assert f"--format csv {flags};" in str(caught.value)
    given = dict(zip(*[iter(shlex.split(flags.replace("--no-header ", "")))] * 2))
    as_said = Source(str(path), "csv", given["--column"], given["--separator"], "--no-header" not in flags)
    if captions is not None:
        assert read_samples(as_said).captions == captions
    assert read_samples(Source(str(path), "text")).captions == text.splitlines()
    # Captions that name an image or hold a tab now and then are captions.
    mixed = write(tmp_path / "mixed.txt", text + "a dog\n" * 20)
    assert len(read_samples(Source(str(mixed))).captions) == text.count("\n") + 20
    two = write(tmp_path / "two.txt", "a kite\na\tboat\n")
    assert read_samples(Source(str(two))).captions == ["a kite", "a\tboat"]


def test_csv_without_a_header_goes_by_position(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "a cat\thttp://x\na dog\thttp://y\n")
    assert read_samples(Source(str(path), column="0", header=False)).captions == ["a cat", "a dog"]


def test_json_list_lines_and_lists_of_captions(tmp_path: Path) -> None:
    records = [{"desc": "one\u2028line"}, {"desc": ["two", "three"]}]
    whole = write(tmp_path / "a.json", json.dumps(records))
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n")
    for path in (whole, lines):
        samples = read_samples(Source(str(path)))
        assert samples.captions == ["one\u2028line", "two", "three"]
        assert samples.column == "desc"
    caption = write(tmp_path / "b.json", '[{"caption": "x"}]')
    assert read_samples(Source(str(caption))).captions == ["x"]


@pytest.mark.parametrize("escape", ["\\ud83d", "\\udfff", "\\ude00\\ud83d"])
def test_half_a_character_is_named_by_line_and_field(tmp_path: Path, escape: str) -> None:
    good = '{"caption": "a \\ud83d\\ude00 face", "label": 1}\n'
    path = write(tmp_path / "a.jsonl", good + f'{{"caption": "x {escape}", "label": 2}}\n')
    with pytest.raises(MMTSError, match=r"a\.jsonl: line 2: field 'caption' holds half a character, '\\ud"):
        read_samples(Source(str(path)))
    path = write(tmp_path / "b.json", json.dumps([{"caption": ["x", "y"]}])[:-3] + f', "{escape}"]}}]')
    with pytest.raises(MMTSError, match="record 1: field 'caption' holds half"):
        read_samples(Source(str(path)))
    path = write(tmp_path / "c.jsonl", f'{{"caption": "x", "label": "{escape}"}}\n')
    with pytest.raises(MMTSError, match="line 1: field 'label' holds half"):
        read_samples(Source(str(path)), ["label"])
    assert read_samples(Source(str(write(tmp_path / "d.jsonl", good)))).captions == ["a \U0001f600 face"]


def test_a_field_named_twice_is_noted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", '{"caption": "x", "caption": "y"}\n{"caption": "z"}\n{"caption": "w", "a": 1, "a": 2}'
    )
    samples = read_samples(Source(str(path)))
    assert samples.captions == ["y", "z", "w"]  # as json.load, and so VAST
    assert samples.notes == [f"{path}: 2 objects name a field twice; the last one counts, as in json.load"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("document", "where", "captions"),
    [
        ({"v_0": {"length": 1, "sentences": ["a", "b"]}, "v_1": {"sentences": ["c"], "length": 1}}, "'{}.sentences[]'",
         ["a", "b", "c"]),
        ({"meta": {"x": 1}, "items": [{"id": 0, "caption": "a"}, {"id": 1, "caption": "b"}]}, "'items[].caption'",
         ["a", "b"]),
        ({"data": {"v": {"clips": [{"sentence": "a"}]}, "w": {"clips": [{"sentence": "b"}]}}},
         "'data{}.clips[].sentence'", ["a", "b"]),
    ],
)  # fmt: skip
def test_one_object_around_all_captions_is_described(
    tmp_path: Path, document: object, where: str, captions: list[str], indent: Optional[int]
) -> None:
    path = write(tmp_path / "a.json", json.dumps(document, indent=indent))
    with pytest.raises(MMTSError) as caught:
        read_samples(Source(str(path)))
    assert f"is one JSON object of {', '.join(map(repr, list(document)[:10]))}" in str(caught.value)  # type: ignore[call-overload]
    assert f"may be read with: --column {where}" in str(caught.value)
    assert read_samples(Source(str(path), column=shlex.split(where)[0])).captions == captions


def test_one_record_alone_is_a_record(tmp_path: Path) -> None:
    assert read_samples(Source(str(write(tmp_path / "a.json", '{"caption": ["x", "y"]}')))).captions == ["x", "y"]
    with pytest.raises(MMTSError, match="no column 'desc' or 'caption' or another usual name; found: 'name', 'n'"):
        read_samples(Source(str(write(tmp_path / "b.json", '{"name": "x", "n": 1}\n'))))
    named = tmp_path / "c.parquet"
    pd.DataFrame({"": ["x"]}).to_parquet(named)
    assert both_engines(Source(str(named), column="")) == ["x"]


def test_compressed_text_and_json_are_read(tmp_path: Path) -> None:
    import pyarrow

    lines = '{"caption": "a \u00e9"}\n{"caption": "b"}\n'.encode()
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    for module, suffix in ((gzip, "gz"), (bz2, "bz2"), (lzma, "xz")):
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(module.compress(lines))
    for suffix in ("gz", "bz2", "xz", "zst"):
        path = tmp_path / f"a.jsonl.{suffix}"
        assert read_samples(Source(str(path))).captions == ["a \u00e9", "b"]
        assert len(read_samples(Source(str(path), "text")).captions) == 2
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(MMTSError, match=rf"a\.jsonl\.{suffix}: cannot be read as json"):
            read_samples(Source(str(path)))
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"title\nBZh is a caption\n"))
    assert read_samples(Source(str(tmp_path / "b.tsv.gz"))).captions == ["BZh is a caption"]  # by pandas
    assert read_samples(Source(str(write(tmp_path / "c.txt", "BZh9 is a caption\n")))).captions == ["BZh9 is a caption"]


@pytest.mark.parametrize(("kind", "start"), [("csv", "title\n"), ("text", ""), ("json", '{"desc": "x"}\n')])
@pytest.mark.parametrize(("codec", "name"), [("latin-1", "LATIN1"), ("utf-16", "UTF-16")])
def test_another_encoding_is_told_how_to_convert(tmp_path: Path, kind: str, start: str, codec: str, name: str) -> None:
    path = tmp_path / "my file.xyz"
    path.write_bytes((start + "caf\u00e9 by the canal\n").encode(codec))
    with pytest.raises(MMTSError, match=f"iconv -f {name} -t UTF-8 '.*my file.xyz' > utf8.xyz"):
        read_samples(Source(str(path), kind))
    path.write_bytes(b"\xef\xbb\xbf" + (start + ("x\n" if kind != "json" else "")).encode())
    assert read_samples(Source(str(path), kind)).captions == ["x"]


def test_whatever_a_parser_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tsv", "title\nx\n")
    for error in (
        RecursionError("x"),
        MemoryError(),
        AssertionError(),
        KeyError("k"),
        OSError(5, "Input/output error"),
    ):

        def fails(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(pd, "read_csv", fails)
            patch.setattr(csv, "DictReader", fails)
            with pytest.raises(MMTSError, match=r"a\.tsv: cannot be read as csv: "):
                read_samples(Source(str(path)))
            with pytest.raises(MMTSError, match=r"a\.tsv: cannot be read as a distribution of classes: "):
                read_class_counts(str(path))
    deep = write(tmp_path / "deep.json", "[" * 100_000)
    with pytest.raises(MMTSError, match=r"deep\.json: cannot be read as json: nested too deeply"):
        read_samples(Source(str(deep)))
    deep = write(tmp_path / "deep.jsonl", '{"caption": ' + "[" * 100_000)
    with pytest.raises(MMTSError, match=r"deep\.jsonl: cannot be read as json: nested too deeply"):
        read_samples(Source(str(deep)))
    with pytest.raises(MMTSError, match="cannot be read as json: "):
        read_samples(Source(str(write(tmp_path / "long.json", '[{"caption": ' + "9" * 5000 + "}]"))))


def test_text_keeps_every_line_and_counts_blank_ones(tmp_path: Path) -> None:
    samples = read_samples(Source(str(write(tmp_path / "a.txt", "one\n\ntwo\n"))))
    assert samples.captions == ["one", "", "two"]
    assert "1 samples have a blank caption" in samples.notes[0]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"url": ["u", "v"], "caption": ["a cat", None]}).to_parquet(path)
    samples = read_samples(Source(str(path)))
    assert (samples.captions, samples.column, len(samples.notes)) == (["a cat", "nan"], "caption", 1)


def both_engines(source: Source) -> list[str]:
    """The captions, the same from either engine."""
    captions = read_samples(source).captions
    assert [x for unit in units(source) for batch in caption_batches(source, unit) for x in batch] == captions
    return captions


def test_parquet_folders_and_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "data"
    for name in ("train-1.parquet", "train-0.parquet", ".hidden.parquet", "_temporary/x.parquet", "test.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"caption": [name, name]}).to_parquet(folder / name)
    write(tmp_path / "hub" / "README.md", "---")
    every = ["test.parquet"] * 2 + ["train-0.parquet"] * 2 + ["train-1.parquet"] * 2
    for data, expected in (
        ("hub", every),
        ("hub/data", every),
        ("hub/*/train*", every[2:]),
        ("hub/**/t*.parquet", every),
    ):
        kind = "auto" if data != "hub/*/train*" else "parquet"
        assert both_engines(Source(str(tmp_path / data), kind)) == expected
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty" / "a.bin", "")
    for data, message in (
        ("empty", r"without \*.parquet files \(it holds 'a.bin'\)"),
        ("no/*.parquet", "no such file"),
    ):
        with pytest.raises(MMTSError, match=message):
            read_samples(Source(str(tmp_path / data)))
    pd.DataFrame({"caption": ["x"]}).to_parquet(folder / "a.parquet")
    pd.DataFrame({"text": ["x"]}).to_parquet(folder / "b.parquet")
    with pytest.raises(MMTSError, match=r"b\.parquet: no column 'caption'"):
        read_samples(Source(str(folder)))


def test_a_list_of_captions_in_parquet_is_several_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = {"caption": [["a", "b"], [], ["c"], None, ["d", None, "e"]], "label": [1, 2, 3, 4, 5]}
    pd.DataFrame(rows).to_parquet(path)
    assert both_engines(Source(str(path))) == ["a", "b", "c", "d", "nan", "e"]
    assert read_samples(Source(str(path)), ["label"]).labels == ["1", "1", "3", "5", "5", "5"]
    pd.DataFrame({"caption": [{"a": 1}]}).to_parquet(path)
    with pytest.raises(MMTSError, match="column 'caption' holds struct<a: int64>, not text"):
        read_samples(Source(str(path)))


def test_downloads_that_failed_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    status = ["success", "failed_to_download", "success", None, "failed_to_resize"]
    rows = pd.DataFrame({"url": list("vwxyz"), "caption": list("abcde"), "status": status})
    for frame in (rows, rows.astype({"status": "category"})):
        frame.to_parquet(path)
        assert both_engines(Source(str(path))) == ["a", "c"]
        assert read_samples(Source(str(path)), ["url"]).labels == ["v", "x"]
        (note,) = read_samples(Source(str(path))).notes
        assert "3 rows whose status is not 'success' are left out" in note
        assert left_out(Source(str(path))) == note
    rows[rows.status != "success"].to_parquet(path)
    with pytest.raises(MMTSError, match=r"holds no samples .*; 3 rows whose status"):
        read_samples(Source(str(path)))
    rows.drop(columns="url").to_parquet(path)  # a status of something else
    assert both_engines(Source(str(path))) == list("abcde")
    assert left_out(Source(str(path))) is None


def test_units_of_parquet_cover_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions_parquet, "_UNIT", 5)
    for module in (captions, captions_parquet):
        monkeypatch.setattr(module, "BATCH", 3)
    texts = [f"caption {number}" for number in range(17)]
    pd.DataFrame({"caption": texts}).to_parquet(tmp_path / "a.parquet", row_group_size=2)
    source = Source(str(tmp_path / "a.parquet"))
    assert units(source) == [f"{source.data}#{first}-{last}" for first, last in ((0, 2), (3, 5), (6, 8))]
    assert both_engines(source) == texts
    both = [((f"{number}.jpg", b""), (f"{number}.txt", text.encode())) for number, text in enumerate(texts)]
    tar = make_tar(tmp_path / "0.tar", [member for sample in both for member in sample])
    assert [len(batch) for batch in caption_batches(Source(str(tar)), str(tar))] == [3, 3, 3, 3, 3, 2]
    assert both_engines(Source(str(tar))) == texts


WEBDATASET = [
    ("__meta__/x.txt", b"no"),
    ("d/0.jpg", b"\xff" * 3000),
    ("d/0.txt", "é caption".encode()),
    ("d/1.txt", b"no image"),
    ("d/2.webp", b"x"),
    ("d/2.json", b"{}"),
    ("d/3.seg.txt", b"not a caption"),
    ("d/3.png", b"x"),
    ("d/4.JPG", b"x"),
    ("d/4.TXT", b"upper case"),
    ("d/5.png", b"x"),
    ("d/5.txt", b"\xff\xfe"),
    ("e/6.png", b"x"),
    ("e/6.txt", b"first"),
    ("e/6.txt", b"again: the image went with the first"),
]


def test_webdataset_keeps_the_samples_that_openclip_keeps(tmp_path: Path) -> None:
    pytest.importorskip("braceexpand")
    for shard in range(2):
        make_tar(tmp_path / f"{shard}.tar", WEBDATASET)
    samples = read_samples(Source(f"{tmp_path}/{{0..1}}.tar::{tmp_path}/0.tar"))
    assert samples.captions == ["é caption", "upper case", "first"] * 3
    assert samples.left_out == {"samples without a .txt or an image": 12, "captions that are not UTF-8": 3}
    assert "8 samples without" in samples.notes[0]
    assert "2 captions are not UTF-8" in samples.notes[1]


def test_webdataset_agrees_with_openclip_itself(tmp_path: Path) -> None:
    open_clip_data = pytest.importorskip("open_clip_train.data")
    path = make_tar(tmp_path / "0.tar", WEBDATASET)
    kept = filter(
        open_clip_data.filter_no_caption_or_no_image, open_clip_data.tarfile_to_samples_nothrow([{"url": str(path)}])
    )
    theirs = [sample["txt"] for sample in kept]
    assert theirs == [b"\xc3\xa9 caption", b"upper case", b"\xff\xfe", b"first"]
    ours = read_samples(Source(str(path)))
    # OpenCLIP decodes after this filter, and leaves out what is not UTF-8 with a warning.
    assert [caption.encode() for caption in ours.captions] == [text for text in theirs if text != b"\xff\xfe"]
    assert ours.notes[1].endswith("1 captions are not UTF-8 and are left out, as in training")


def test_webdataset_keeps_every_kind_of_image_that_openclip_keeps(tmp_path: Path) -> None:
    keeps = pytest.importorskip("open_clip_train.data").filter_no_caption_or_no_image
    kinds = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "mp4", "json", "JPEG", "tiff"]
    members = [(f"{kind}.{suffix}", kind.encode()) for kind in kinds for suffix in (kind, "txt")]
    kept = [kind for kind in kinds if keeps({"txt": b"", kind.lower(): b""})]
    assert kept == ["png", "jpg", "jpeg", "webp", "JPEG"]
    assert read_samples(Source(str(make_tar(tmp_path / "0.tar", members)))).captions == kept


def test_captions_of_another_suffix_in_a_tar(tmp_path: Path) -> None:
    members = [
        (f"{number}.{suffix}", f"{suffix} {number}".encode())
        for number in range(3)
        for suffix in ("input.jpg", "outputs.TXT")
    ]
    path = make_tar(tmp_path / "0.tar", [*members, ("3.input.jpg", b"x")])
    with pytest.raises(MMTSError) as caught:
        read_samples(Source(str(path)))
    for part in ("none of 4 samples has a .txt and an image", "4 .input.jpg, 3 .outputs.txt", "--column SUFFIX"):
        assert part in str(caught.value)
    for column in ("outputs.txt", ".outputs.txt", "OUTPUTS.txt"):
        assert both_engines(Source(str(path), column=column)) == [f"outputs.TXT {number}" for number in range(3)]
    assert (
        "1 samples without a .outputs.txt are left out"
        in read_samples(Source(str(path), column="outputs.txt")).notes[0]
    )
    with pytest.raises(MMTSError, match=r"--column 0\.json: a \.json holds fields"):
        read_samples(Source(str(path), column="0.json"))
    with pytest.raises(MMTSError, match=r"none of 4 samples has a \.caption"):
        read_samples(Source(str(path), column="caption"))


@pytest.mark.parametrize("pax", [False, True])
def test_a_tar_that_sends_its_reader_back_is_refused(tmp_path: Path, pax: bool) -> None:
    back = tarfile.TarInfo("x")
    if pax:
        back.type, back.size = tarfile.XHDTYPE, 14
    block = bytearray(back.tobuf(tarfile.USTAR_FORMAT))
    after = b"14 size=-1024\n".ljust(512, b"\0") + tarfile.TarInfo("0.txt").tobuf(tarfile.USTAR_FORMAT)
    if not pax:
        block[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        after = b""
    first = tarfile.TarInfo("0.jpg").tobuf(tarfile.USTAR_FORMAT)
    path = tmp_path / "0.tar"
    path.write_bytes(first + bytes(block) + after + bytes(2048))
    with pytest.raises(
        MMTSError, match=r"0\.tar: cannot be read as a tar \(truncated or damaged\?\): a member of negative size"
    ):
        read_samples(Source(str(path)))


def test_webdataset_through_a_pipe(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    path = make_tar(tmp_path / "0.tar", WEBDATASET)
    assert read_samples(Source(f"pipe:cat {path}")).captions == ["é caption", "upper case", "first"]
    with pytest.raises(MMTSError, match=r"missing\.tar 2>/dev/null: cannot be read as a tar"):
        read_samples(Source(f"pipe:cat {tmp_path}/missing.tar 2>/dev/null"))


@pytest.mark.parametrize("cut", [700, 2000, 512 * 8, 512 * 9 + 100, 512 * 10])
@pytest.mark.parametrize("pipe", [False, True])
def test_a_truncated_tar_is_an_error_wherever_it_is_cut(tmp_path: Path, cut: int, pipe: bool) -> None:
    pytest.importorskip("webdataset")
    path = make_tar(tmp_path / "0.tar", WEBDATASET)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(MMTSError, match=r"0\.tar: cannot be read as a tar"):
        read_samples(Source(f"pipe:cat {path}" if pipe else str(path)))


def test_embeddings_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    points = np.arange(6, dtype=np.float16).reshape(3, 2)
    np.save(tmp_path / "a.npy", points)
    safetensors.save_file({"x": torch.tensor(points).bfloat16()}, tmp_path / "one.safetensors")
    safetensors.save_file({"x": torch.zeros(3, 1), "y": torch.tensor(points)}, tmp_path / "two.safetensors")
    for name, tensor in (("a.npy", None), ("one.safetensors", None), ("two.safetensors", "y")):
        assert np.array_equal(read_embeddings(str(tmp_path / name), tensor), points)
    for name, tensor, message in (
        ("two.safetensors", None, "2 tensors .*--tensor"),
        ("two.safetensors", "z", "no tensor 'z'"),
        ("a.npy", "y", "--tensor"),
        ("b.npy", None, "no such file"),
    ):
        with pytest.raises(MMTSError, match=message):
            read_embeddings(str(tmp_path / name), tensor)


def test_damaged_embeddings_are_one_clear_error(tmp_path: Path) -> None:
    def check(name: str, message: str) -> None:
        with pytest.raises(MMTSError, match=message) as caught:
            read_embeddings(str(tmp_path / name))
        assert name in str(caught.value)

    points = np.zeros((70000, 2), np.float32)
    points[69999, 1] = np.nan
    np.save(tmp_path / "nan.npy", points)
    check("nan.npy", "row 69999 .*NaN")
    points[69999, 1] = np.inf
    np.save(tmp_path / "half.npy", points.astype(np.float16))
    check("half.npy", "row 69999 .*infinity")
    for large in (-1e300, 2e12):
        wide = np.ones((3, 2))
        wide[1, 0] = large
        np.save(tmp_path / "large.npy", wide)
        check("large.npy", "row 1 .*square is too large")
    np.save(tmp_path / "least.npy", np.array([[1, np.iinfo(np.int64).min]]))
    check("least.npy", "row 0 .*square is too large")
    np.save(tmp_path / "flat.npy", points[:, 0])
    check("flat.npy", r"shape is \[70000\]")
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    check("objects.npy", "pickled")
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    check("words.npy", "expected one array of numbers")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "nan.npy").read_bytes()[:1000])
    check("cut.npy", "truncated")
    (tmp_path / "empty.npy").write_bytes(b"")
    check("empty.npy", "truncated")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }"
    (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\0" + (len(header) + 1).to_bytes(2, "little") + header + b"\n")
    check("huge.npy", "cannot be read as .npy")
    (tmp_path / "deep.npy").write_bytes(b"\x93NUMPY\x02\0" + (8000).to_bytes(4, "little") + b"(" * 7999 + b"\n")
    check("deep.npy", "cannot be read as .npy")
    safetensors = pytest.importorskip("safetensors.numpy")
    for name, array in (("bool", np.ones((2, 2), bool)), ("complex", np.ones((2, 2), np.complex64))):
        safetensors.save_file({"x": array}, tmp_path / f"{name}.safetensors")
        check(f"{name}.safetensors", f"holds an array of torch.{name}")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    check("cut.safetensors", "truncated")


def test_class_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", "class_id,count\n6_0,3\n007,2\nNA,5\nnone,0\n")
    ids, counts, notes = read_class_counts(str(path))
    assert (ids, counts.tolist(), len(notes)) == (["6_0", "007", "NA"], [3, 2, 5], 1)
    path = write(tmp_path / "zeros.csv", f"class_id,count\n1,{'0' * 30}7\n2,{2**53 - 7}\n")
    assert read_class_counts(str(path))[1].tolist() == [7, 2**53 - 7]
    for text, message in (
        ("class,count\n1,2\n", "column 'class_id' is missing .found: class, count"),
        ("class_id,count\n1,x\n", "line 2: .*'x'"),
        ("class_id,count\n1,2\n1,3\n", "class '1' occurs more than once"),
        ("class_id,count\n", "no class"),
        ("", "column 'class_id' is missing"),
        ('class_id,count\n1,"2\n3,4\n', "cannot be read as a distribution of classes: unexpected end of data"),
        ("class_id,count\n1\n", "line 2: the count of class '1' is ''"),
        ("class_id,count\n ,3\n", "line 2: no class_id"),
        ("class_id,count\n1,2,3\n", "line 2: has more fields than the header 'class_id', 'count'"),
        ("class_id,count\n1,2\n3,1,234\n", "line 3: has more fields than the header"),
        ("class_id,count\n1," + "9" * 5000 + "\n", "line 2: .*too large"),
        (f"class_id,count\n1,{2**53 + 1}\n", "line 2: .*too large"),
        (f"class_id,count\n1,{2**53}\n2,1\n", "the counts add up to 9007199254740993: too large"),
    ):
        with pytest.raises(MMTSError, match=message):
            read_class_counts(str(write(tmp_path / "f.csv", text)))


def test_a_file_of_counts_and_the_table_made_of_it_have_one_hash(tmp_path: Path) -> None:
    counts = write(tmp_path / "counts.csv", "class_id,count\n7,3\n10,40\n0,5\n")
    cluster("--class-counts", counts, "-o", tmp_path / "counts.parquet")
    labels = write(tmp_path / "labels.csv", "noun\n" + "7\n" * 3 + "10\n" * 40 + "0\n" * 5)
    cluster(labels, "--separator", ",", "--label-column", "noun", "-o", tmp_path / "labels.parquet")
    in_training = load_classes(str(counts))
    # As runs recorded it before there was one reader.
    assert in_training.content_hash == "be0aa1987af3d32e4f65fea97619644b"
    for made in (tmp_path / "counts.parquet", tmp_path / "labels.parquet"):
        assert ClusterTable.load(made).content_hash == in_training.content_hash


# --- building


def test_majority_ties_go_to_the_first_seen() -> None:
    groups = np.array([0, 0, 1, 1, 1, 2])
    values = np.array([5, 3, 1, 2, 2, 4])
    chosen, several = build.majority(groups, values)
    assert (chosen.tolist(), several) == ([5, 2, 4], 2)


def test_clusters_are_numbered_by_descending_size_and_ties_stay() -> None:
    assert build.by_size(np.array([4, 0, 2, 2, 0, 3]), np.array([9, 1, 1, 1, 1, 1])).tolist() == [0, 1, 2, 2, 1, 3]


def test_kmeans_finds_separate_blobs_and_weighs_by_count() -> None:
    centres = np.eye(4, dtype=np.float32) * 50
    points = np.repeat(centres, 5, axis=0) + np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    weight = np.repeat([1.0, 2.0, 3.0, 4.0], 5)
    result = kmeans.cluster(Rows(points), weight, 4, runs=3)
    assert result.frequency.tolist() == np.repeat([5.0, 10.0, 15.0, 20.0], 5).tolist()
    assert len(np.unique(result.cluster)) == 4


def test_frequency_is_the_mean_over_single_runs() -> None:
    points = Rows(np.random.default_rng(0).normal(size=(300, 8)))
    weight = np.arange(1.0, 301.0)
    single = [kmeans.cluster(points, weight, 20, seed=seed) for seed in (3, 4)]
    both = kmeans.cluster(points, weight, 20, runs=2, seed=3)
    assert np.array_equal(both.cluster, single[0].cluster)
    assert np.allclose(both.frequency, (single[0].frequency + single[1].frequency) / 2)


# --- the command


def test_tfidf_table_and_summary(tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my table.parquet"
    assert cluster(tsv, "-o", out, "--encoder", "tfidf", "-k", 3) == 0
    table = ClusterTable.load(out)
    assert table.kind == CAPTION
    assert table.keys.to_pylist() == list(dict.fromkeys(CAPTIONS))
    assert table.count.tolist() == [2, 1, 1, 1, 1, 1]
    assert table.sizes.tolist() == sorted(table.sizes, reverse=True)
    assert np.array_equal(table.frequency, table.sizes[table.cluster])
    assert table.info["source"] == "train.tsv"
    assert {"k", "encoder", "seed", "runs", "column", "unique", "duplicates", "versions", "created"} <= set(table.info)
    printed = capsys.readouterr().out
    assert "6  (1 duplicates)" in printed
    assert "a red dog" in printed
    assert f"--loss mmts --mmts-clusters '{out}'" in printed


def test_same_input_and_seed_give_the_same_content(tsv: Path, tmp_path: Path) -> None:
    def make(name: str, *flags: object) -> str:
        cluster(tsv, "-o", tmp_path / name, "--encoder", "tfidf", "-k", 3, *flags)
        return ClusterTable.load(tmp_path / name).content_hash

    assert make("a.parquet", "--runs", 2) == make("b.parquet", "--runs", 2)


def test_flags_of_openclip_can_be_pasted(tsv: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    cluster("--train-data", tsv, "--dataset-type", "csv", "--csv-separator", "\\t", "--csv-caption-key", "title",
            "--encoder", "tfidf", "-k", 2, "-o", out)  # fmt: skip
    assert len(ClusterTable.load(out)) == 6


def test_embeddings_are_rows_of_samples(tsv: Path, tmp_path: Path) -> None:
    # The two "a red dog" rows (first and last) lie in different clusters, of 4 and of 3 samples.
    points = np.array([[0.0], [0.1], [0.2], [0.3], [9.0], [9.1], [9.2]])
    np.save(tmp_path / "e.npy", points)
    out = tmp_path / "t.parquet"
    cluster(tsv, "--embeddings", tmp_path / "e.npy", "-k", 2, "-o", out)
    table = ClusterTable.load(out)
    assert table.frequency.tolist() == [3.5, 4, 4, 4, 3, 3]
    assert table.cluster.tolist() == [0, 0, 0, 0, 1, 1]
    assert table.info["encoder"] == "embeddings e.npy"


def test_label_tables(tmp_path: Path) -> None:
    rows = "verb,noun,narration\n1,07,cut\n1,07,cut\n2,3,cut\n2,3,mix\n1,3,stir\n"
    path = write(tmp_path / "a.csv", rows)
    out = tmp_path / "t.parquet"
    cluster(path, "--separator", ",", "--label-column", "verb,noun", "-o", out)
    table = ClusterTable.load(out)
    assert table.kind == CLASS
    assert dict(zip(table.keys.to_pylist(), table.frequency)) == {"1_07": 2, "2_3": 2, "1_3": 1}
    cluster(path, "--separator", ",", "--label-column", "noun", "--column", "narration", "-o", out, "--force")
    table = ClusterTable.load(out)
    assert table.kind == CAPTION
    assert list(zip(table.keys.to_pylist(), table.frequency, table.count)) == [("cut", 2, 3), ("mix", 3, 1), ("stir", 3, 1)]  # fmt: skip # noqa: E501
    records = [{"desc": ["a", "b"], "label": 3}, {"desc": "c", "label": 4}]
    cluster(write(tmp_path / "a.json", json.dumps(records)), "--column", "desc", "--label-column", "label",
            "-o", out, "--force")  # fmt: skip
    assert ClusterTable.load(out).frequency.tolist() == [2, 2, 1]


def test_a_local_model_with_mean_pooling(tsv: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "tiny"
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "red",
        "dog",
        "runs",
        "blue",
        "boat",
        "green",
        "tree",
    ]
    folder.mkdir()
    write(folder / "vocab.txt", "\n".join(vocabulary))
    write(folder / "tokenizer_config.json", '{"tokenizer_class": "BertTokenizer", "model_max_length": 32}')
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(folder)
    out = tmp_path / "t.parquet"
    cluster(tsv, "--encoder", f"hf:{folder}", "--device", "cpu", "-k", 2, "-o", out)
    assert ClusterTable.load(out).info["encoder"] == "hf:tiny"


def test_errors_name_the_cause_and_the_way_out(tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "t.parquet"
    comma = write(tmp_path / "c.csv", "filepath,title\ni,x\n")
    counts = write(tmp_path / "n.csv", "class_id,count\n1,2\n")
    gap = write(tmp_path / "g.csv", "title,noun\nx,1\ny,\n")
    np.save(tmp_path / "e.npy", np.zeros((3, 2)))
    np.save(tmp_path / "same.npy", np.zeros((7, 2)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    for args, expected in (
        ((), ["no captions given"]),
        ((tmp_path / "no.tsv",), ["no.tsv", "no such file"]),
        ((tmp_path / "no.xyz",), ["'.xyz'", "--format"]),
        ((tmp_path / "{0..1}.tar",), ["0.tar", "quote the pattern"]),
        ((tmp_path / "{0..1.tar",), ["braces"]),
        ((comma,), ["c.csv", "--separator ','"]),
        ((tsv, "--column", "text"), ["'text'", "'title'"]),
        ((write(tmp_path / "e.tsv", ""),), ["e.tsv", "cannot be read as csv"]),
        ((write(tmp_path / "h.tsv", "title\n"),), ["holds no samples"]),
        ((write(tmp_path / "a.json", '[{"x": 1}]'),), ["'desc' or 'caption'", "'x'", "--column"]),
        ((write(tmp_path / "b.json", '{"desc": "x"}\n{"de'),), ["line 2"]),
        ((write(tmp_path / "c.json", '[{"desc": 1}]'),), ["record 1", "not text but 1"]),
        ((write(tmp_path / "c.parquet", "x"),), ["c.parquet", "parquet"]),
        ((tsv, "--encoder", "tfidf"), ["6 distinct captions", "200 clusters", "lower -k "]),
        ((tsv, "-k", 2, "--encoder", "./no-model"), ["./no-model", "--encoder tfidf", "--embeddings", "HF_HOME"]),
        ((tsv, "-k", 2, "--device", "cuda:99"), ["--device cuda:99 cannot be used"]),
        ((tsv, "-k", 2, "--embeddings", tmp_path / "e.npy"), ["3 rows", "7 captions"]),
        ((tsv, "-k", 2, "--embeddings", tmp_path / "same.npy"), ["only 1 of 2", "lower -k "]),
        ((tsv, "--embeddings", tmp_path / "e.npy", "--encoder", "tfidf"), ["--encoder", "--embeddings"]),
        ((tsv, "--tensor", "x"), ["--tensor", "--embeddings"]),
        ((tsv, "--train-data", tsv), ["--train-data"]),
        ((tsv, "--class-counts", counts), ["DATA", "--class-counts"]),
        (("--class-counts", counts, "-k", 3), ["-k has no effect", "--class-counts"]),
        (("--class-counts", counts, "--clusters", 3), ["-k has no effect", "--class-counts"]),
        (("--class-counts", counts, "--seed", 0), ["--seed has no effect", "--class-counts"]),
        ((gap, "--separator", ",", "--label-column", "verb"), ["'verb'", "--label-column", "'noun'"]),
        ((gap, "--separator", ",", "--label-column", "noun"), ["sample 2", "'noun'"]),
        ((write(tmp_path / "a.txt", "x"), "--label-column", "noun"), ["--label-column", "text"]),
    ):
        message = refused(*args, "-o", out)
        assert all(part in message for part in expected), message
        assert not out.exists()


def test_the_output_is_checked_before_the_work(tsv: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.tsv"  # reading it would be another error
    out = write(tmp_path / "t.parquet", "precious")
    assert "--force" in refused(missing, "-o", out)
    assert "is a folder" in refused(missing, "-o", tmp_path)
    assert "not a writable folder" in refused(missing, "-o", out / "x.parquet")
    assert out.read_text() == "precious"
    cluster(tsv, "-o", out, "--force", "--encoder", "tfidf", "-k", 2)
    assert len(ClusterTable.load(out)) == 6


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, argparse\n"
        "from mmts_plugins.commands.cluster import add_parser\n"
        "print(add_parser(argparse.ArgumentParser().add_subparsers()).format_help())\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'sklearn', 'pyarrow', 'sentence_transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("[]\n")
    assert "examples:" in done.stdout


@pytest.mark.parametrize("what", ["noun", "verb", "verb_noun"])
def test_ek100_labels_give_the_counts_that_the_authors_publish(data: Path, tmp_path: Path, what: str) -> None:
    published, counted = tmp_path / "p.parquet", tmp_path / "c.parquet"
    cluster("--class-counts", data / "ek100" / f"ek100_{what}_freq.csv", "-o", published)
    columns = {"noun": "noun_class", "verb": "verb_class", "verb_noun": "verb_class,noun_class"}[what]
    annotations = data / "ek100" / "train_narrations_partly_imputed.csv"
    cluster(annotations, "--separator", ",", "--label-column", columns, "-o", counted)
    tables = [ClusterTable.load(path) for path in (published, counted)]
    one, other = (dict(zip(table.keys.to_pylist(), table.frequency)) for table in tables)
    assert one == other


def test_youcook2_captions(data: Path) -> None:
    samples = read_samples(Source(str(data / "youcook2" / "descs_cap_train.json")))
    keys, rows = build.distinct(samples.captions)
    assert (len(rows), len(keys)) == (9283, 8888)
