"""Files that a table is made from: valid ones, damaged ones and garbage.

What is accepted is exactly the captions, labels, counts or numbers that are computed here apart; all else is one line.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from fuzzing import fuzz, survives
from hypothesis import strategies as st

from mmts_plugins.data.captions import caption_batches, read_samples, units
from mmts_plugins.data.classes import read_class_counts
from mmts_plugins.data.embeddings import load_npy, read_embeddings
from mmts_plugins.data.images import ImageEncoder, stamped
from mmts_plugins.data.source import Source

pd = pytest.importorskip("pandas")
pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-captions-"))


@pytest.fixture(scope="module", autouse=True)
def _folder() -> Iterator[None]:
    FOLDER.mkdir(exist_ok=True)
    yield
    for path in FOLDER.iterdir():
        path.unlink()
    FOLDER.rmdir()


def put(name: str, content: bytes) -> str:
    path = FOLDER / name
    path.write_bytes(content)
    return str(path)


def damaged(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes written over, put in, taken out, or the rest cut off, at places between 0 and 1."""
    for what, where, piece in edits:
        place = int(where * len(content))
        if what == "over":
            content = content[:place] + piece + content[place + len(piece) :]
        elif what == "in":
            content = content[:place] + piece + content[place:]
        elif what == "out":
            content = content[:place] + content[place + len(piece) :]
        else:
            content = content[:place]
    return content


PIECES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [
            b"\0",
            b"\xff",
            b"\n",
            b"\r\n",
            b'"',
            b"\t",
            b",",
            b"{",
            b"[" * 3000,
            b"\xef\xbb\xbf",
            b"\xff\xfe",
            b"9" * 5000,
            b"1e999",
            b"NaN",
            b"null",
            b"-1",
            b"\\ud800",
            b"\x1f\x8b",
            b"\xff" * 12,
            b"\x80" + b"\0" * 7,
        ]
    ),
)
EDITS = st.lists(st.tuples(st.sampled_from(["over", "in", "out", "cut"]), st.floats(0, 0.999), PIECES), max_size=4)
TEXT = st.text(max_size=12)
CAPTION = st.one_of(
    TEXT,
    st.sampled_from(["a kite", "a boat", "", " ", "nan", "NA", "007", "1.0", "\u2028", 'a 7" pan', "a\tb", "a\nb"]),
)


# --- CSV: the truth is pandas, called as OpenCLIP calls it

CELL = st.one_of(
    st.sampled_from(
        [
            "a",
            "a kite",
            "007",
            "1.0",
            "",
            "NA",
            "nan",
            "None",
            "True",
            "1e400",
            "9" * 30,
            '"',
            '"a"',
            '"a',
            'a"',
            '""',
            '"a""b"',
            '"a\nb"',
            "\\",
            "'",
            "é",
            "\u2028",
            "\ufeff",
            " x ",
            "#",
            "\0",
            "1_0",
            "inf",
            "-",
            "0x1",
        ]
    ),
    st.text(alphabet='ab1 "\t,;|.\r\n\\éx', max_size=6),
)
SEPARATORS = [
    "\t",
    ",",
    ";",
    "|",
    " ",
    "\\t",
    "\\|",
    "::",
    r"\s+",
    "[,;]",
    "é",
    "",
    "(",
    "\n",
    '"',
    "\r",
    "a",
    "\\",
    ".",
]


@fuzz(
    st.lists(st.lists(CELL, min_size=1, max_size=4), max_size=8),
    st.sampled_from(SEPARATORS),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    EDITS,
)
def test_csv_is_what_pandas_makes_of_it(
    rows: list[list[str]], separator: str, end: str, bom: bool, edits: list[tuple[str, float, bytes]]
) -> None:
    written = {"\\t": "\t", "\\|": "|", r"\s+": "  ", "[,;]": ",", "": ","}.get(separator, separator)
    lines = [written.join(row) for row in [["title", "filepath"], *rows]]
    content = b"\xef\xbb\xbf" * bom + (end.join(lines) + end).encode("utf-8", "surrogatepass")
    path = put("a.csv", damaged(content, edits))
    theirs: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = [str(value) for value in pd.read_csv(path, sep=separator)["title"].tolist()]
        except Exception as error:
            theirs = error
    ours = survives(lambda: read_samples(Source(path, separator=separator)))
    if isinstance(theirs, Exception) or not theirs:
        assert ours is None, theirs
    else:
        assert ours is not None
        assert ours.captions == theirs


