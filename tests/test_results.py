"""Tables of docs/results.md, computed again from what every run gave (docs/pilots/*.csv)."""

from __future__ import annotations

import csv
import importlib.util
import json
import shlex
from collections import defaultdict
from types import ModuleType

import numpy as np
import pytest
from conftest import REPOSITORY

stats = pytest.importorskip("scipy.stats", reason="needs the extra: pip install 'mmts-plugins[cluster]'")

RUNS = sorted((REPOSITORY / "docs" / "pilots").glob("*.csv"))
TEXT = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", REPOSITORY / "examples" / "pilots" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_runs_of_three_sets_and_of_eight_seeds():
    assert len(RUNS) >= 4
    for path in RUNS:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        seeds = defaultdict(set)
        for row in rows:
            seeds[row["loss"], row["metric"], row["variant"]].add(int(row["seed"]))
        assert {loss for loss, _, _ in seeds} <= {"InfoNCE", "max-margin"}
        assert len(seeds) >= 12
        assert all(found == set(range(8)) for found in seeds.values()), path


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_document_has_the_table_of_the_runs(path):
    module = tables()
    values = module.of_runs(path)
    one = len({metric for _, metric, _ in values}) == 1
    for groups in [["all", "tail"]] if one else [["all"], ["tail"]]:  # or it would be too wide
        made = module.table(values, groups)
        assert len(made.splitlines()) >= 8
        assert made in TEXT, made


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_row_by_scipy(path):
    """The interval and its bold print, by somebody else's paired t-test."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    loss, metric = rows[0]["loss"], rows[0]["metric"]
    rows = [row for row in rows if row["loss"] == loss]
    values = {name: [100 * float(row["all"]) for row in rows if (row["variant"], row["metric"]) == (name, metric)]
              for name in ("plain", "TS")}  # fmt: skip
    assert len(values["TS"]) == 8
    found = stats.ttest_rel(values["TS"], values["plain"])
    low, high = found.confidence_interval(0.95)
    shown = f"{np.mean(values['TS']) - np.mean(values['plain']):+.2f} [{low:+.2f}, {high:+.2f}]"
    module = tables()
    row = next(line for line in module.table(module.of_runs(path), ["all"]).splitlines() if line.startswith("| TS |"))
    assert row.split("|")[2].strip() == (f"**{shown}**" if found.pvalue < 0.05 else shown)


def test_the_document_has_the_table_of_pairs():
    """Of its own command, which names the files and the pairs."""
    module = tables()
    command = shlex.split(TEXT[TEXT.index("cd docs/pilots && python") :].split("\n\n")[0].replace("\\\n", " "))
    pairs = [tuple(after.split("=")) for word, after in zip(command, command[1:]) if word == "--minus"]
    files = [RUNS[0].parent / word for word in command if word.endswith(".csv")]
    assert (len(pairs), len(files)) == (6, 3)
    assert module.pairs_table(module.beside(files), ["all"], pairs) in TEXT


def test_runs_are_saved_and_read(tmp_path):
    """Two losses with other names for a row; a metric without thirds; seeds that one variant lacks."""
    module = tables()
    for loss, name in (("a", "constant 0.05"), ("b", "constant 0.2")):
        entry = {"all": {"values": {"0": 0.5, "1": 0.25}}, "tail": {"values": {"0": 0.1, "1": 0.3}}}
        other = {"all": {"values": {"0": 0.75, "1": 0.5}}, "tail": {"values": {"0": 0.1}}}
        (tmp_path / loss).mkdir()
        document = {"metrics": {"plain": {"m_R@1": entry}, name: {"m_R@1": other}}}
        (tmp_path / loss / "pilot.json").write_text(json.dumps(document))
    values = module.of_documents({loss: tmp_path / loss for loss in "ab"}, ["m_R@1"])
    module.save(values, tmp_path / "runs.csv")
    assert module.of_runs(tmp_path / "runs.csv") == values
    assert module.table(values, ["all", "tail"]).splitlines() == [
        "|  | a, m R@1, all | a, m R@1, tail | b, m R@1, all | b, m R@1, tail |",
        "| --- | --- | --- | --- | --- |",
        "| plain | 37.5 | 20.0 | 37.5 | 20.0 |",
        "| constant 0.05 / 0.2 | **+25.00 [+25.00, +25.00]** | +0.00 | **+25.00 [+25.00, +25.00]** | +0.00 |",
    ]
