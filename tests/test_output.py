"""Every command of ``mmts`` where it cannot write, where names are no UTF-8, and where nobody reads what it prints."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python
from forked import run_forked

from mmts_plugins.tables import ClusterTable

WORDS = ["dog", "cat", "café", "bird", "car", "tree"]
CAPTIONS = [f"a photo of a {word}" for word in WORDS for _ in range(6)]
NOT_UTF8 = os.fsdecode(b"caf\xe9")
WRITING = {
    "cluster": ["cluster", "{captions}", "-k", "2", "--encoder", "tfidf", "-o", "{out}.parquet"],
    "stability": ["stability", "--table", "{table}", "{table}", "-o", "{out}.json"],
    "plot": ["plot", "schedule", "--total-steps", "100", "-o", "{out}.png"],
    "report": ["report", "{table}", "-o", "{out}"],
    "eval": ["eval", "--image-features", "{features}", "--text-features", "{features}", "-o", "{out}.json"],
    "demo": ["demo", "--epochs", "1", "--output", "{out}"],
    "compare": ["compare", "{plan}", "-o", "{out}"],
}
FILES = {"captions": "captions.txt", "table": "table.parquet", "features": "features.npy", "plan": "plan.yaml"}
PRINTING = {
    "schedule": ["schedule", "--host=openclip", "--total-steps=9", "--loss=mmts", "--mmts-clusters", "{table}"],
    "doctor": ["doctor", "--table", "{table}"],
    "help": ["--help"],
    "dry": ["compare", "{plan}", "-o", "{out}", "--dry-run"],
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def make_inputs(folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    keys = list(dict.fromkeys(CAPTIONS))
    ClusterTable.build(keys, [0, 0, 1, 1, 2, 2], [12.0] * 6, [6] * 6).save(folder / "table.parquet")
    np.save(folder / "features.npy", np.eye(6, dtype=np.float32))
    plan = {"command": "true {flags} {seed}", "variants": {"plain": "", "other": "x"}, "seeds": [0, 1]}
    plan = {**plan, "done": "{output}/{run}.pt", "eval": "true {result}"}
    (folder / "plan.yaml").write_text(json.dumps(plan))
    return {name: str(folder / file) for name, file in FILES.items()}


def words(template: list[str], inputs: dict[str, str], out: object) -> list[str]:
    return [word.format(out=out, **inputs) for word in template]


CHILD = """
import contextlib, io, json, os, sys
from mmts_plugins import cli
done = []
for argv, before in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    undo = lambda: None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        exec(before)
        code = cli.main(argv)
        undo()
    done.append([code, err.getvalue().splitlines()])
print(json.dumps(done))
"""


def run(*cases: tuple[list[str], str], **environment: str) -> list[tuple[int, list[str]]]:
    """Of each command line (and what is done before it): the exit status, and the lines on standard error."""
    done = run_forked("-c", CHILD, json.dumps(cases), **environment)
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_refused(code: int, errors: list[str], about: str) -> None:
    ours = [line for line in errors if line.startswith("mmts: error: ")]
    assert code == 2, errors
    assert len(ours) == 1, errors
    assert errors[-1] == ours[0]
    assert len(ours[0]) <= 500
    assert about in ours[0]
    assert "Traceback" not in "\n".join(errors)


PLACES = {
    "under a file": ("{folder}/file/out", "Not a directory|File exists|not a writable folder"),
    "a folder that cannot be": ("/proc/nothing/out", "No such file or directory|Permission denied"),
    "a long name": ("{folder}/" + "n" * 300, "File name too long"),
    "a long path": ("{folder}" + "/nnnnnnnnn" * 500, "File name too long"),
    "a NUL": ("{folder}/a\0b", "NUL|null"),
}


@pytest.mark.parametrize("command", WRITING)
def test_where_nothing_can_be_written(command, inputs, tmp_path):
    (tmp_path / "file").write_text("")
    places = [(place.format(folder=tmp_path), why) for place, why in PLACES.values()]
    cases = [(words(WRITING[command], inputs, out), "") for out, _ in places]
    for (out, why), (code, errors) in zip(places, run(*cases, MMTS_CACHE=str(tmp_path / "cache"))):
        assert_refused(code, errors, "")
        assert any(each in errors[-1] for each in why.split("|")), errors
        about = ("nnnnnnn", "/file", "/proc/nothing", "\\x00")
        assert any(each in errors[-1] for each in about if each.strip("\\x") in out or each == "\\x00"), errors
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "cache"}


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, limits[1]))
undo = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
"""


@pytest.mark.parametrize("command", WRITING)
def test_a_disk_that_is_full(command, inputs, tmp_path):
    """No file may be longer than some bytes: the system's own error, wherever it comes."""
    cases = [(words(WRITING[command], inputs, tmp_path / f"out{n}" / "o"), FULL.format(bytes=n)) for n in (0, 100)]
    for code, errors in run(*cases, MMTS_CACHE=str(tmp_path / "cache")):
        assert_refused(code, errors, "File too large")
        assert str(tmp_path) in errors[-1]
    files = [path for number in (0, 100) for path in (tmp_path / f"out{number}").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".tmp"]
    if command not in ("demo", "compare", "report"):  # one file: whole or not at all
        assert files == []