@fuzz(
    st.lists(st.tuples(CAPTION, st.sampled_from(["1", "007", "a b", "é", "6_0"])), min_size=1, max_size=8),
    st.booleans(),
)
def test_labels_of_a_csv_stay_as_they_are_written(rows: list[tuple[str, str]], captions: bool) -> None:
    rows = [(re.sub("[\r\0\ud800-\udfff]", "", caption), label) for caption, label in rows]
    written = io.StringIO(newline="")
    csv.writer(written, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([("title", "noun"), *rows])
    path = put("a.csv", written.getvalue().encode())
    source = Source(path, separator=",")
    ours = survives(lambda: read_samples(source, ["noun"], captions))
    assert ours.labels == [label for _, label in rows]
    assert ours.captions == (read_samples(source).captions if captions else [])
    assert survives(lambda: read_samples(source, ["noun", "noun"], False)).labels == [f"{x}_{x}" for _, x in rows]


# --- JSON


def whole(text: str) -> Optional[str]:
    """The text, unless it holds half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


RECORD = st.fixed_dictionaries(
    {"caption": st.one_of(CAPTION, st.lists(CAPTION, max_size=3))},
    optional={
        "id": st.integers(),
        "x": st.recursive(st.none() | st.floats(), lambda inner: st.lists(inner, max_size=2)),
    },
)


@fuzz(st.lists(RECORD, min_size=1, max_size=6), st.booleans(), st.booleans(), st.booleans(), EDITS)
def test_json_captions_are_those_of_its_records(
    records: list[dict[str, Any]], lines: bool, plain: bool, bom: bool, edits: list[tuple[str, float, bytes]]
) -> None:
    if lines:
        text = "".join(json.dumps(record, ensure_ascii=plain) + "\n" for record in records)
    else:
        text = json.dumps(records, ensure_ascii=plain)
    content = damaged(b"\xef\xbb\xbf" * bom + text.encode("utf-8", "surrogatepass"), edits)
    ours = survives(lambda: read_samples(Source(put("a.json", content))))
    try:
        decoded = content.decode("utf-8-sig")
        decoded = decoded.replace("\r\n", "\n").replace("\r", "\n")
        first = decoded.lstrip()[:1]
        found = json.loads(decoded) if first == "[" else [json.loads(x) for x in decoded.split("\n") if x.strip()]
        name = "desc" if "desc" in found[0] else "caption"
        expected = [x for one in found for x in (one[name] if isinstance(one[name], list) else [one[name]])]
        good = all(isinstance(x, str) and whole(x) is not None for x in expected)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        good = False
    if good and expected:
        assert ours is not None
        assert ours.captions == expected
    else:
        assert ours is None


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["caption", "desc", "sentences", "annotations", "images", "split", "v_0", "v_1", '"', ""]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@fuzz(ANYTHING, st.sampled_from([None, 1]), st.sampled_from(["json", "auto"]))
def test_any_json_is_read_or_described(document: Any, indent: Optional[int], form: str) -> None:
    path = put("a.json", json.dumps(document, indent=indent).encode())
    ours = survives(lambda: read_samples(Source(path, form)))
    if ours is not None:
        records = document if isinstance(document, list) else [document]
        name = "desc" if "desc" in records[0] else "caption"
        assert ours.captions == [
            x for one in records for x in (one[name] if isinstance(one[name], list) else [one[name]])
        ]


@fuzz(st.sampled_from(["csv", "text", "json", "parquet", "webdataset"]), st.binary(max_size=300), EDITS)
def test_garbage_is_one_line_or_its_text(form: str, content: bytes, edits: list[tuple[str, float, bytes]]) -> None:
    content = damaged(content, edits)
    survives(lambda: read_samples(Source(put("a.bin", content), form)))
    survives(lambda: read_samples(Source(put("a.bin", content), form), ["x"], captions=False))


# --- text


@fuzz(st.lists(CAPTION, max_size=8), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), EDITS)
def test_a_text_is_its_lines(lines: list[str], end: str, bom: bool, edits: list[tuple[str, float, bytes]]) -> None:
    content = damaged(b"\xef\xbb\xbf" * bom + end.join(lines).encode("utf-8", "surrogatepass"), edits)
    try:
        text: Optional[str] = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        text = None
    for form in ("text", "auto"):
        ours = survives(lambda form=form: read_samples(Source(put("a.txt", content), form)))
        if not text:
            assert ours is None
        elif form == "text" or not set("\t,|") & set(text):
            assert ours is not None
            assert ours.captions == (text[:-1] if text.endswith("\n") else text).split("\n")


# --- Parquet

CELLS = st.one_of(st.none(), CAPTION.map(lambda text: whole(text) or ""))


@fuzz(
    st.lists(st.tuples(CELLS, st.sampled_from(["success", "failed_to_download", None]), st.integers(0, 9)), max_size=8),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    EDITS,
)
def test_parquet_is_its_cells(
    rows: list[tuple[Any, Any, int]], lists: bool, report: bool, groups: int, edits: list[tuple[str, float, bytes]]
) -> None:
    texts = [[text, text] if lists else text for text, _, _ in rows]
    kind = pa.list_(pa.string()) if lists else pa.string()
    table = pa.table(
        {
            "url": pa.array([str(number) for *_, number in rows], pa.string()),
            "caption": pa.array(texts, kind),
            **({"status": pa.array([status for _, status, _ in rows], pa.string())} if report else {}),
        }
    )
    written = io.BytesIO()
    pq.write_table(table, written, row_group_size=groups)
    path = put("a.parquet", damaged(written.getvalue(), edits))
    ours = survives(lambda: read_samples(Source(path), ["url"]))
    both = survives(
        lambda: [x for unit in units(Source(path)) for batch in caption_batches(Source(path), unit) for x in batch]
    )
    if not edits:
        kept = [row for row in rows if not report or row[1] == "success"]
        expected = ["nan" if text is None else text for text, _, _ in kept for _ in range(2 if lists else 1)]
        assert expected == both
        if set(expected) == {"nan"}:
            assert ours is None  # there is no caption in it
            return
        assert (ours.captions if ours else []) == expected
        assert (ours.labels if ours else []) == [str(number) for *_, number in kept for _ in range(2 if lists else 1)]
    elif ours is not None and both is not None:
        assert ours.captions == both


# --- tars

NAMES = st.sampled_from(
    [
        "0.jpg",
        "0.txt",
        "1.txt",
        "1.png",
        "a/0.jpg",
        "a/0.txt",
        "a/0.json",
        "__meta__/0.txt",
        "x",
        ".txt",
        "0.TXT",
        "2.webp",
        "2.seg.txt",
        "é.txt",
        "é.jpg",
        "n" * 90 + ".txt",
        "n" * 90 + ".jpg",
    ]
)


@fuzz(
    st.lists(
        st.tuples(NAMES, st.one_of(CAPTION.map(lambda x: x.encode("utf-8", "surrogatepass")), st.binary(max_size=9)))
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    EDITS,
)
def test_tar_captions_are_those_that_openclip_keeps(
    members: list[tuple[str, bytes]], form: int, edits: list[tuple[str, float, bytes]]
) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    path = put("0.tar", damaged(written.getvalue(), edits))
    ours = survives(lambda: read_samples(Source(path)))
    if edits:
        return
    samples: list[tuple[str, dict[str, bytes]]] = []
    for name, content in members:
        if name.startswith("__") or "." not in name.rsplit("/", 1)[-1][1:]:
            continue
        folder, _, last = name.rpartition("/")
        stem, _, suffix = last.partition(".")
        key, suffix = f"{folder}/{stem}", suffix.lower()
        if not samples or samples[-1][0] != key or suffix in samples[-1][1]:
            samples.append((key, {}))
        samples[-1][1][suffix] = content
    kept = [sample["txt"] for _, sample in samples if "txt" in sample and sample.keys() & {"jpg", "png", "webp"}]
    expected = []
    for text in kept:
        try:
            expected.append(text.decode())
        except UnicodeDecodeError:
            continue
    assert (ours.captions if ours else []) == expected


# --- class counts


@fuzz(
    st.lists(
        st.tuples(
            st.one_of(TEXT, st.sampled_from(["1", "007", "NA", "6_0"])),
            st.one_of(
                st.integers(0, 9).map(str),
                st.sampled_from(["1.5", "-1", "", "x", "9" * 30, "9" * 5000, "00012", "\u0663", " 3", "1e3", "NaN"]),
            ),
        ),
        max_size=6,
    ),
    EDITS,
)
def test_class_counts_are_whole_numbers_of_distinct_classes(
    rows: list[tuple[str, str]], edits: list[tuple[str, float, bytes]]
) -> None:
    rows = [(re.sub("[\r\n\0\ud800-\udfff]", "", name), count) for name, count in rows]
    written = io.StringIO(newline="")
    csv.writer(written, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([("class_id", "count"), *rows])
    ours = survives(lambda: read_class_counts(put("n.csv", damaged(written.getvalue().encode(), edits))))
    if not edits:
        names = [name for name, _ in rows]
        good = all(re.fullmatch("[0-9]+", count.strip()) and len(count) < 20 for _, count in rows) and all(
            x.strip() for x in names
        )
        if good and len(set(names)) == len(names) and any(int(count) for _, count in rows):
            ids, counts, notes = ours
            assert list(zip(ids, counts.tolist())) == [(name, int(count)) for name, count in rows if int(count)]
            assert len(notes) == any(int(count) == 0 for _, count in rows)
        else:
            assert ours is None
    elif ours is not None:
        ids, counts, _ = ours
        assert len(set(ids)) == len(ids) == len(counts)
        assert counts.dtype == np.int64
        assert counts.min() > 0


# --- embeddings

HEADER = st.one_of(
    st.fixed_dictionaries(
        {
            "descr": st.sampled_from(
                [
                    "<f4",
                    "<f2",
                    "<f8",
                    ">f4",
                    "|i1",
                    "<u8",
                    "|b1",
                    "<c8",
                    "|O",
                    "<U3",
                    "|V4",
                    "<M8[s]",
                    "f4,f4",
                    "",
                    "<f16",
                ]
            ),
            "fortran_order": st.sampled_from([True, False, 1, None]),
            "shape": st.one_of(
                st.lists(
                    st.one_of(st.integers(-2, 5), st.sampled_from([2**31, 2**62, 2**64, 10**400])), max_size=3
                ).map(tuple),
                st.sampled_from(["x", None, 3, (2.5, 2), (True, 2)]),
            ),
        }
    ).map(repr),
    st.text(max_size=40),
    st.sampled_from(
        [
            "(" * 5000,
            "{" * 300,
            "{'descr': [('a', '<f4', (2,)), ('b', '|O')], 'fortran_order': False, 'shape': (1, 2), }",
        ]
    ),
)


@fuzz(HEADER, st.sampled_from([b"\x01\0", b"\x02\0", b"\x03\0", b"\x09\0"]), st.binary(max_size=120), EDITS)
def test_npy_headers_of_any_kind(
    header: str, version: bytes, body: bytes, edits: list[tuple[str, float, bytes]]
) -> None:
    text = header.encode("utf-8", "replace") + b"\n"
    content = b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + body
    check_embeddings("a.npy", damaged(content, edits))


@fuzz(
    st.sampled_from(["<f4", "<f2", "<f8", "<i8", "|u1"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.binary(min_size=128, max_size=128),
    EDITS,
)
def test_embeddings_are_the_numbers_of_the_file(
    kind: str, rows: int, width: int, raw: bytes, edits: list[tuple[str, float, bytes]]
) -> None:
    points = np.frombuffer(raw, kind)[: rows * width].reshape(rows, width)
    written = io.BytesIO()
    np.save(written, points)
    ours = check_embeddings("a.npy", damaged(written.getvalue(), edits))
    with np.errstate(over="ignore"):
        single = points.astype(np.float32)
    if not edits:
        assert (ours is not None) == bool((np.abs(single) <= 1e12).all())


@fuzz(
    st.sampled_from(["<f4", "<f2", "<i8", "|u1", "|b1"]), st.integers(1, 4), st.integers(0, 4), st.integers(0, 3), EDITS
)
def test_safetensors(kind: str, rows: int, width: int, many: int, edits: list[tuple[str, float, bytes]]) -> None:
    save = pytest.importorskip("safetensors.numpy").save
    points = np.arange(rows * width).reshape(rows, width).astype(kind)
    content = damaged(save({f"x{number}": points for number in range(many)}), edits)
    path = put("a.safetensors", content)
    ours = survives(lambda: read_embeddings(path))
    if not edits:
        if many == 1 and width and kind != "|b1":
            assert np.array_equal(ours, points.astype(np.float32))
        else:
            assert ours is None
    elif ours is not None:
        assert ours.ndim == 2
        assert (np.abs(ours) <= 1e12).all()
    survives(lambda: read_embeddings(path, "x1"))


def check_embeddings(name: str, content: bytes) -> Optional[np.ndarray]:
    path = put(name, content)
    ours = survives(lambda: read_embeddings(path))
    survives(lambda: load_npy(path))
    if ours is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = np.load(path, allow_pickle=False)
        assert ours.ndim == 2
        assert 0 not in ours.shape
        assert np.array_equal(ours, theirs)
        assert (np.abs(ours.astype(np.float32)) <= 1e12).all()
        return np.array(ours)
    return None


# --- images

PICTURES: dict[str, bytes] = {}


def picture(form: str) -> bytes:
    image = pytest.importorskip("PIL.Image")
    if form not in PICTURES:
        written = io.BytesIO()
        image.effect_noise((9, 7), 60).convert("RGB").save(written, form)
        PICTURES[form] = written.getvalue()
    return PICTURES[form]


class Mean(ImageEncoder):
    """A model that gives the mean colour."""

    def _load(self) -> tuple[Any, Any]:
        return lambda batch: batch.float().mean((1, 2)), lambda image: torch.tensor(np.asarray(image.resize((4, 4))))


@fuzz(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), EDITS, st.binary(max_size=60))
def test_images_are_embedded_or_named(form: str, edits: list[tuple[str, float, bytes]], garbage: bytes) -> None:
    for content in (damaged(picture(form), edits), garbage):
        path = put("0.img", content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vectors = survives(lambda path=path: Mean("timm:x", device="cpu").encode(stamped([path], None, "x")))
        assert (vectors is not None) or edits or content == garbage
        if vectors is not None:
            assert vectors.shape == (1, 3)
            assert 0 <= vectors.min() <= vectors.max() <= 255
