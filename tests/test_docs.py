"""What the documents say: their examples run, their links lead somewhere, the commands and tests they name exist."""

from __future__ import annotations

import doctest
import importlib
import math
import re
import shlex
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import yaml
from conftest import REPOSITORY

import mmts_plugins
from mmts_plugins import cli
from mmts_plugins.presets import presets
from mmts_plugins.tables import ClusterTable

README, CONTRIBUTING = REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"
EXAMPLES = sorted(REPOSITORY.glob("examples/*/README.md"))
WORKFLOW = REPOSITORY / ".github" / "workflows" / "ci.yml"
GLOSSARY = REPOSITORY / "docs" / "glossary.md"
PAGES = [README, CONTRIBUTING, *sorted(REPOSITORY.glob("docs/*.md")), *EXAMPLES]


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(text: str) -> list[str]:
    """Lines of fenced and of indented code, continued ones joined."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    .*(?:\n    .*)*", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
    return re.sub(r"\\\n\s*", " ", "\n".join([*fenced, *indented])).splitlines()


# -- docstrings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("schedule:CosineSchedule", 4),
        ("functional:info_nce", 6),
        ("functional:max_margin", 6),
        ("clusters:cluster_shift", 2),
        ("clusters:ClusterTable.build", 6),
    ],
)
def test_examples_of_docstrings(name, least):
    module, _, path = name.partition(":")
    documented = attrgetter(path)(importlib.import_module(f"mmts_plugins.{module}"))
    (found,) = doctest.DocTestFinder(recurse=False).find(documented, name, module=False, globs={})
    said: list[str] = []
    failed, ran = doctest.DocTestRunner().run(found, out=said.append)
    assert not failed, "".join(said)
    assert ran >= least


# -- the trainer of one's own in the README ----------------------------------------------------------------------------


def test_own_trainer_of_the_readme(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", text_of(README), re.MULTILINE | re.DOTALL)
    known, sizes = ["a dog", "a cat", "a theremin"], [40, 25, 2]
    ClusterTable.build(known, [0, 1, 2], sizes, sizes).save(tmp_path / "clusters.parquet")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1).requires_grad_() for _ in range(2))
    names: dict[str, Any] = {
        "captions": ["a cat", "nowhere in the table", "a dog", "a theremin"],
        "image_features": images,
        "text_features": texts,
        "device": "cpu",
        "rank": 0,
        "world_size": 1,
        "step": 7,
        "total_steps": 100,
    }
    exec(code, names)
    loss, temperature = names["loss"], names["temperature"]
    assert math.isfinite(loss.item())
    # What the table does not know counts as rare as its rarest.
    expected = torch.from_numpy(reference.temperature([25, 2, 40, 2], sizes, 0.04, 0.05, 0.10, 7, 20))
    torch.testing.assert_close(temperature.double(), expected, rtol=0, atol=1e-7)
    ours = reference.info_nce(images.detach().double(), texts.detach().double(), expected)
    torch.testing.assert_close(loss.detach().double(), ours, rtol=1e-5, atol=0)
    loss.backward()
    assert all(features.grad.abs().sum() > 0 for features in (images, texts))


# -- links -------------------------------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    """The targets of inline links and of link definitions, outside code."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere. Anchors of docstrings are left to ``mkdocs build --strict``."""
    wrong = []
    for link in links(text_of(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if re.match(r"[a-z]+:", link) or (target.exists() and (not anchor or anchor.startswith("mmts_plugins."))):
            continue
        if not target.exists() or anchor not in anchors(target):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    assert not broken(page)


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "other.md").write_text("# Some of: them\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n[a](other.md) [b](other.md#some-of-them) [c](gone.md) [d](other.md#none) [e](https://x.org)\n"
        "[`f`](#page) [g](#no) `[h](code)`\n\n[i]: lost\n"
    )
    assert broken(page) == ["gone.md", "other.md#none", "#no", "lost"]
    assert sum(len(links(text_of(page))) for page in PAGES) > 60


# -- commands, targets and tests that are named ------------------------------------------------------------------------


def helped(capsys, *command: str) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def commands_of(page: Path) -> list[list[str]]:
    """Every ``mmts ...`` that a page tells to type, in words."""
    lines = [line.strip().removeprefix("$ ") for line in code_of(text_of(page))]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("mmts ")]


