"""Plans, states and evaluations of ``mmts compare``: what is taken is what was written, the rest is one line."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import fuzz, survives
from hypothesis import strategies as st

from mmts_plugins.compare import plan as plans
from mmts_plugins.compare import tables
from mmts_plugins.compare.execute import STATE, State

GOOD = {
    "command": "python train.py --seed {seed} --out '{output}/{run}'",
    "done": "{output}/{run}/done.pt",
    "eval": "mmts eval {done} -o {result}",
    "resume": "--resume latest",
    "clusters": "c.parquet",
    "seeds": [0, 1],
    "metrics": ["R@1"],
}
KNOWN = {"status": "failed", "command": "python x", "attempts": 2, "seconds": 1.5, "error": None}
RESULT = {"metrics": {"R@1": {"value": 0.5, "head": {"value": 0.25}, "tail": None}, "rank": 3}}

words = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "a\0b", "\ud800", "x" * 200_000, "'", "{flags}", "{seed}", "{run}", "a{flags}", "--", "|"]
    ),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400), words, st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
damage = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


def damaged(text: str, changes: list[tuple[int, int]]) -> bytes:
    content = bytearray(text.encode())
    for place, byte in changes:
        content[place % len(content)] = byte
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check(plan: Any) -> None:
    """Commands that can be started, of runs that share neither a name, a file nor a seed."""
    assert len(plan.runs) == len(plan.variants) * len(plan.seeds)
    for name in ("name", "result", "done"):
        assert len({getattr(run, name) for run in plan.runs}) == len(plan.runs)
    for run in plan.runs:
        for command in (run.command, run.resumed, run.evaluation):
            assert command[0]
            assert all(isinstance(word, str) and "\0" not in word and "{flags}" not in word for word in command)
        assert run.name.isascii()


@fuzz(st.sampled_from(sorted({*GOOD, "variants", "mmts", "folder", "other"})), anything)
def test_a_key_replaced_by_anything(folder: Path, key: str, value: Any) -> None:
    file = folder / "plan.yaml"
    try:
        file.write_text(yaml.safe_dump({**GOOD, key: value}, allow_unicode=True), encoding="utf-8", errors="replace")
    except yaml.YAMLError:
        return
    plan = survives(lambda: plans.make(plans.read(str(file)), str(folder / "out")))
    if plan is not None:
        check(plan)
        if key == "seeds":
            assert plan.seeds == value


@fuzz(damage)
def test_a_damaged_plan(folder: Path, changes: list[tuple[int, int]]) -> None:
    file = folder / "plan.yaml"
    file.write_bytes(damaged(yaml.safe_dump(GOOD), changes))
    plan = survives(lambda: plans.make(plans.read(str(file)), str(folder / "out")))
    if plan is not None:
        check(plan)


@fuzz(st.one_of(st.binary(max_size=200), st.text("[]{}:-,&*!|>'\"? \n\tab01<=~", max_size=200).map(str.encode)))
def test_no_plan_at_all(folder: Path, content: bytes) -> None:
    (folder / "plan.yaml").write_bytes(content)
    survives(lambda: plans.make(plans.read(str(folder / "plan.yaml")), str(folder / "out")))


@fuzz(words)
def test_launchers(launcher: str) -> None:
    command = survives(lambda: plans.launched(["a", "b c"], launcher))
    if command is not None and "{command}" not in launcher:
        assert command == [*shlex.split(launcher), "a", "b c"]


@fuzz(st.sampled_from([*KNOWN, "other", "whole"]), anything)
def test_a_state_with_anything_in_it(folder: Path, key: str, value: Any) -> None:
    content = value if key == "whole" else {"runs": {"plain-seed0": {**KNOWN, key: value}}}
    (folder / STATE).write_text(json.dumps(content, default=str), errors="replace")
    state = survives(lambda: State(folder))
    if state is not None and key in KNOWN:
        assert state.runs == json.loads((folder / STATE).read_text())["runs"]


@fuzz(damage)
def test_a_damaged_state(folder: Path, changes: list[tuple[int, int]]) -> None:
    """A run counts as trained only where the file says so, letter for letter."""
    text = json.dumps({"runs": {"plain-seed0": KNOWN}}, indent=2)
    (folder / STATE).write_bytes(damaged(text, changes))
    state = survives(lambda: State(folder))
    if state is not None:
        for known in state.runs.values():
            assert known["status"] == "failed"


@fuzz(anything, st.booleans())
def test_an_evaluation_with_anything_in_it(folder: Path, value: Any, inside: bool) -> None:
    content = {"metrics": {"R@1": value, "rank": 3}} if inside else value
    (folder / "r.json").write_text(json.dumps(content, default=str), errors="replace")
    found = survives(lambda: tables.metrics(folder / "r.json"))
    if found is not None:
        assert all(math.isfinite(number) for groups in found.values() for number in groups.values())
        if inside and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            assert found == {"R@1": {"all": value}, "rank": {"all": 3}}


@fuzz(damage)
def test_a_damaged_evaluation(folder: Path, changes: list[tuple[int, int]]) -> None:
    (folder / "r.json").write_bytes(damaged(json.dumps(RESULT), changes))
    found = survives(lambda: tables.metrics(folder / "r.json"))
    for groups in (found or {}).values():
        assert all(math.isfinite(number) for number in groups.values())