@pytest.mark.parametrize("command", [name for name in (*WRITING, *PRINTING) if name not in ("demo", "compare", "help")])
def test_names_that_are_not_utf_8(command, tmp_path):
    make_inputs(tmp_path / "in")
    os.rename(tmp_path / "in", tmp_path / f"in {NOT_UTF8}")
    inputs = {name: str(tmp_path / f"in {NOT_UTF8}" / Path(file).name) for name, file in FILES.items()}
    argv = words({**WRITING, **PRINTING}[command], inputs, tmp_path / f"out {NOT_UTF8}")
    ((code, errors),) = run((argv, ""), MMTS_CACHE=str(tmp_path / NOT_UTF8))
    written = [name for name in os.listdir(tmp_path) if name.startswith("out ")]
    if code == 2:  # Parquet and PNG are written by libraries that take no such names
        assert_refused(code, errors, "UTF-8")
        assert written == []
    else:
        assert not [line for line in errors if "Traceback" in line or line.startswith("mmts: error")]
        assert code == (1 if command == "doctor" and not errors else 0) or command == "doctor"
        assert len(written) == (command in WRITING)


PRINTED = {
    "a full disk": ("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", 2, "No space left on device"),
    "a closed pipe": ("ends = os.pipe(); os.close(ends[0]); os.dup2(ends[1], 1)", 141, None),
}
PRINTS = """
import json, os, sys
handle = os.dup(1)
{before}
sys.stderr = open(handle, "w", buffering=1)
sys.stdout = open(1, "w", closefd=False)
from mmts_plugins import cli
try:
    code = cli.main(json.loads(sys.argv[1]))
except SystemExit as ended:
    code = ended.code
sys.stdout.flush()
print("code", code, file=sys.stderr)
os.dup2(handle, 1)
"""


@pytest.mark.parametrize("how", PRINTED)
@pytest.mark.parametrize("command", [*PRINTING, "eval", "stability"])
def test_standard_output_that_takes_nothing(command, how, inputs, tmp_path):
    before, expected, message = PRINTED[how]
    argv = words({**WRITING, **PRINTING}[command], inputs, tmp_path / "out")
    done = run_forked("-c", PRINTS.format(before=before), json.dumps(argv))
    lines = [line for line in done.stdout.splitlines() if not line.startswith("MM-TS")]
    assert lines[-1] == f"code {expected}", done.stdout
    assert "Traceback" not in done.stdout
    errors = [line for line in lines if line.startswith("mmts: error: ")]
    assert len(errors) == (message is not None)
    assert all(message in line and "standard output" in line for line in errors)


@pytest.mark.parametrize("command", ["schedule", "doctor", "dry"])
def test_standard_output_that_is_closed(command, inputs, tmp_path):
    argv = words(PRINTING[command], inputs, tmp_path / "out")
    code = "import json, sys; from mmts_plugins import cli; sys.stdout = None; "
    done = run_forked(
        "-c",
        code + "print(cli.main(json.loads(sys.argv[1])), file=sys.stderr); sys.stdout = sys.stderr",
        json.dumps(argv),
    )
    assert done.stdout.splitlines()[-1] in ("0", "1" if command == "doctor" else "0")
    assert "Traceback" not in done.stdout


def test_a_locale_that_knows_ascii_only(inputs, tmp_path):
    """Started for real: Python asks the locale once. Nothing of ours asks it for the encoding of a file."""
    argvs = [
        words({**WRITING, **PRINTING}[name], inputs, tmp_path / f"out {name}")
        for name in (*WRITING, *PRINTING)
        if name not in ("demo", "compare", "help")
    ]
    code = (
        "import json, sys; from mmts_plugins import cli; print('codes', [cli.main(a) for a in json.loads(sys.argv[1])])"
    )
    strict = ["-X", "warn_default_encoding"] if sys.version_info >= (3, 10) else []
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = run_python(*strict, "-c", code, json.dumps(argvs), MMTS_CACHE=str(tmp_path / "cache"), **environment)
    assert "Traceback" not in done.stdout, done.stdout[-3000:]
    warned = [line for line in done.stdout.splitlines() if "EncodingWarning" in line and "mmts_plugins" in line]
    assert warned == []
    doctor = [name for name in (*WRITING, *PRINTING) if name not in ("demo", "compare", "help")].index("doctor")
    codes = json.loads(done.stdout.splitlines()[-1].replace("codes ", ""))
    assert [code for number, code in enumerate(codes) if number != doctor] == [0] * (len(argvs) - 1), done.stdout
    assert {path.stem for path in tmp_path.iterdir()} >= {
        f"out {name}" for name in WRITING if name[:4] not in ("demo", "comp")
    }
