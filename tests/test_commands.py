"""The commands of ``mmts`` by name: one module each, imported alone, and the former names of flags."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from conftest import run_python

import mmts_plugins.commands
from mmts_plugins.cli import _parser
from mmts_plugins.commands import COMMANDS

HEAVY = ["torch", "numpy", "pandas", "sklearn", "pyarrow", "matplotlib", "open_clip", "sentence_transformers"]


def test_every_command_has_its_module() -> None:
    folder = Path(mmts_plugins.commands.__file__).parent
    assert {path.stem for path in folder.glob("[a-z]*.py")} == set(COMMANDS)


LISTS_WHAT_HOSTS_HAVE = ("stability", "schedule", "plot", "report")  # presets and flags, which adapters hold


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_one_command_and_nothing_heavy(command: str) -> None:
    code = (
        "import json, sys\n"
        "from mmts_plugins.cli import main\n"
        "try:\n"
        f"    main({[command] * bool(command)} + ['--help'])\n"
        "except SystemExit as done:\n"
        "    assert not done.code\n"
        "ours = [name.rpartition('.')[2] for name in sys.modules if name.startswith('mmts_plugins.commands.')]\n"
        f"print(json.dumps([[name for name in ours if name[0] != '_'], sorted({{*{HEAVY}}} & {{*sys.modules}})]))"
    )
    said = run_python("-c", code).stdout
    assert said.startswith("usage: mmts")
    modules, heavy = json.loads(said.splitlines()[-1])
    assert modules == [command] * bool(command)
    assert set(heavy) <= ({"torch", "numpy", "pyarrow"} if command in LISTS_WHAT_HOSTS_HAVE else set())


@pytest.mark.parametrize(
    ("argv", "name", "value", "hidden"),
    [
        (["doctor", "--clusters", "c"], "table", "c", "--clusters"),
        (["stability", "--tables", "a", "b"], "table", ["a", "b"], "--tables"),
        (["compare", "-o", "out", "--clusters", "c"], "table", "c", "--clusters"),
        (["cluster", "-o", "out", "--clusters", "7"], "clusters", 7, "--clusters"),
        (["stability", "--clusters", "7"], "clusters", 7, "--clusters"),
    ],
)
def test_former_names_of_flags_are_taken_and_not_told(
    argv: list[str], name: str, value: object, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser: argparse.ArgumentParser = _parser(argv[0])
    assert getattr(parser.parse_args(argv), name) == value
    with pytest.raises(SystemExit):
        parser.parse_args([argv[0], "--help"])
    assert f"{hidden} " not in capsys.readouterr().out.replace("--mmts-clusters", "")
