"""Forms of caption files: each written here by its published layout, with counts made apart; and where files are."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Optional

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPOSITORY, shared_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmts_plugins.cli import main
from mmts_plugins.data import encoders, forms, json_stream
from mmts_plugins.data.captions import caption_batches, read_samples, told, units
from mmts_plugins.data.source import Source, weights_of
from mmts_plugins.errors import ConfigError, MMTSError, TableError
from mmts_plugins.evaluation import sets
from mmts_plugins.hosts import Adapter, Facts, Preset, Session
from mmts_plugins.options import split_flags
from mmts_plugins.tables import ClusterTable, open_table, remote

A, B, C, D = "a grey donkey at a gate", "two rowers lift a boat", "someone folds dumplings", "a kite on a string"


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def both_engines(source: Source) -> list[str]:
    captions = read_samples(source).captions
    assert [x for unit in units(source) for batch in caption_batches(source, unit) for x in batch] == captions
    return captions


COCO = {"info": {"year": 2017, "description": "COCO"}, "licenses": [{"id": 1, "name": "x"}],
        "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg"}],
        "annotations": [{"image_id": 9, "id": 1, "caption": A}, {"image_id": 25, "id": 2, "caption": B},
                        {"image_id": 9, "id": 3, "caption": C}]}  # fmt: skip
KARPATHY = {"dataset": "flickr8k", "images": [
    {"sentids": [0, 1], "imgid": 0, "split": "train", "filename": "0.jpg",
     "sentences": [{"tokens": ["a"], "raw": A, "imgid": 0, "sentid": 0}, {"tokens": ["b"], "raw": B, "sentid": 1}]},
    {"sentids": [2], "imgid": 1, "split": "restval", "filename": "1.jpg", "sentences": [{"raw": C, "tokens": []}]},
    {"sentids": [3], "imgid": 2, "split": "test", "filename": "2.jpg", "sentences": [{"raw": D, "tokens": []}]},
]}  # fmt: skip
MSRVTT = {"info": {"version": "1.0"}, "videos": [{"video_id": "video0", "split": "train", "category": 9},
                                                  {"video_id": "video1", "split": "validate", "category": 3}],
          "sentences": [{"caption": A, "video_id": "video0", "sen_id": 0}, {"caption": B, "video_id": "video1"},
                        {"caption": C, "video_id": "video0", "sen_id": 2}]}  # fmt: skip
YOUCOOK2 = {"database": {
    "GLd3aX16zBg": {"duration": 241.6, "subset": "training", "recipe_type": "113", "annotations": [
        {"segment": [90, 102], "id": 0, "sentence": A}, {"segment": [114, 127], "id": 1, "sentence": B}]},
    "xHr8X2Wpmno": {"duration": 1.0, "subset": "validation", "annotations": [
        {"segment": [0, 1], "sentence": C}]}}}  # fmt: skip
LLAVA = [{"id": "1", "image": "1.jpg", "conversations": [
    {"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": A}]},
    {"id": "2", "image": "2.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": B}, {"from": "human", "value": "And?"},
        {"from": "gpt", "value": C}]}]  # fmt: skip
VATEX = [{"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": [A, B], "chCap": ["一个小男孩", "两个人"]},
         {"videoID": "x", "enCap": [C], "chCap": ["一只风筝"]}]  # fmt: skip
SSV2 = [{"id": "78687", "label": "holding potato next to vicks",
         "template": "Holding [something] next to [something]",
         "placeholders": ["potato", "vicks"]},
        {"id": "42326", "label": A, "template": A, "placeholders": []}]  # fmt: skip
DIDEMO = [{"annotation_id": 1, "description": A, "video": "x.mov", "times": [[0, 0]], "num_segments": 6},
          {"annotation_id": 2, "description": B, "video": "y.mov", "times": [[1, 1]], "num_segments": 6}]  # fmt: skip
ACTIVITYNET = {"v_QOlSCBRmfWY": {"duration": 82.7, "timestamps": [[0.8, 19.9], [17.3, 60.8]], "sentences": [A, B]},
               "v_x": {"duration": 1.0, "timestamps": [[0, 1]], "sentences": [C]}}  # fmt: skip
HOWTO100M = {"fqwe": {"start": [0.1, 2.0], "end": [2.0, 3.1], "text": [A, B]},
             "abcd": {"start": [0], "end": [1], "text": [C]}}  # fmt: skip
XM3600 = "\n".join(json.dumps(each, ensure_ascii=False) for each in (
    {"image/key": "0001", "image/locale": "en", "en": {"caption": [A, B]}, "de": {"caption": ["ein Esel"]}},
    {"image/key": "0002", "image/locale": "de", "en": {"caption": [C]},
     "de": {"caption": ["ein Boot", "Wasser"]}}))  # fmt: skip
TOKENS = f'1.jpg#0\t{A}\n1.jpg#1\t{B} , "so" he said\n2.jpg#0\t{C}\n'
PIPES = f"image_name| comment_number| comment\n1.jpg| 0| {A}\n1.jpg| 1| {B}\n2.jpg| 0| {C}\n"
KAGGLES = f'image,caption\n1.jpg,{A}\n1.jpg,"{B} , he said"\n2.jpg,{C}\n'
CHARADES = f"AO8RW 0.0 6.9##{A}\nAO8RW 2.1 6.9##{B}\nY6R7T 20.8 30##{C}\n"
CC3M = f'{A}\thttp://x.com/1.jpg\n{B} "so\thttps://x.com/2.jpg\n{C}\thttp://x.com/3.jpg\n'
CC12M = f'http://x.com/1.jpg\t{A}\nhttps://x.com/2.jpg\t{B} "so\nhttp://x.com/3.jpg\t{C}\n'
URLS = ["http://x.com/1.jpg", "https://x.com/2.jpg", "http://x.com/3.jpg"]

# name of the form, the file as it is published, its content, its captions, and the images that it names
PUBLISHED: dict[str, tuple[str, Any, list[str], list[str]]] = {
    "coco": ("captions_train2017.json", COCO, [A, B, C], [f"0000000000{n}.jpg" for n in ("09", "25", "09")]),
    "karpathy": ("dataset_flickr8k.json", KARPATHY, [A, B, C], ["0.jpg", "0.jpg", "1.jpg"]),
    "msrvtt": ("train_val_videodatainfo.json", MSRVTT, [A, C], ["video0", "video0"]),
    "youcook2": ("youcookii_annotations_trainval.json", YOUCOOK2, [A, B], ["GLd3aX16zBg"] * 2),
    "llava": ("blip_laion_cc_sbu_558k.json", LLAVA, [A, B, C], ["1.jpg", "2.jpg", "2.jpg"]),
    "vatex": ("vatex_training_v1.0.json", VATEX, [A, B, C], ["Ptf_2VRj-V0_000122_000132"] * 2 + ["x"]),
    "ssv2": ("something-something-v2-train.json", SSV2, ["holding potato next to vicks", A], ["78687", "42326"]),
    "didemo": ("train_data.json", DIDEMO, [A, B], ["x.mov", "y.mov"]),
    "activitynet": ("train.json", ACTIVITYNET, [A, B, C], ["v_QOlSCBRmfWY"] * 2 + ["v_x"]),
    "howto100m": ("caption.json", HOWTO100M, [A, B, C], ["fqwe", "fqwe", "abcd"]),
    "xm3600": ("captions.jsonl", XM3600, [A, B, C], ["0001", "0001", "0002"]),
    "captions": ("captions.json", {"1.jpg": A, "2.jpg": [B, C]}, [A, B, C], ["1.jpg", "2.jpg", "2.jpg"]),
    "list": ("captions.json", [A, B, C], [A, B, C], []),
    "flickr8k": ("Flickr8k.token.txt", TOKENS, [A, f'{B} , "so" he said', C], ["1.jpg", "1.jpg", "2.jpg"]),
    "flickr30k": ("results.csv", PIPES, [A, B, C], ["1.jpg", "1.jpg", "2.jpg"]),
    "kaggle": ("captions.txt", KAGGLES, [A, f"{B} , he said", C], []),
    "charades-sta": ("charades_sta_train.txt", CHARADES, [A, B, C], ["AO8RW", "AO8RW", "Y6R7T"]),
    "cc3m": ("Train_GCC-training.tsv", CC3M, [A, f'{B} "so', C], URLS),
    "cc12m": ("cc12m.tsv", CC12M, [A, f'{B} "so', C], URLS),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_form_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    file, content, captions, images = PUBLISHED[name]
    path = write(tmp_path / file, content)
    samples = read_samples(Source(str(path)))
    assert samples.form == name
    assert samples.captions == captions
    assert samples.images == images
    assert f"as {name}" in told(Source(str(path)), samples)
    # By its name, whatever the file is called; indented, compressed, and from the engine that reads files apart.
    other = write(tmp_path / "x" / "file.dat", content)
    assert read_samples(Source(str(other), name)).captions == captions
    if not isinstance(content, str):
        pretty = write(tmp_path / "pretty.json", json.dumps(content, indent=2))
        assert both_engines(Source(str(pretty))) == captions
    packed = tmp_path / f"{file}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_samples(Source(str(packed))).captions == captions


@pytest.mark.parametrize("name", [form.name for form in forms.FORMS if form.name != "xm3600"])
def test_a_large_document_is_read_a_record_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content, captions, images = PUBLISHED[name]
    monkeypatch.setattr(json_stream, "LARGE", 10)

    def small(text: str, real: Any = json.loads, **given: Any) -> Any:
        assert len(text) < 99, "a whole document is held"
        return real(text, **given)

    monkeypatch.setattr(json, "loads", small)
    path = write(tmp_path / file, json.dumps(content, indent=1))
    samples = read_samples(Source(str(path)))
    assert (samples.form, samples.captions, samples.images) == (name, captions, images)
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_samples(Source(str(packed), name)).captions == captions


def test_every_form_has_such_a_file() -> None:
    assert set(PUBLISHED) == set(forms.NAMES)


@pytest.mark.parametrize(
    ("name", "flags", "captions"),
    [
        ("karpathy", {"split": "test"}, [D]),
        ("karpathy", {"split": "train,test"}, [A, B, D]),
        ("karpathy", {"split": "all"}, [A, B, C, D]),
        ("msrvtt", {"split": "validate"}, [B]),
        ("youcook2", {"split": "validation"}, [C]),
        ("vatex", {"column": "chCap"}, ["一个小男孩", "两个人", "一只风筝"]),
        ("xm3600", {"column": "de.caption"}, ["ein Esel", "ein Boot", "Wasser"]),
        ("coco", {"column": "annotations[].caption"}, [A, B, C]),
        ("youcook2", {"column": "database{}.annotations[].sentence"}, [A, B, C]),
        ("llava", {"column": "conversations[from=human].value"}, ["Describe it.\n<image>", "<image>\nWhat?", "And?"]),
        ("ssv2", {"column": "template"}, ["Holding [something] next to [something]", A]),
    ],
)  # fmt: skip
def test_another_split_field_or_path(name: str, flags: dict[str, str], captions: list[str], tmp_path: Path) -> None:
    file, content, *_ = PUBLISHED[name]
    assert read_samples(Source(str(write(tmp_path / file, content)), **flags)).captions == captions


def test_splits_are_told(tmp_path: Path) -> None:
    source = Source(str(write(tmp_path / "k.json", KARPATHY)))
    samples = read_samples(source)
    assert samples.how["split"] == "train,restval"
    assert samples.left_out == {"records of other splits": 1}
    assert "split train,restval, 3 captions, 1 records of other splits left out" in told(source, samples)
    with pytest.raises(ConfigError, match=r"no split 'val' \(--split\); found: restval, test, train"):
        read_samples(Source(source.data, split="val"))
    only_test = {"images": [KARPATHY["images"][2]]}  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"no split 'train' or 'restval'.*name one with --split.*found: test"):
        read_samples(Source(str(write(tmp_path / "t.json", only_test))))
    with pytest.raises(ConfigError, match="records have no splits"):
        read_samples(Source(str(write(tmp_path / "a.jsonl", json.dumps({"caption": A}))), split="train"))
    with pytest.raises(ConfigError, match="a text source has no splits"):
        read_samples(Source(str(write(tmp_path / "a.txt", A)), split="train"))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"data": [{"txt": A}]}, "one JSON object of 'data', 'data' being a list of an object of 'txt'"),
        ([[1, 2]], "record 1 is not an object"),
        (3, "line 1 is not an object"),
    ],
)
def test_what_cannot_be_told_shows_what_is_there(document: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(document))
    with pytest.raises(MMTSError) as caught:
        read_samples(Source(str(path)))
    assert said in str(caught.value)
    with pytest.raises(ConfigError, match="not a path"):
        read_samples(Source(str(path), column="data[.txt"))


def test_did_you_mean(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean caption"):
        read_samples(Source(str(write(tmp_path / "a.jsonl", '{"caption": "x"}')), column="captoin"))
    pd.DataFrame({"caption": [A]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="Did you mean caption"):
        read_samples(Source(str(tmp_path / "a.parquet"), column="Caption"))


def test_captions_that_hardly_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "title\n\n\n".replace("\n\n", "\nNA\nNA\n"))
    with pytest.raises(MMTSError, match=r"every caption is 'nan'.*another with --column"):
        read_samples(Source(str(path)))
    alike = read_samples(Source(str(write(tmp_path / "b.txt", f"{A}\n{A}\n"))))
    assert "all 2 captions are alike" in alike.notes[-1]


def test_damaged_lines_and_tars_are_skipped_on_request(tmp_path: Path) -> None:
    lines = [json.dumps({"caption": f"caption {number}"}) for number in range(100)]
    path = write(tmp_path / "a.jsonl", "\n".join([*lines[:50], '{"caption": "half', *lines[50:]]))
    with pytest.raises(MMTSError, match=r"line 51 is not JSON.*--skip-damaged"):
        read_samples(Source(str(path)))
    samples = read_samples(Source(str(path), skip_damaged=True))
    assert len(samples.captions) == 100
    assert samples.left_out == {"damaged lines": 1}
    for name in ("0.tar", "1.tar"):
        tar(tmp_path / name, [(f"{number}.txt", f"{name} {number}") for number in range(9)])
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:4000])
    with pytest.raises(MMTSError, match=r"0\.tar: .*--skip-damaged goes on with the next tar"):
        read_samples(Source(f"{tmp_path}/{{0..1}}.tar"))
    samples = read_samples(Source(f"{tmp_path}/{{0..1}}.tar", skip_damaged=True))
    assert samples.captions[-9:] == [f"1.tar {number}" for number in range(9)]
    assert samples.left_out["damaged tars"] == 1
    assert any("the rest of it is left out" in note for note in samples.notes)


def page_of_forms() -> str:
    """The table of ``docs/data.md``, from the forms and the files that are read above."""
    where = {form.name: f"`{f'{form.records}.{form.captions}'.strip('.')}`" for form in forms.FORMS}
    where |= {form.name: f"`{form.says}`" for form in forms.LINES} | {"kaggle": "CSV with commas, column `caption`"}
    titles = {form.name: form.title for form in (*forms.FORMS, *forms.LINES)} | {"kaggle": "Kaggle's `captions.txt`"}
    split = {form.name: f"`{', '.join(form.train)}` of `--split`" for form in forms.FORMS if form.split}
    lines = ["| `--format` | whose | a file | where its captions are | read by default |", "| --- " * 5 + "|"]
    for name, (file, *_) in PUBLISHED.items():
        place = where[name].replace("[].[]", "[][]").replace("|", "\\|")
        lines.append(f"| `{name}` | {titles[name]} | `{file}` | {place} | {split.get(name, 'all')} |")
    return "\n".join(lines)


def test_the_page_of_forms_is_what_is_read() -> None:
    page = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    assert page_of_forms() in page, page_of_forms()


# -- tars, Arrow, folders ----------------------------------------------------------------------------------------------


def tar(path: Path, members: list[tuple[str, str]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, text in members:
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize(
    ("members", "column", "captions"),
    [
        ([("0.jpg", "x"), ("0.txt", A), ("0.json", '{"caption": "z"}'), ("1.txt", B)], None, [A]),  # as img2dataset's
        ([("0.mp4", "x"), ("0.txt", A), ("1.mp4", "x"), ("1.txt", B)], None, [A, B]),
        ([("0.txt", A), ("1.txt", B)], None, [A, B]),
        ([("0.jpg", "x"), ("0.json", f'{{"caption": "{A}"}}'), ("1.jpg", "x"), ("1.json", f'{{"caption": "{B}"}}')],
         None, [A, B]),
        ([("0.jpg", "x"), ("0.json", json.dumps({"texts": [A, B]}))], "json.texts", [A, B]),
        ([("0.jpg", "x"), ("0.meta.json", json.dumps({"a": {"b": [A, B]}}))], "meta.json.a.b[]", [A, B]),
        ([("0.jpg", "x"), ("0.geojson.txt", A)], "geojson.txt", [A]),
        ([("0.jpg", "x"), ("0.caption", A), ("1.jpg", "x"), ("1.caption", B)], "caption", [A, B]),
    ],
)  # fmt: skip
def test_where_the_captions_of_a_tar_are(
    members: list[tuple[str, str]], column: Optional[str], captions: list[str], tmp_path: Path
) -> None:
    path = tar(tmp_path / "00000.tar", members)
    assert both_engines(Source(str(path), column=column)) == captions
    (tmp_path / "named.dat").write_bytes(path.read_bytes())  # by what it holds
    assert read_samples(Source(str(tmp_path / "named.dat"), column=column)).captions == captions


def test_what_datasets_saves_to_disk(tmp_path: Path) -> None:
    """Arrow streams beside state.json, as ``save_to_disk`` writes them; and Arrow files."""
    table = pa.table({"image": ["0", "1", "2"], "caption": [[A, B], [C], []]})
    folder = tmp_path / "saved"
    folder.mkdir()
    for number, piece in enumerate((table.slice(0, 1), table.slice(1))):
        with pa.OSFile(str(folder / f"data-0000{number}-of-00002.arrow"), "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(piece)
    write(folder / "state.json", {"_data_files": []})
    write(folder / "dataset_info.json", {"features": {}})
    assert both_engines(Source(str(folder))) == [A, B, C]
    with pa.ipc.new_file(str(tmp_path / "one.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert read_samples(Source(str(tmp_path / "one.arrow"))).captions == [A, B, C]
    assert read_samples(Source(str(tmp_path / "one.arrow")), ["image"]).labels == ["0", "0", "1"]
    (tmp_path / "named.dat").write_bytes((tmp_path / "one.arrow").read_bytes())  # by what it holds
    assert read_samples(Source(str(tmp_path / "named.dat"))).captions == [A, B, C]


def test_files_that_are_named_by_their_splits(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    for name, caption in (("data/train-00000-of-00002", A), ("data/train-00001-of-00002", B), ("data/test-00000", C)):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"caption": [caption]}).to_parquet(path)
    every = read_samples(Source(str(folder)))
    assert every.captions == [C, A, B]
    assert "files of the splits test, train are all read" in every.notes[0]
    assert both_engines(Source(str(folder), split="train")) == [A, B]
    assert read_samples(Source(str(folder), split="test,train")).captions == [C, A, B]
    with pytest.raises(ConfigError, match=r"no split 'val' \(--split\); found: test, train"):
        read_samples(Source(str(folder), split="val"))
    for split in ("train", "test"):  # a DatasetDict on a disk
        (tmp_path / "dict" / split).mkdir(parents=True)
        table = pa.table({"caption": [f"{split} caption"]})
        with pa.ipc.new_stream(str(tmp_path / "dict" / split / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
    assert read_samples(Source(str(tmp_path / "dict"), split="train")).captions == ["train caption"]


def test_a_folder_of_images_with_a_text_beside_each(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    for number, text in enumerate((A, f"{B}\n{C}\n", "")):
        write(folder / "sub" / f"{number}.txt", text)
        write(folder / "sub" / f"{number}.png", "x")
    write(folder / "README.txt", "no caption")
    source = Source(str(folder))
    samples = read_samples(source)
    assert both_engines(source) == [A, B, C]
    assert samples.left_out == {"texts without a caption": 1}
    assert [os.path.basename(image) for image in samples.images] == ["0", "1", "1"]


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    frame = pd.DataFrame({"caption": [A, B]})
    frame.to_pickle(tmp_path / "a.pkl")
    frame.to_pickle(tmp_path / "b.bin")
    for name in ("a.pkl", "b.bin"):
        with pytest.raises(ConfigError, match=r"a pickle, which can run code.*read_pickle"):
            read_samples(Source(str(tmp_path / name)))


# -- where files are ---------------------------------------------------------------------------------------------------


def test_several_sources_and_patterns(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", f"{A}\n{B}\n")
    write(tmp_path / "b.jsonl", json.dumps({"caption": C}))
    write(tmp_path / "c1.tsv", f"title\n{D}\n")
    write(tmp_path / "c2.tsv", f"title\n{A}\n")
    at = str(tmp_path)
    for data, captions in (
        (f"{at}/a.txt::{at}/b.jsonl", [A, B, C]),
        (f"{at}/c*.tsv", [D, A]),
        (f"{at}/c{{2,1}}.tsv::{at}/a.txt", [A, D, A, B]),
    ):
        assert both_engines(Source(data)) == captions
    broken = bytearray(gzip.compress(f"title\n{A}\n{B}\n".encode() * 99))
    broken[20:60] = bytes(40)
    (tmp_path / "broken.tsv.gz").write_bytes(broken)
    with pytest.raises(MMTSError, match=r"broken\.tsv\.gz: cannot be read as csv"):
        read_samples(Source(f"{at}/broken.tsv.gz"))
    with pytest.raises(MMTSError, match=r"none\*\.tsv: no such file"):
        read_samples(Source(f"{at}/none*.tsv"))


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    for name, content in (("a.txt", f"{A}\n{B}\n"), ("a.tsv", f"title\n{A}\n{B}\n"), ("c.json", json.dumps([A, B]))):
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(pack(content.encode()))
        assert read_samples(Source(str(path))).captions == [A, B]


def test_urls(tmp_path: Path) -> None:
    """Of a file system that fsspec knows; s3:// and hf:// go the same way."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    with system.open("/set/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(json.dumps({"caption": A}).encode()))
    pd.DataFrame({"caption": [B, C]}).to_parquet(tmp_path / "t.parquet")
    tar(tmp_path / "0.tar", [("0.txt", D)])
    for name in ("t.parquet", "0.tar"):
        with system.open(f"/set/{name}", "wb") as file:
            file.write((tmp_path / name).read_bytes())
    for data, captions in (
        ("memory://set/a.jsonl.gz", [A]),
        ("memory://set/t.parquet", [B, C]),
        ("memory://set/*.parquet", [B, C]),
        ("memory://set", [B, C]),
        ("memory://set/{0..0}.tar", [D]),
    ):
        assert read_samples(Source(data)).captions == captions
    with pytest.raises(MMTSError, match="no such file"):
        read_samples(Source("memory://set/gone.parquet"))
    with pytest.raises(MMTSError, match=r"nobody://x/a.txt: cannot be opened|nobody://x/a.txt"):
        read_samples(Source("nobody://x/a.txt"))