def test_commands_exist(capsys):
    known = re.findall(r"^    (\w+)", helped(capsys), re.MULTILINE)
    flags: dict[tuple[str, ...], set[str]] = {}
    seen = []
    for page in PAGES:
        for words in commands_of(page):
            name, where = words[1], f"{name_of(page)}: {' '.join(words)}"
            assert name in known, where
            if name == "run":
                continue  # what follows is the host's
            command = tuple(words[1 : 3 if name in ("plot", "analyze") else 2])
            if command not in flags:
                flags[command] = set(re.findall(r"--[\w-]+", helped(capsys, *command)))
            missing = {word.partition("=")[0] for word in words if word.startswith("--")} - flags[command]
            assert not missing, where
            seen.append(name)
        for name in re.findall(r"`mmts (\w+)", text_of(page)):
            assert name in known, f"{name_of(page)}: mmts {name}"
    assert len(seen) > 25
    assert {"cluster", "doctor", "eval", "compare", "report", "plot", "schedule"} <= set(seen)


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", text_of(REPOSITORY / "Makefile"), re.MULTILINE)
    for page in PAGES:
        code = [*code_of(text_of(page)), *re.findall(r"`([^`\n]+)`", text_of(page))]
        named = {line.split()[1] for line in code if re.match(r"\s*make \w", line)}
        assert named <= set(targets), name_of(page)


def test_tests_that_are_named_exist():
    files = {path.name: text_of(path) for path in REPOSITORY.glob("tests/**/test_*.py")}
    tests = set(re.findall(r"^def (test_\w+)", "\n".join(files.values()), re.MULTILINE))
    named_files = {name for page in [*PAGES, WORKFLOW] for name in re.findall(r"\btest_\w+\.py", text_of(page))}
    named_tests = {name for page in PAGES for name in re.findall(r"::(test_\w+)", text_of(page))}
    assert named_files <= set(files)
    assert named_tests <= tests
    assert len(named_files) > 10
    assert len(named_tests) > 10


def test_places_that_are_named_exist():
    named = re.findall(
        r"`((?:mmts_plugins|adapters|patches|tests|docs|\.github)/[\w./*-]*|\w+\.toml)`", text_of(CONTRIBUTING)
    )
    assert len(named) > 15
    for place in named:
        assert "NAME" in place or any(REPOSITORY.glob(place)), place


# -- the same facts in several places ----------------------------------------------------------------------------------


def test_presets_of_the_glossary():
    rows = re.findall(
        r"^\| `([\w-]+)` \| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text_of(GLOSSARY), re.MULTILINE
    )
    told = {name: (f"mmts-{loss.lower()}", *map(float, numbers)) for name, loss, *numbers in rows}
    assert told == {name: tuple(preset) for name, preset in presets().items()}


def test_the_paper_and_the_version_are_cited_alike():
    citation = yaml.safe_load(text_of(REPOSITORY / "CITATION.cff"))
    paper, readme = citation["preferred-citation"], text_of(README)
    authors = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    assert f"author  = {{{authors}}}" in readme
    assert f"title   = {{{paper['title']}}}" in readme
    assert f"journal = {{{paper['journal']}}}" in readme
    assert f"year    = {{{paper['year']}}}" in readme
    project = re.search(r'^version = "(.+)"$', text_of(REPOSITORY / "pyproject.toml"), re.MULTILINE)
    assert project is not None
    assert citation["version"] == project[1] == mmts_plugins.__version__
