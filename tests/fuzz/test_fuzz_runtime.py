"""Distributions of classes and annotation files as AVION's adapter reads them; logs that were cut anywhere."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from fuzzing import fuzz, survives
from hypothesis import strategies as st

from mmts_plugins.adapters.avion import count_classes, load_classes
from mmts_plugins.diagnostics import _append

CELLS = st.one_of(
    st.integers(-3, 10**20).map(str),
    st.sampled_from(
        ["", " ", "nan", "inf", "1e3", "1_0", "0x10", "１２", "9" * 5000, '"', "\ud800", "\0", "a\nb", "=1+1"]
    ),
    st.text(max_size=8),
)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        yield Path(name)


def damaged(draw, header: str, rows: list[list[str]]) -> bytes:
    """A valid file, and one cell, one byte, one cut or nothing changed in it."""
    rows = [list(row) for row in rows]
    how = draw(st.sampled_from(["none", "cell", "byte", "cut", "extra", "header"]))
    if how == "cell":
        row = draw(st.integers(0, len(rows) - 1))
        rows[row][draw(st.integers(0, len(rows[row]) - 1))] = draw(CELLS)
    if how == "extra":
        rows.insert(draw(st.integers(0, len(rows))), draw(st.lists(CELLS, max_size=5)))
    if how == "header":
        header = draw(st.one_of(st.text(max_size=20), st.just("\ufeff" + header), st.just(header.upper())))
    content = "\n".join([header, *(",".join(row) for row in rows), ""]).encode("utf-8", "surrogatepass")
    if how == "byte":
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw(st.binary(min_size=1, max_size=3)) + content[at + 1 :]
    return content[: draw(st.integers(0, len(content)))] if how == "cut" else content


@st.composite
def distributions(draw) -> bytes:
    counts = draw(st.dictionaries(st.integers(0, 99).map(str), st.integers(1, 10**6), min_size=1, max_size=6))
    return damaged(draw, "class_id,count", [[key, str(count)] for key, count in counts.items()])


@st.composite
def annotations(draw) -> bytes:
    pairs = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6))
    return damaged(draw, "narration,verb_class,noun_class", [["a b", str(verb), str(noun)] for verb, noun in pairs])


@fuzz(distributions())
def test_distributions(folder, content):
    path = folder / "counts.csv"
    path.write_bytes(content)
    table = survives(lambda: load_classes(str(path)))
    if table is not None:
        lines = content.decode("utf-8-sig").replace("\r", "\n").split("\n")
        for key, count in zip(table.keys.to_pylist(), table.frequency.tolist()):
            assert count >= 1
            assert '"' in content.decode("utf-8-sig") or any(
                line.split(",")[0] == key and int(line.split(",")[1]) == count for line in lines if line.count(",")
            )


@fuzz(annotations())
def test_annotations(folder, content):
    path = folder / "train.csv"
    path.write_bytes(content)
    table = survives(lambda: count_classes(str(path), "verb_noun"))
    if table is not None:
        assert int(table.count.sum()) <= content.count(b"\n") + content.count(b"\r") + 1


@fuzz(st.tuples(st.binary(max_size=30), st.integers(0, 200)))
def test_logs_cut_anywhere(folder, left):
    garbage, cut = left
    path = folder / "mmts.jsonl"
    lines = [json.dumps({"step": step, "tau_base": step / 7}) for step in range(4)]
    path.write_bytes((garbage + "\n".join([*lines, ""]).encode())[:cut])
    before = path.read_bytes()
    for line in lines:
        _append(path, line)
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().endswith(("\n".join([*lines, ""])).encode())
    after = path.read_bytes()[len(before) :]
    assert after[:1] == (b"\n" if before and not before.endswith(b"\n") else b"{")