def in_memory(path: str, content: bytes) -> None:
    with pytest.importorskip("fsspec").filesystem("memory").open(path, "wb") as file:
        file.write(content)


def test_tables_behind_a_url_are_copied_once_per_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, frequency in (("a", [1.0, 2.0]), ("b", [3.0, 4.0])):
        ClusterTable.build(["x", "y"], [0, 1], frequency).save(tmp_path / f"{name}.parquet")
    in_memory("/tables/t.parquet", (tmp_path / "a.parquet").read_bytes())
    copies = []
    monkeypatch.setattr(remote, "_fetch", lambda *given, real=remote._fetch: copies.append(given[-1]) or real(*given))
    for _ in range(2):
        table = open_table("memory://tables/t.parquet")
        assert (table.frequency.tolist(), table.source) == ([1.0, 2.0], "memory://tables/t.parquet")
    assert copies == ["memory://tables/t.parquet"]
    in_memory("/tables/t.parquet", (tmp_path / "b.parquet").read_bytes())
    assert ClusterTable.load("memory://tables/t.parquet").frequency.tolist() == [3.0, 4.0]
    monkeypatch.setenv("MMTS_CACHE", "")
    assert ClusterTable.load("memory://tables/t.parquet").frequency.tolist() == [3.0, 4.0]
    assert len(copies) == 3
    ClusterTable.load(tmp_path / "a.parquet").save(tmp_path / "parts" / "0.parquet")
    in_memory("/tables/folder/0.parquet", (tmp_path / "parts" / "0.parquet").read_bytes())
    assert len(open_table("memory://tables/folder")) == 2
    for gone in ("memory://tables/gone.parquet", "nobody://x/t.parquet"):
        with pytest.raises(TableError, match=gone):
            open_table(gone)


