"""``mmts cluster``: reading samples, building tables, and what it says when something is wrong."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmts_plugins.clustering import build, kmeans
from mmts_plugins.clustering.command import add_parser
from mmts_plugins.clustering.rows import Rows
from mmts_plugins.clustering.sources import Source, read_class_counts, read_embeddings, read_samples
from mmts_plugins.clusters import CAPTION, CLASS, ClusterTable
from mmts_plugins.errors import MMTSError

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


def test_csv_whose_rows_are_longer_than_the_header_shifts_as_in_openclip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "filepath,title\ni,one,two\nj,three,four\n")
    assert read_samples(Source(str(path), separator=",")).captions == ["two", "four"]


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


def test_text_keeps_every_line_and_counts_blank_ones(tmp_path: Path) -> None:
    samples = read_samples(Source(str(write(tmp_path / "a.txt", "one\n\ntwo\n"))))
    assert samples.captions == ["one", "", "two"]
    assert "1 samples have a blank caption" in samples.notes[0]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"url": ["u", "v"], "caption": ["a cat", None]}).to_parquet(path)
    samples = read_samples(Source(str(path)))
    assert (samples.captions, samples.column, len(samples.notes)) == (["a cat", "nan"], "caption", 1)


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
    assert "12 samples without" in samples.notes[0]
    assert "3 captions are not UTF-8" in samples.notes[1]


def test_webdataset_agrees_with_openclip_itself(tmp_path: Path) -> None:
    open_clip_data = pytest.importorskip("open_clip_train.data")
    path = make_tar(tmp_path / "0.tar", WEBDATASET)
    kept = filter(
        open_clip_data.filter_no_caption_or_no_image, open_clip_data.tarfile_to_samples_nothrow([{"url": str(path)}])
    )
    assert [s["txt"] for s in kept] == [b"\xc3\xa9 caption", b"upper case", b"\xff\xfe", b"first"]


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
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    check("cut.safetensors", "truncated")


def test_class_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", "class_id,count\n6_0,3\n007,2\nNA,5\nnone,0\n")
    ids, counts, notes = read_class_counts(str(path))
    assert (ids, counts.tolist(), len(notes)) == (["6_0", "007", "NA"], [3, 2, 5], 1)
    for text, message in (
        ("class,count\n1,2\n", "no column 'class_id'"),
        ("class_id,count\n1,x\n", "line 2: .*'x'"),
        ("class_id,count\n1,2\n1,3\n", "class '1' occurs more than once"),
        ("class_id,count\n", "no class"),
        ("", "cannot be read"),
    ):
        with pytest.raises(MMTSError, match=message):
            read_class_counts(str(write(tmp_path / "f.csv", text)))


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
        ((tsv, "--encoder", "tfidf"), ["6 distinct captions", "200 clusters", "-k/--clusters"]),
        ((tsv, "-k", 2, "--encoder", "./no-model"), ["./no-model", "--encoder tfidf", "--embeddings", "HF_HOME"]),
        ((tsv, "-k", 2, "--device", "cuda:99"), ["--device cuda:99 cannot be used"]),
        ((tsv, "-k", 2, "--embeddings", tmp_path / "e.npy"), ["3 rows", "7 captions"]),
        ((tsv, "-k", 2, "--embeddings", tmp_path / "same.npy"), ["only 1 of 2", "-k/--clusters"]),
        ((tsv, "--embeddings", tmp_path / "e.npy", "--encoder", "tfidf"), ["--encoder", "--embeddings"]),
        ((tsv, "--tensor", "x"), ["--tensor", "--embeddings"]),
        ((tsv, "--train-data", tsv), ["--train-data"]),
        ((tsv, "--class-counts", counts), ["DATA", "--class-counts"]),
        (("--class-counts", counts, "-k", 3), ["--clusters", "--class-counts"]),
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
        "from mmts_plugins.clustering.command import add_parser\n"
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