# -- scripts without spaces --------------------------------------------------------------------------------------------


def test_characters_are_words_where_nothing_parts_them() -> None:
    texts = ["一个小男孩在放风筝", "两个男孩放风筝", "a boy flies a kite", "the boat"]
    assert re.findall(encoders._WORDS, "a boy's 2nd kite_x 风筝 ไป") == [
        "boy", "2nd", "kite_x", "风", "筝", "ไ", "ป"]  # fmt: skip
    for vectors in (encoders._hashing(texts), encoders.tfidf(texts, 0)):
        near = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
        assert near[0, 1] > 0.3
        assert abs(near[0, 2]) < 0.2
    assert encoders.unspaced(texts) == 2


@given(st.text(st.characters(max_codepoint=0x17F), max_size=40))
def test_words_of_other_scripts_are_scikit_learns(text: str) -> None:
    assert re.findall(encoders._WORDS, text) == re.findall(r"(?u)\b\w\w+\b", text)


# -- how it was read, and how a run reads ------------------------------------------------------------------------------


class Reads(Adapter):
    name, title, loss = "reads", "Reads", "mmts-infonce"
    presets: ClassVar[dict[str, Preset]] = {"clip-cc3m": Preset("mmts-infonce", 0.04, 0.05, 0.10)}


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        ({"column": ("title", "--csv-caption-key"), "separator": ("\t", "--csv-separator")}, None),
        ({"column": ("caption", "--csv-caption-key")}, "column 'title', but this run trains on column 'caption'"),
        ({"separator": (",", "--csv-separator")}, r"of separator '\\t', but this run trains on separator ','"),
        ({"suffix": ("txt", "its own")}, None),
    ],
)
def test_a_run_that_reads_otherwise_stops(
    reads: dict[str, tuple[str, str]], said: Optional[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.tsv", f"title\tcaption\n{A}\tx\n{B}\ty\n{C}\tz\n")
    out = str(tmp_path / "t.parquet")
    assert main(["cluster", str(path), "-k", "1", "--encoder", "hashing", "-o", out]) == 0
    flags, _ = split_flags(["--loss", "mmts", "--mmts-clusters", out])
    facts = Facts(10, torch.device("cpu"), reads=reads)
    if said is None:
        Session(Reads(), Reads().resolve(flags), facts)
        return
    with pytest.raises(ConfigError, match=said):
        Session(Reads(), Reads().resolve(flags), facts)
    capsys.readouterr()
    Session(Reads(), Reads().resolve({**flags, "mmts_allow_config_change": True}), facts)
    assert "(allowed by --mmts-allow-config-change)" in capsys.readouterr().out


def test_a_run_that_upsamples_is_told_of_a_table_that_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.txt", f"{A}\n{B}\n")
    for weights, warned in ((None, True), ("1::10", False), ("1::2", True)):
        out = str(tmp_path / "t.parquet")
        more = () if weights is None else ("--weights", weights)
        recipe = ("-k", "1", "--encoder", "hashing", "--force", "-o", out)
        assert main(["cluster", str(path), str(path), *more, *recipe]) == 0
        flags, _ = split_flags(["--loss", "mmts", "--mmts-clusters", out])
        capsys.readouterr()
        facts = Facts(10, torch.device("cpu"), reads={"weights": ("1::10", "--train-data-upsampling-factors")})
        Session(Reads(), Reads().resolve(flags), facts)
        assert ("the run draws its sources as 1::10" in capsys.readouterr().out) == warned


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_whole_numbers_of_the_same_proportion() -> None:
    assert weights_of("1::2.5") == (2, 5)
    assert weights_of("10::20::5") == (2, 4, 1)
    assert weights_of("0.001::1") == (1, 1000)
    for wrong in ("1::x", "0::1", "1::0.0001", "-1", ""):
        with pytest.raises(ConfigError, match="--weights"):
            weights_of(wrong)


@pytest.mark.parametrize("label", [False, True])
def test_a_source_that_weighs_ten_counts_ten_times(label: bool, tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", f"title\tkind\n{A}\t1\n{B}\t2\n")
    write(tmp_path / "b.tsv", f"title\tkind\n{A}\t1\n{C}\t2\n")
    out = tmp_path / "t.parquet"
    recipe = ("--label-column", "kind", "--column", "title") if label else ("-k", "1", "--encoder", "hashing")
    flags = ("--weights", "1::10", "-o", str(out), *recipe)
    assert main(["cluster", str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv"), *flags]) == 0
    table = ClusterTable.load(out)
    assert dict(zip(table.keys.to_pylist(), table.count.tolist())) == {A: 11, B: 1, C: 10}
    assert table.samples == 22
    assert table.info["read"]["weights"] == "1::10"
    if label:
        assert dict(zip(table.keys.to_pylist(), table.frequency.tolist())) == {A: 11, B: 11, C: 11}
    assert main(["cluster", str(tmp_path / "a.tsv"), "--weights", "1::10", "-o", str(out), "--force", *recipe]) == 2


# -- CSV as OpenCLIP reads it ------------------------------------------------------------------------------------------

CELLS = st.text(alphabet=st.sampled_from("ab \"',;\t|é7NA"), max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6),
    separator=st.sampled_from([",", "\t", ";", "|", "\\t", "::"]),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_csv_is_what_pandas_makes_of_it(rows, separator, end, bom, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    joined = {"\\t": "\t"}.get(separator, separator)
    text = end.join(joined.join(row) for row in [("filepath", "title"), *rows])
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    theirs: Any
    try:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [str(value) for value in pd.read_csv(path, sep=separator)["title"].tolist()]
    except Exception as error:
        theirs = error
    source = Source(str(path), "csv", "title", separator)
    if isinstance(theirs, list) and theirs and set(theirs) != {"nan"}:
        assert read_samples(source).captions == theirs
    else:
        with pytest.raises(MMTSError) as caught:
            read_samples(source)
        if isinstance(theirs, pd.errors.ParserError):
            assert str(theirs).split(":")[0].split(".")[0][:20] in str(caught.value)


# -- the cases ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cases() -> Path:
    return shared_folder("cases", "inputs")


@pytest.mark.parametrize(
    ("name", "flags", "samples", "said"),
    [
        ("token.txt", (), 8, "nearly every line is NAME#N<tab>text"),
        ("one.txt", (), 1, "1 captions"),
        ("equal.txt", (), 200, "captions are alike"),
        ("pretty.json", (), None, "as activitynet"),
        ("coco_captions.json", (), None, "as coco"),
        ("karpathy.json", ("--split", "train,restval"), None, "split train,restval"),
        ("one_record_per_image.json", (), None, "as json"),
        ("pairs.tar", ("--column", "outputs.txt"), 6, "as webdataset"),
        ("lines.jsonl.gz", (), None, "as json"),
        ("hub_folder", (), None, "2 files"),
        ("hub_folder/data", (), None, "2 files"),
        ("hub_folder/data/*.parquet", (), None, "2 files"),
        ("list_of_captions.parquet", (), None, "as parquet"),
        ("download_report.parquet", (), None, "failed downloads left out"),
        ("stray_quote.tsv", (), 3, "line breaks: a stray quote"),
    ],
)
def test_inputs_that_users_have_are_read(
    name: str, flags: tuple[str, ...], samples: Optional[int], said: str, cases: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "t.parquet"
    recipe = ("-k", "1", "--runs", "1", "--encoder", "hashing", "-o", str(out))
    assert main(["cluster", str(cases / name), *flags, *recipe]) == 0
    assert said in capsys.readouterr().err
    table = ClusterTable.load(out)
    if name != "stray_quote.tsv":  # whose cells run over lines, in training too
        assert not any("\t" in key or ".jpg" in key for key in table.keys.to_pylist())
    if samples is not None:
        assert table.samples == samples


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("extra_field.csv", ("--separator", ","), "Expected 2 fields in line 3, saw 3"),
        ("extra_field_labels.csv", ("--separator", ",", "--label-column", "noun_class"), "Expected 2 fields in line 3"),
        ("lone_surrogate.jsonl", (), "line 1: field 'caption' holds half a character"),
        ("pairs.tar", (), "6 .input.jpg, 6 .outputs.txt"),
        ("latin1.tsv", (), "iconv -f LATIN1 -t UTF-8"),
    ],
)
def test_inputs_that_users_have_are_refused(
    name: str, flags: tuple[str, ...], said: str, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", str(cases / name), *flags, "-o", str(tmp_path / "t.parquet")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mmts: error: ")
    assert said in error
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize(
    ("name", "images", "captions", "first"),
    [
        ("coco_captions.json", 3, None, "0.jpg"),
        ("one_record_per_image.json", 3, 15, "0.jpg"),
        ("list_of_captions.parquet", 3, 6, "0.jpg"),
        ("karpathy.json", 1, 2, "2.jpg"),
        ("token.txt", 4, 8, "100.jpg"),
    ],
)
def test_inputs_that_users_have_are_evaluated(
    name: str, images: int, captions: Optional[int], first: str, cases: Path
) -> None:
    found = sets.read(sets.Reading(str(cases / name), image_root="root"))
    assert len(found.images) == images
    assert found.images[0] == Path("root", first)
    assert len(found.captions) == (captions or len(json.loads((cases / name).read_text())["annotations"]))
    assert sum(map(len, found.image_rows)) == len(found.captions)


def test_forms_of_lines_are_evaluated_and_have_no_columns(tmp_path: Path) -> None:
    for name in ("flickr30k", "kaggle", "cc3m"):
        file, content, captions, images = PUBLISHED[name]
        path = str(write(tmp_path / file, content))
        found = sets.read(sets.Reading(path))
        assert found.captions == captions
        assert [str(found.images[i]) for i in sorted({0, len(found.images) - 1})] == [
            str(Path(image)) for image in ((images[0], images[-1]) if images else ("1.jpg", "2.jpg"))
        ]
        if name != "kaggle":
            with pytest.raises(ConfigError, match="--label-column needs named columns"):
                read_samples(Source(path), ["image"])


def test_both_engines_list_the_hub_folder_alike(cases: Path) -> None:
    at = str(cases / "hub_folder")
    every = [both_engines(Source(data)) for data in (at, f"{at}/data", f"{at}/data/*.parquet")]
    assert every[0] == every[1] == every[2]
    files = sorted((cases / "hub_folder" / "data").glob("*.parquet"))
    assert len(every[0]) == sum(pq.read_metadata(file).num_rows for file in files)
    assert np.array_equal(np.array(every[0][:1]), np.array([pq.read_table(files[0]).column("caption")[0].as_py()]))
