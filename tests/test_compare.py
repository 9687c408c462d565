"""``mmts compare``: commands, what is resumed and what is not run again, and the tables; with real subprocesses."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from conftest import REPOSITORY, openclip_flags, run_python
from scipy.stats import ttest_rel

from mmts_plugins.adapters.openclip import ADAPTER
from mmts_plugins.cli import _parser, main
from mmts_plugins.compare import execute, picture, tables
from mmts_plugins.compare import lock as locks
from mmts_plugins.compare import plan as plans
from mmts_plugins.compare.execute import State
from mmts_plugins.compare.lock import LOCK
from mmts_plugins.errors import ConfigError, MMTSError
from mmts_plugins.options import split_flags
from mmts_plugins.processes import run_logged

# A trainer as a comparison sees one: says what it was given, may die half-way, leaves a checkpoint.
HOST = """
import argparse, os, pathlib, subprocess, sys, time
parser = argparse.ArgumentParser()
for flag in ("--seed", "--out", "--loss", "--mmts-clusters", "--resume"):
    parser.add_argument(flag)
parser.add_argument("--mmts-no-shifts", action="store_true")
parser.add_argument("--mmts-no-schedule", action="store_true")
parser.add_argument("--mmts-mean-matched", action="store_true")
parser.add_argument("--mmts-shuffle-shifts")
args = parser.parse_args()
out = pathlib.Path(args.out)
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if (pathlib.Path.cwd() / "kill").exists() and "TS-ICS-seed1" in args.out and not args.resume:
    sys.exit("the node was taken away")
if (pathlib.Path.cwd() / "slow").exists():
    # As a rank of torchrun's: a grandchild in a session of its own.
    rank = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (pathlib.Path.cwd() / "slow").write_text(f"{os.getpid()} {rank.pid}\\n")
    time.sleep(600)
if (pathlib.Path.cwd() / "lazy").exists():
    sys.exit(0)
score = int(args.seed) + 10 * bool(args.mmts_clusters) + 3 * args.mmts_no_shifts
(out / "done.pt").write_text(str(score))
"""
JUDGE = """
import json, pathlib, sys
score = int(pathlib.Path(sys.argv[1]).read_text()) / 100
low = {"value": score / 2}
json.dump({"metrics": {"image_to_text_R@1": {"value": score, "head": {"value": score}, "middle": low, "tail": low},
                       "image_to_text_mean_rank": {"value": 100 * score}}}, open(sys.argv[2], "w"))
"""
VARIANTS = ["plain", "TS", "ICS", "TS&ICS"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "host.py").write_text(HOST)
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "with blank").mkdir()
    content = {
        "command": "{python} host.py --seed {seed} --out '{output}/runs/{run}'",
        "clusters": "with blank/clusters.parquet",
        "controls": False,
        "seeds": [0, 1, 4],
        "done": "{output}/runs/{run}/done.pt",
        "resume": "--resume latest",
        "eval": "{python} judge.py {done} {result}",
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def compare(folder: Path, *flags: str) -> int:
    return main(["compare", str(folder / "plan.yaml"), "-o", str(folder / "with blank" / "out"), *flags])


def calls(folder: Path) -> dict[str, list[str]]:
    runs = folder / "with blank" / "out" / "runs"
    return {run.name: (run / "calls.txt").read_text().splitlines() for run in sorted(runs.iterdir())}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "with blank" / "out" / "compare.json").read_text())


def test_the_picture_holds_differences_to_the_first_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is drawn: the metrics that judge, without ranks, what stands beside R@1, and what was not evaluated."""
    names = ["image_to_text_R@1", "image_to_text_R@10", "image_to_text_median_rank", "zero_shot_top1"]
    values = {name: {m: {"all": {0: 0.25 + add, 1: 0.5 + 2 * add}} for m in names}
              for name, add in (("plain", 0.0), ("TS", 0.1))} | {"none": {}}  # fmt: skip
    made = plans.Plan([], [*values], [0, 1], [("TS", "plain"), ("none", "plain")], [], tmp_path, tmp_path)
    panels = tables._panels(made, tables.summary(values, made.contrasts))
    assert [panel.title for panel in panels] == ["image → text_R@1", "zero_shot_top1"]
    assert list(panels[0].entries) == ["TS", "none"]
    assert panels[0].entries["none"] is None
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, x, y, *_, **__: drawn.append((x, y)))
    picture.draw(tmp_path / "c.png", panels, "points")
    assert len(drawn) == 4
    assert drawn[1] == ([pytest.approx(15)], [0])
    assert drawn[0][0] == pytest.approx([15 - 12.706 * 5, 15 + 12.706 * 5], rel=1e-4)
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_four_variants_over_three_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(folder) == 0
    said = capsys.readouterr().out
    assert "12 of 12 runs finished" in said
    assert "compare.csv, compare.png" in said
    made = calls(folder)
    assert all(len(of_run) == 1 for of_run in made.values())
    flags = {name: shlex.split(made[f"{name}-seed0"][0]) for name in ("plain", "TS", "ICS", "TS-ICS")}
    assert "--loss" not in flags["plain"]
    assert flags["TS"][-3:] == ["--loss", "mmts", "--mmts-no-shifts"]
    table = ["--loss", "mmts", "--mmts-clusters", "with", "blank/clusters.parquet"]  # " ".join took the quotes
    assert flags["ICS"][-6:] == [*table, "--mmts-no-schedule"]
    assert flags["TS-ICS"][-5:] == table

    found = results(folder)["metrics"]
    scores = [0.10, 0.11, 0.14]
    entry = found["TS&ICS"]["image_to_text_R@1"]["all"]
    assert entry["mean"] == pytest.approx(statistics.fmean(scores))
    assert entry["sd"] == pytest.approx(statistics.stdev(scores))
    assert entry["values"] == {"0": 0.1, "1": 0.11, "4": 0.14}
    # Seed by seed the gain is always ten points, so its deviation is none, whatever the seeds' own.
    assert list(entry["differences"]) == ["plain"]
    assert entry["differences"]["plain"]["mean"] == pytest.approx(0.1)
    assert entry["differences"]["plain"]["se"] == pytest.approx(0)
    assert found["TS&ICS"]["image_to_text_R@1"]["tail"]["differences"]["plain"]["mean"] == pytest.approx(0.05)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert lines[0] == ["", "seeds", "image_to_text_R@1"]  # ranks are left out unless asked for
    assert ["plain", "3", "1.7 ± 2.1"] in lines
    assert ["TS&ICS", "3", "11.7 ± 2.1"] in lines
    assert ["TS&ICS − plain", "3", "+10.0 [+10.0, +10.0]"] in lines
    with open(folder / "with blank" / "out" / "compare.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 5
    assert {"variant": "ICS", "seed": "4", "metric": "image_to_text_R@1", "group": "tail", "value": "0.07"} in rows
    assert compare(folder) == 0
    assert calls(folder) == made, "finished runs were run again"


def test_a_run_that_died_is_resumed_and_stops_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "kill").touch()
    assert compare(folder) == 1
    said = capsys.readouterr().out
    assert "11 of 12 runs finished" in said
    assert "failed: TS-ICS-seed1" in said
    assert "the node was taken away" in said
    assert sorted(results(folder)["metrics"]["TS&ICS"]["image_to_text_R@1"]["all"]["values"]) == ["0", "4"]
    before = calls(folder)
    assert compare(folder) == 0
    after = calls(folder)
    assert {name for name in after if after[name] != before[name]} == {"TS-ICS-seed1"}
    assert after["TS-ICS-seed1"][1] == f"{after['TS-ICS-seed1'][0]} --resume latest"
    state = State(folder / "with blank" / "out").runs["TS-ICS-seed1"]
    assert (state["status"], state["attempts"], state["error"]) == ("finished", 2, None)


def test_a_state_left_by_a_killed_comparison_is_resumed(folder: Path) -> None:
    output = folder / "with blank" / "out"
    content = plans.read(str(folder / "plan.yaml"))
    run = plans.make({**content, "seeds": [0]}, str(output)).runs[0]
    output.mkdir()
    State(output).update(run, status="running", attempts=1)
    assert compare(folder, "--seeds", "0") == 0
    assert calls(folder)["plain-seed0"][0].endswith("--resume latest")


def test_exit_code_zero_without_a_checkpoint_is_a_failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "lazy").touch()
    assert compare(folder, "--seeds", "0") == 1
    said = capsys.readouterr().out
    assert "ended without an error, but did not write" in said
    assert "0 of 4 runs finished" in said


def heed_signals() -> None:
    """A suite that a shell runs in the background, or under nohup, has these ignored, and its children with it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def started(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A comparison in its own process, training; the processes of its trainer. Of a test that fails none is left."""
    (folder / "slow").touch()
    output = folder / "with blank" / "out"
    command = [sys.executable, "-m", "mmts_plugins", "compare", str(folder / "plan.yaml"), "-o", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed_signals)
    trainer: list[int] = []
    try:
        until = time.monotonic() + 120
        while not (folder / "slow").read_text().endswith("\n"):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        trainer += map(int, (folder / "slow").read_text().split())
        yield process, trainer
    except BaseException:
        for pid in trainer:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    finally:
        process.kill()
        process.wait()


def gone(pid: int, within: float = 20) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_comparison_that_ends_takes_its_trainer_along(how: signal.Signals, folder: Path) -> None:
    """However it ends: the ranks too, which torchrun puts into sessions of their own."""
    with started(folder) as (process, trainer):
        assert len(trainer) == 2
        assert not any(gone(pid, 0.1) for pid in trainer)
        process.send_signal(how)
        expected = 130 if how in (signal.SIGTERM, signal.SIGINT) else -how
        assert process.wait(60) == expected
        if expected == 130:  # it has waited for them
            with pytest.raises(ProcessLookupError):
                os.kill(trainer[0], 0)
        assert all(gone(pid) for pid in trainer)
        state = State(folder / "with blank" / "out").runs["plain-seed0"]
        if expected == 130:
            assert (state["status"], state["error"]) == ("failed", "interrupted")
        else:
            assert (state["status"], state["error"]) == ("running", None)
        (folder / "slow").unlink()
        assert compare(folder, "--seeds", "0") == 0
        made = calls(folder)
        assert [len(of_run) for of_run in made.values()] == [1, 1, 1, 2]  # plain is the last by name
        assert made["plain-seed0"][1].endswith("--resume latest")


def test_a_trainer_outlives_neither_its_keeper_nor_leaves_ranks_behind(folder: Path) -> None:
    with pytest.raises(MMTSError, match=r"exit code 3 from: sh"):
        run_logged(
            ["sh", "-c", f"setsid sleep 600 >/dev/null 2>&1 & echo $! > {shlex.quote(str(folder / 'rank'))}; exit 3"],
            folder,
        )
    rank = int((folder / "rank").read_text())
    try:
        assert gone(rank, 0.1)
    finally:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    if sys.platform != "linux":
        return
    with started(folder) as (process, trainer):
        with open(f"/proc/{trainer[0]}/stat") as file:
            keeper = int(file.read().rpartition(")")[2].split()[1])
        assert keeper != process.pid
        os.kill(keeper, signal.SIGKILL)
        assert gone(trainer[0])
        process.kill()
        process.wait()
        os.kill(trainer[1], signal.SIGKILL)  # whom nobody was left to end


def test_two_comparisons_in_one_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with started(folder) as (process, trainer):
        assert compare(folder, "--seeds", "0") == 2
        said = capsys.readouterr().err
        assert (
            f"another mmts compare is at work there: process {process.pid} on {socket.gethostname()}, since 20" in said
        )
        assert calls(folder) == {"plain-seed0": calls(folder)["plain-seed0"][:1]}
        assert not gone(trainer[0], 0.1)
        # Killed, it still holds the folder until its trainer has ended; whoever comes next waits for that.
        process.kill()
        process.wait()
        (folder / "slow").unlink()
        assert compare(folder, "--seeds", "0") == 0
        assert gone(trainer[0], 0.1)
        assert [len(of_run) for of_run in calls(folder).values()] == [1, 1, 1, 2]


def test_what_a_killed_comparison_left_running_is_not_trained_beside(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where keeper and comparison were killed and the trainer lives on: it holds the lock."""
    output = folder / "with blank" / "out"
    output.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (output / LOCK).write_text(f"{dead.pid} {socket.gethostname()} 2026-01-01 00:00:00\n")
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    with open(output / LOCK) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert compare(folder, "--seeds", "0") == 2
    said = capsys.readouterr()
    assert said.out.count("waiting for what an earlier mmts compare left behind") == 1
    assert f"a command that an earlier mmts compare started there still runs (process {dead.pid} on" in said.err
    assert not (output / "runs").exists()


def test_the_lock_is_a_file_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, mine = folder / "with blank" / "out", folder / "mine.txt"
    output.mkdir()
    mine.write_text("precious")
    for make in (os.symlink, os.link):
        make(mine, output / LOCK)
        assert compare(folder, "--seeds", "0") == 2
        assert "compare.lock: cannot be" in capsys.readouterr().err
        assert mine.read_text() == "precious"
        (output / LOCK).unlink()
    os.mkfifo(output / LOCK)
    assert compare(folder, "--seeds", "0") == 2
    assert "it is no file of its own; remove it" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == [LOCK]


def test_a_folder_without_locks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    assert compare(folder, "--seeds", "0") == 0
    said = capsys.readouterr()
    assert "compare.lock: this file system has no locks (Operation not supported): see to it that" in said.err
    assert "4 of 4 runs finished" in said.out


def torn_checkpoint(path: Path) -> bytes:
    """What a killed ``torch.save`` leaves: the first half of a zip."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 500)
    half = whole.getvalue()[:300]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(half)
    return half


@pytest.mark.parametrize("left", ["half a checkpoint", "half a text", "nothing"])
def test_a_file_that_a_killed_run_left_is_no_proof(left: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenCLIP writes ``epoch_K.pt`` in place."""
    output = folder / "with blank" / "out"
    run = plans.make({**plans.read(str(folder / "plan.yaml")), "seeds": [0]}, str(output)).runs[0]
    output.mkdir()
    State(output).update(run, status="running", attempts=1)
    half = b""
    if left == "half a checkpoint":
        half = torn_checkpoint(run.done)
    elif left == "half a text":
        run.done.parent.mkdir(parents=True)
        run.done.write_text("99")
    assert compare(folder, "--seeds", "0") == 0
    assert len(calls(folder)["plain-seed0"]) == 1
    assert calls(folder)["plain-seed0"][0].endswith("--resume latest")
    assert results(folder)["metrics"]["plain"]["image_to_text_R@1"]["all"]["mean"] == 0
    aside = run.done.with_name("done.pt.unfinished")
    assert aside.exists() == (left == "half a checkpoint")
    if aside.exists():
        assert aside.read_bytes() == half
        assert "done.pt was left by a killed attempt: moved to done.pt.unfinished" in capsys.readouterr().out


def test_only_half_checkpoints_of_the_run_are_moved(folder: Path) -> None:
    output = folder / "with blank" / "out"
    run = plans.make({**plans.read(str(folder / "plan.yaml")), "seeds": [0]}, str(output)).runs[0]
    output.mkdir()
    place = run.done.parent
    for name in ("epoch_2.pt", "tmp.pt", "notes.zip", "epoch_3.pt.unfinished"):
        torn_checkpoint(place / name)
    (place / "epoch_3.pt").write_bytes(b"")
    (place / "epoch_4.pt").write_bytes(b"PK")
    (place / "old.pt").write_bytes(b"\x80\x02 as torch.save wrote before zips")
    with zipfile.ZipFile(place / "epoch_1.pt", "w") as file:
        file.writestr("archive/data.pkl", b"whole")
    other = torn_checkpoint(output / "runs" / "TS-seed1" / "epoch_1.pt")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    State(output).update(run, status="failed", attempts=1)
    assert compare(folder, "--seeds", "0") == 0
    after = {path.name: path.read_bytes() for path in place.iterdir() if path.name not in ("done.pt", "calls.txt")}
    renamed = {"epoch_2.pt": "epoch_2.pt.unfinished", "epoch_4.pt": "epoch_4.pt.unfinished",
               "epoch_3.pt": "epoch_3.pt.unfinished-2"}  # fmt: skip
    assert after == {renamed.get(name, name): content for name, content in before.items()}
    assert (output / "runs" / "TS-seed1" / "epoch_1.pt").read_bytes() == other


def test_a_folder_that_runs_share_is_left_alone(tmp_path: Path) -> None:
    content = {"command": "x {seed}", "eval": "e", "variants": {"a": ""}, "done": "{output}/{run}.pt"}
    plan = plans.make(content, str(tmp_path))
    assert not plan.runs[0].own_folder
    (tmp_path / "another.pt").write_bytes(b"PK\3\4")  # another run may be writing it
    execute._Step(plan, plan.runs[0], State(tmp_path), None, True, None, "")._set_aside()
    assert (tmp_path / "another.pt").exists()
    assert plans.make({**content, "done": "{output}/{run}/a.pt"}, str(tmp_path)).runs[0].own_folder


def test_without_a_way_to_resume_what_is_there_proves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenCLIP: "Experiment already exists", exit status 0, and the file of the killed attempt is still there."""
    output = folder / "with blank" / "out"
    content = {**yaml.safe_load((folder / "plan.yaml").read_text()), "resume": "", "seeds": [0]}
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    run = plans.make(plans.read(str(folder / "plan.yaml")), str(output)).runs[0]
    run.done.parent.mkdir(parents=True)
    run.done.write_text("99")
    State(output).update(run, status="running", attempts=1)
    (folder / "lazy").touch()
    assert compare(folder) == 1
    assert "failed: plain-seed0: the command ended without an error, but did not write" in capsys.readouterr().out
    assert run.done.with_name("done.pt.unfinished").read_text() == "99"


def test_a_run_by_hand_is_taken_only_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "with blank" / "out"
    run = plans.make({**plans.read(str(folder / "plan.yaml")), "seeds": [0]}, str(output)).runs[0]
    run.done.parent.mkdir(parents=True)
    run.done.write_text("44")
    assert compare(folder, "--seeds", "0") == 1
    said = capsys.readouterr().out
    assert "3 of 4 runs finished" in said
    assert "done.pt is there, but no command of this comparison made it: take it as finished (--accept-done)" in said
    assert compare(folder, "--seeds", "0", "--accept-done") == 0
    assert not (run.done.parent / "calls.txt").exists()
    assert results(folder)["metrics"]["plain"]["image_to_text_R@1"]["all"]["mean"] == 0.44
    assert State(output).runs["plain-seed0"]["status"] == "finished"
    torn_checkpoint(run.done.parents[1] / "plain-seed1" / "done.pt")
    assert compare(folder, "--seeds", "1", "--accept-done") == 1
    assert "failed: plain-seed1: taken as it is, but" in capsys.readouterr().out


def test_an_evaluation_that_was_killed_is_made_again(folder: Path) -> None:
    assert compare(folder, "--seeds", "0") == 0
    made, output = calls(folder), folder / "with blank" / "out"
    run = plans.make({**plans.read(str(folder / "plan.yaml")), "seeds": [0]}, str(output)).runs[0]
    whole = run.result.read_text()
    run.result.write_text(whole[:40])
    State(output).update(run, status="trained")
    assert compare(folder, "--seeds", "0") == 0
    assert run.result.read_text() == whole
    assert calls(folder) == made
    assert State(output).runs["plain-seed0"]["status"] == "finished"


def test_a_table_is_of_evaluations_that_have_ended(folder: Path) -> None:
    assert compare(folder, "--seeds", "0") == 0
    plan = plans.make({**plans.read(str(folder / "plan.yaml")), "seeds": [0]}, str(folder / "with blank" / "out"))
    plan.runs[1].result.write_text('{"metr')  # another comparison is writing it
    found = tables.collect(plan, {"plain-seed0"})
    assert found["plain"]["image_to_text_R@1"]["all"] == {0: 0.0}
    assert found["TS"] == found["ICS"] == found["TS&ICS"] == {}


def test_an_evaluation_that_fails_trains_nothing_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = (folder / "judge.py").read_text()
    (folder / "judge.py").write_text("import sys; open(sys.argv[2], 'w').write('[1]'); print('bye')")
    assert compare(folder, "--seeds", "0") == 1
    said = capsys.readouterr().out
    assert "0 of 4 runs finished" in said
    assert "TS-seed0.json: not an evaluation with 'metrics', such as mmts eval writes" in said
    assert results(folder)["metrics"] == {variant: {} for variant in VARIANTS}
    made = calls(folder)
    (folder / "judge.py").write_text(judge)
    assert compare(folder, "--seeds", "0") == 0
    assert calls(folder) == made


def test_what_a_run_took_is_summed_over_its_attempts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 107.25, 200.0, 202.5])
    (folder / "lazy").touch()
    content = {**yaml.safe_load((folder / "plan.yaml").read_text()), "clusters": None, "variants": {"plain": None}}
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(execute.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(execute, "locked", lambda folder: nullcontext())
    assert compare(folder, "--seeds", "0") == 1
    output = folder / "with blank" / "out"
    state = State(output).runs["plain-seed0"]
    assert (state["seconds"], state["attempts"], state["status"]) == (7.2, 1, "failed")
    (folder / "lazy").unlink()
    assert compare(folder, "--seeds", "0") == 0
    state = State(output).runs["plain-seed0"]
    assert (state["seconds"], state["attempts"], state["status"]) == (9.7, 2, "finished")
    assert results(folder)["runs"]["plain-seed0"]["seconds"] == 9.7


def submitted(folder: Path) -> tuple[str, ...]:
    """Flags for a stand-in of sbatch: takes one string, returns at once; the jobs are the lines of ``queue.sh``."""
    queue = folder / "sbatch"
    queue.write_text('#!/bin/sh\nprintf "%s\\n" "$2" >> queue.sh\n')
    queue.chmod(0o755)
    return ("--launcher", f"{queue} --wrap {{command}}", "--no-wait", "--seeds", "1")


def test_a_job_is_finished_when_it_ended_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit, output = submitted(folder), folder / "with blank" / "out"
    assert compare(folder, *submit) == 0
    queue = folder / "queue.sh"
    jobs = queue.read_text().splitlines()
    assert len(jobs) == 4
    # Killed while it wrote its checkpoint, failed, ended without a checkpoint, ended well.
    (output / "runs" / "plain-seed1").mkdir(parents=True)
    (output / "runs" / "plain-seed1" / "done.pt").write_text("9")
    (folder / "kill").touch()
    assert subprocess.run(["sh", "-c", jobs[3]], cwd=folder).returncode == 1  # TS&ICS
    (folder / "lazy").touch()
    assert subprocess.run(["sh", "-c", jobs[1]], cwd=folder).returncode == 0
    (folder / "lazy").unlink()
    assert subprocess.run(["sh", "-c", jobs[2]], cwd=folder).returncode == 0
    capsys.readouterr()
    assert compare(folder, *submit) == 1
    said = capsys.readouterr().out
    assert "1 of 4 runs finished" in said
    assert "plain, seed 1: submitted, not finished yet (--retry submits it again)" in said
    assert "failed: TS-ICS-seed1: the job ended with exit code 1; see" in said
    assert "failed: TS-seed1: the job ended without an error, but did not write" in said
    assert queue.read_text().splitlines() == jobs
    status = {name: known["status"] for name, known in State(output).runs.items()}
    assert status == {"plain-seed1": "submitted", "TS-seed1": "failed", "ICS-seed1": "finished",
                      "TS-ICS-seed1": "failed"}  # fmt: skip

    assert compare(folder, *submit) == 0  # failed ones again; the one that may still run is not
    again = queue.read_text().splitlines()[4:]
    assert ["TS-seed1" in job or "TS-ICS-seed1" in job for job in again] == [True, True]
    assert all("--resume latest" in job and ".exit-2" in job for job in again)
    assert compare(folder, *submit, "--retry") == 0
    retried = queue.read_text().splitlines()[6:]
    assert [[name in job for job in retried].count(True) for name in ("plain-", "/TS-seed", "TS-ICS")] == [1, 1, 1]
    # The first attempt ends now: that speaks for itself, not for the second.
    (folder / "kill").unlink()
    subprocess.run(["sh", "-c", jobs[0]], cwd=folder, check=True)
    assert compare(folder, *submit) == 0
    assert State(output).runs["plain-seed1"]["status"] == "submitted"
    subprocess.run(["sh", "-c", "\n".join(retried)], cwd=folder, check=True)
    assert compare(folder, *submit) == 0
    assert "4 of 4 runs finished" in capsys.readouterr().out
    assert results(folder)["metrics"]["plain"]["image_to_text_R@1"]["all"]["values"] == {"1": 0.01}


@pytest.mark.parametrize(
    ("text", "code"), [("0\n", 0), ("0\n7\n0\n", 7), ("", None), ("0", None), ("0\n0\n", 0), ("1\n", 1)]
)
def test_the_exit_status_of_a_job_of_several_tasks(text: str, code: Optional[int], tmp_path: Path) -> None:
    assert execute._exit_status(tmp_path / "none") is None
    (tmp_path / "exit-1").write_text(text)
    assert execute._exit_status(tmp_path / "exit-1") == code


def test_a_launcher_that_fails_has_submitted_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(folder, "--seeds", "0", "--launcher", "false {command}", "--no-wait") == 1
    assert "failed: plain-seed0: exit code 1 from: false" in capsys.readouterr().out
    assert compare(folder, "--seeds", "0") == 0


@pytest.mark.parametrize(
    ("launcher", "message"),
    [("", "names no command"), ("''", "names no command"), ("srun 'x", "the quotes do not match")],
)
def test_launchers_that_are_no_commands(
    launcher: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--launcher "$UNSET"`` would train on the login node."""
    assert compare(folder, "--launcher", launcher) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "with blank" / "out").exists()


def test_more_seeds_later_but_not_another_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(folder, "--seeds", "0") == 0
    made = calls(folder)
    assert compare(folder, "--seeds", "0,1") == 0
    assert {name: made[name] for name in made} == {name: calls(folder)[name] for name in made}
    assert compare(folder, "--seeds", "0", "--table", "other.parquet") == 2
    assert "ICS-seed0 was started with another command" in capsys.readouterr().err


def test_a_launcher_that_waits_and_one_that_does_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = folder / "srun"
    launcher.write_text('#!/bin/sh\necho "$@" >> launched.txt\nexec "$@"\n')
    launcher.chmod(0o755)
    assert compare(folder, "--seeds", "0", "--launcher", str(launcher)) == 0
    launched = (folder / "launched.txt").read_text().splitlines()
    assert [("host.py" in line, "judge.py" in line) for line in launched] == [(True, False), (False, True)] * 4

    # As sbatch: takes one string, returns at once, and the job runs later.
    queue = folder / "sbatch"
    queue.write_text('#!/bin/sh\nprintf "%s\\n" "$2" >> queue.sh\n')
    queue.chmod(0o755)
    submit = ("--launcher", f"{queue} --wrap {{command}}", "--no-wait", "--seeds", "1")
    assert compare(folder, *submit) == 0
    assert compare(folder, *submit) == 0
    assert "submitted, not finished yet" in capsys.readouterr().out
    jobs = (folder / "queue.sh").read_text()
    assert jobs.count("host.py") == 4, "submitted twice"
    assert os.system(f"cd {folder} && sh queue.sh") == 0
    assert compare(folder, *submit) == 0
    assert "4 of 4 runs finished" in capsys.readouterr().out


def test_dry_run_prints_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert compare(folder, "--dry-run", "--launcher", "srun -G 8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3::3][0] == "# TS, seed 0"
    assert all(line.startswith(("#", "srun -G 8 ")) for line in lines)
    assert len(lines) == 36
    assert sorted(folder.rglob("*")) == before


def test_the_command_may_stand_behind_two_dashes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    flags = ["-o", "out", "--clusters", "c.parquet", "--seeds", "3", "--done", "{output}/{run}/done.pt"]
    flags += ["--eval", "{python} judge.py {done} {result}"]
    assert main(["compare", *flags, "--", "{python}", "host.py", "--seed", "{seed}", "--out", "{output}/{run}"]) == 0
    found = json.loads((folder / "out" / "compare.json").read_text())["metrics"]
    assert {name: found[name]["image_to_text_R@1"]["all"]["mean"] for name in VARIANTS} == {
        "plain": 0.03, "TS": 0.06, "ICS": 0.13, "TS&ICS": 0.13,
    }  # fmt: skip
    assert found["plain"]["image_to_text_R@1"]["all"]["sd"] is None


def test_braces_of_shard_patterns_are_left_alone(tmp_path: Path) -> None:
    content = {"command": "x --train-data '{000..331}.tar' {flags} --seed {seed}", "done": "{run}", "eval": "e",
               "variants": {"a": "", "b": "--loss 'm m'"}}  # fmt: skip
    runs = plans.make(content, str(tmp_path)).runs
    assert runs[0].command == ["x", "--train-data", "{000..331}.tar", "--seed", "0"]
    assert runs[1].command == ["x", "--train-data", "{000..331}.tar", "--loss", "m m", "--seed", "0"]


OWN = {"clusters": None}  # makes room for variants
REFUSED = {
    "unknown key": ({"comand": "x"}, "unknown key 'comand'; did you mean 'command'?"),
    "no eval": ({"eval": None}, "the plan: key 'eval' is missing"),
    "no seeds": ({"seeds": []}, "key 'seeds' is empty"),
    "seeds": ({"seeds": "0"}, "key 'seeds' is '0': it must be a list of whole numbers"),
    "half a seed": ({"seeds": [0.5]}, "key 'seeds' is [0.5]: it must be a list of whole numbers"),
    "seed of text": ({"seeds": ["0"]}, "key 'seeds' is ['0']: it must be a list of whole numbers"),
    "seed that is a switch": ({"seeds": [True]}, "key 'seeds' is [True]: it must be a list of whole numbers"),
    "seed below 0": ({"seeds": [0, -1]}, "one of seeds is -1: it must be 0 or above"),
    "seed above NumPy's": ({"seeds": [2**32]}, "one of seeds is 4294967296: it must be at most"),
    "same seed": ({"seeds": [1, 1]}, "holds a number twice"),
    "too many": ({"seeds": list(range(2501))}, "4 variants and 2501 seeds are more than 10000 runs"),
    "seed unused": ({"command": "x"}, "command: has no {seed}"),
    "done shared": ({"done": "x.pt"}, "done: has no {run}"),
    "done is a result": ({"done": "{run}/{result}"}, "done: {result} cannot stand in a file's name"),
    "no variants": ({"clusters": None}, "give clusters: FILE for the usual variants"),
    "both": ({"variants": {"a": ""}}, "variants: says all flags itself"),
    "both, of flags": ({**OWN, "variants": {"a": ""}, "mmts": "--mmts-alpha 1"}, "variants: says all flags itself"),
    "empty variants": ({**OWN, "variants": {}}, "variants: is empty"),
    "variants": ({**OWN, "variants": ["a"]}, "key 'variants' is ['a']: it must be a mapping"),
    "a number for a name": ({**OWN, "variants": {1: ""}}, "if YAML takes it for something else) is 1: it must be text"),
    "flags": ({**OWN, "variants": {"a": ["x"]}}, "variants: a is ['x']: it must be text"),
    "flags in flags": ({**OWN, "variants": {"a": "x {flags}"}}, "variants: a: {flags} has no meaning there"),
    "flags in a word of flags": ({"mmts": "--x={flags}"}, "variants: TS: {flags} has no meaning there"),
    "flags in resume": ({"resume": "{flags}"}, "resume: {flags} has no meaning there"),
    "flags in a word": ({"command": "x{flags} {seed}"}, "command: 'x{flags}': {flags} stands for several words"),
    "a bar": ({**OWN, "variants": {"a|b": ""}}, "variants: 'a|b': a name goes into a table"),
    "a line": ({**OWN, "variants": {"a\nb": ""}}, "variants: 'a\\nb': a name goes into a table"),
    "alike": ({**OWN, "variants": {"a b": "", "a-b": ""}}, "too much alike"),
    "alike on a Mac": ({**OWN, "variants": {"a": "", "A": ""}}, "too much alike"),
    "quotes": ({"command": "x '{seed}"}, "command: the quotes do not match"),
    "not text": ({"command": ["x"]}, "key 'command' is ['x']: it must be text"),
    "blanks": ({"command": "  "}, "key 'command' is empty"),
    "no first word": ({"command": "'' {seed}"}, "command: its first word, which is to be started, is empty"),
    "no evaluation": ({"eval": "''"}, "eval: its first word, which is to be started, is empty"),
    "NUL": ({"command": "x\0 {seed}"}, "key 'command' is 'x\\x00 {seed}': it holds a NUL character"),
    "half a character": ({"done": "{run}\ud800"}, "it holds half a character"),
    "a metric": ({"metrics": "R@1"}, "key 'metrics' is 'R@1': it must be a list of texts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message = REFUSED[case]
    content = {**yaml.safe_load((folder / "plan.yaml").read_text()), **changes}
    (folder / "plan.yaml").write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None})
    )
    with pytest.raises(ConfigError):  # before anything is started
        plans.make(plans.read(str(folder / "plan.yaml")), "out")
    assert compare(folder) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "with blank" / "out").exists()


def test_an_output_without_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """``-o "$UNSET"`` would write into the current folder."""
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    for output in ("", " "):
        assert main(["compare", "plan.yaml", "-o", output]) == 2
        assert "-o/--output is empty" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


REFUSED_TEXTS = {
    "a key twice": ("seeds: [0]\nseeds: [1]", "line 2: 'seeds' is given twice"),
    "a variant twice": ("variants: {a: x, a: y}", "line 1: 'a' is given twice"),
    "merged": ("a: &a {seeds: [1]}\n<<: *a", "line 2: << is not taken here; write the keys out"),
    "aliases": (
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
        "unknown key 'a'; known: command",
    ),
    "an alias of itself": ("metrics: &m [*m]", "key 'metrics' is [[[...]]]: it must be a list of texts"),
    "deep": ("metrics: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "long": ("#" * 100_001, "longer than 100000 characters: no plan"),
    "no date": ("clusters: 2001-99-99", "month must be in 1..12"),
    "a date": ("clusters: 2001-01-01", "key 'clusters' is datetime.date(2001, 1, 1): it must be text"),
    "code": ("mmts: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    "a list": ("[1]", "expected keys and values, such as command: and eval:, not [1]"),
    "nothing": ("", "expected keys and values, such as command: and eval:, not None"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_TEXTS)
def test_what_is_no_plan(case: str, tmp_path: Path) -> None:
    text, message = REFUSED_TEXTS[case]
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        plans.read(str(tmp_path / "plan.yaml"))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'plan.yaml'}: ")
    assert message in said
    assert "\n" not in said
    assert len(said) <= 480


def test_a_metric_that_nobody_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {**yaml.safe_load((folder / "plan.yaml").read_text()), "metrics": ["bleu"]}
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    assert compare(folder, "--seeds", "0") == 2
    assert "no evaluation holds 'bleu'; they hold image_to_text_R@1" in capsys.readouterr().err


def test_a_damaged_state_is_named(folder: Path) -> None:
    (folder / "state.json").write_text("{")
    with pytest.raises(MMTSError, match=r"state\.json: cannot be read as the state of a comparison"):
        State(folder)


def test_the_table_of_odd_evaluations(tmp_path: Path) -> None:
    """Seeds that only one variant has, values that nobody measured, ranks, a bar in a name: to the letter."""
    content = {"command": "x {seed}", "eval": "e", "variants": {"a": "", "b": ""}, "seeds": [0, 1, 2], "done": "{run}"}
    plan = plans.make(content, str(tmp_path))
    measured = {
        "a-seed0": {"x|y": 0.5, "mean_rank": 3, "lost": None, "odd": float("nan")},
        "a-seed1": {"x|y": 0.25, "mean_rank": 5},
        "b-seed0": {"x|y": 0.4999, "mean_rank": 2.5},
        "b-seed2": {"x|y": 0.75, "mean_rank": 4.5, "odd": float("inf")},
    }
    (tmp_path / "evals").mkdir()
    for name, metrics in measured.items():
        (tmp_path / "evals" / f"{name}.json").write_text(json.dumps({"metrics": metrics}))
    found = tables.summary(tables.collect(plan, measured), plan.contrasts)
    assert list(found["a"]) == list(found["b"]) == ["x|y", "mean_rank"]
    unknown = dict.fromkeys(("se", "low", "high", "p"))
    assert found["b"]["mean_rank"]["all"]["differences"] == {
        "a": {"mean": -0.5, **unknown, "seeds": 1, "values": {"0": -0.5}}}  # fmt: skip
    lines = [line.replace(" ", "") for line in tables.markdown(plan, found).splitlines()]
    assert lines[0] == "||seeds|x\\|y|mean_rank|"
    assert lines[2:] == ["|a|2|37.5±17.7|4.0±1.4|", "|b|2|62.5±17.7|3.5±1.4|", "|b−a|1|+0.0|-0.5|"]


def test_the_usual_variants_have_two_controls(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((folder / "plan.yaml").read_text())
    del content["controls"]
    (folder / "plan.yaml").write_text(yaml.safe_dump({**content, "mmts": "--mmts-preset clip-cc3m"}))
    plan = plans.make(plans.read(str(folder / "plan.yaml")), str(folder / "out"))
    assert plan.variants == ["plain", "constant", "TS", "ICS", "shuffled", "TS&ICS"]
    ours = ["--loss", "mmts", "--mmts-preset", "clip-cc3m", "--mmts-clusters", "with blank/clusters.parquet"]
    flags = {(run.variant, run.seed): run.command[6:] for run in plan.runs}
    assert flags["constant", 1] == [*ours, "--mmts-no-schedule", "--mmts-no-shifts", "--mmts-mean-matched"]
    assert flags["shuffled", 1] == [*ours, "--mmts-shuffle-shifts", "1"]
    assert flags["shuffled", 4] == [*ours, "--mmts-shuffle-shifts", "4"]
    assert plan.contrasts == [*((name, "plain") for name in plan.variants[1:]), ("TS&ICS", "constant"),
                              ("TS&ICS", "shuffled")]  # fmt: skip


def test_differences_over_seeds_are_judged(tmp_path: Path) -> None:
    """A gain beyond its interval, and one that is not; against SciPy's own test."""
    content = {"command": "x {seed}", "eval": "e", "variants": {"a": "", "b": "", "c": ""}, "seeds": [0, 1, 2, 3],
               "done": "{run}", "contrasts": {"b": ["a"], "c": ["a", "b"], "a": ["b"]}}  # fmt: skip
    plan = plans.make(content, str(tmp_path))
    scores = {"a": [0.10, 0.14, 0.12, 0.20], "b": [0.13, 0.16, 0.15, 0.22], "c": [0.11, 0.12, 0.15, 0.19]}
    (tmp_path / "evals").mkdir()
    for variant, values in scores.items():
        for seed, value in enumerate(values):
            (tmp_path / "evals" / f"{variant}-seed{seed}.json").write_text(json.dumps({"metrics": {"R@1": value}}))
    found = tables.summary(tables.collect(plan, {run.name for run in plan.runs}), plan.contrasts)
    for one, other in plan.contrasts:
        entry = found[one]["R@1"]["all"]["differences"][other]
        expected = ttest_rel(scores[one], scores[other])
        interval = expected.confidence_interval(0.95)
        assert (entry["p"], entry["low"], entry["high"]) == pytest.approx(
            (expected.pvalue, interval.low, interval.high)
        )
    lines = tables.markdown(plan, found).splitlines()
    assert any("b − a" in line and "+2.5 [+1.6, +3.4] " in line and "none seen" not in line for line in lines)
    assert any("c − a" in line and "none seen" in line for line in lines)
    assert any("a − b" in line and "-2.5 [-3.4, -1.6] " in line and "none seen" not in line for line in lines)
    assert "one leaves zero out by chance" in lines[-1]
    for wrong in ({"c": ["d"]}, {"c": ["c"]}, {"c": "a"}):
        with pytest.raises(ConfigError, match=r"contrasts: '?c"):
            plans.make({**content, "contrasts": wrong}, str(tmp_path))


def test_a_command_that_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sees of a job that we are in, and what is said of how it ended."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    lines: list[str] = []
    run_logged(["sh", "-c", "echo ${WORLD_SIZE-none} ${SLURM_NTASKS-none}; echo said >&2"], tmp_path, lines.append)
    assert lines == ["none none\n", "said\n"]
    with pytest.raises(MMTSError) as caught:
        run_logged(["sh", "-c", "seq 30; kill -9 $$", "x" * 300], tmp_path)
    chatter = "I1125 18:41:29.321000 5582 .venv/lib/python3.11/site-packages/torch/_dynamo/utils.py:925] Function"
    with pytest.raises(MMTSError, match=r"ValueError: the cause$"):
        run_logged(["sh", "-c", f"echo 'ValueError: the cause'; for i in $(seq 40); do echo '{chatter}'; done; exit 1"],
                   tmp_path)  # fmt: skip
    said = caught.value.args[0]
    assert said.startswith("exit code 137 (SIGKILL) from: sh -c 'seq 30; kill -9 $$' xxxx")
    command, tail = said.split(" ...: ")
    assert len(command) == len("exit code 137 (SIGKILL) from: ") + 160
    assert tail.split() == [str(number) for number in range(6, 31)]


def test_who_does_not_listen_is_killed(tmp_path: Path) -> None:
    """A worker that a command leaves behind and that ignores being asked to end."""
    deaf = "trap '' TERM; echo $$ > deaf; while :; do sleep 0.1; done"
    run_logged(
        ["sh", "-c", f"sh -c {shlex.quote(deaf)} >/dev/null 2>&1 & while [ ! -s deaf ]; do sleep 0.02; done"], tmp_path
    )
    pid = int((tmp_path / "deaf").read_text())
    try:
        assert gone(pid, 0.1)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_lock_lasts_as_long_as_the_command(tmp_path: Path) -> None:
    """Also where comparison and keeper are gone: the command has its descriptor."""
    with open(tmp_path / "lock", "w") as file:
        held = file.fileno()
        run_logged(["sh", "-c", f"ls -l /proc/self/fd/{held} > found || echo none > found"], tmp_path, held=held)
    assert (tmp_path / "found").read_text().endswith(f"-> {tmp_path / 'lock'}\n")


def test_a_dry_run_of_jobs_shows_what_proves_their_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(folder, "--seeds", "0", "--dry-run", "--no-wait", "--launcher", "sbatch") == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["plain-seed0.exit-1" in line for line in lines[:3]] == [False, True, False]
    assert [line.startswith("sbatch ") for line in lines[:3]] == [False, True, False]


def test_openclip_end_to_end(tmp_path: Path, data: Any, small_model: str) -> None:
    """The real trainer, plain and TS&ICS, evaluated by the real ``mmts eval``."""
    for package in ("open_clip_train", "sklearn"):
        pytest.importorskip(package)
    flags = openclip_flags(
        small_model, tmp_path / "out" / "runs", "{run}", seed="{seed}", train_data=data.csv, epochs=1
    )
    model = ["--model", small_model, "--device", "cpu", "--resamples", "20"]
    content = {
        "command": shlex.join(["{python}", "-m", "mmts_plugins", "run", "-m", "open_clip_train.main", *flags]),
        "variants": {"plain": "", "TS&ICS": f"--loss mmts --mmts-clusters {data.table}"},
        "seeds": [0],
        "done": "{output}/runs/{run}/checkpoints/epoch_1.pt",
        "resume": "--resume latest",
        "eval": shlex.join(["{python}", "-m", "mmts_plugins", "eval", str(data.csv), *model, "--checkpoint", "{done}",
                            "--table", str(data.table), "-o", "{result}"]),
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = run_python("-m", "mmts_plugins", "compare", tmp_path / "plan.yaml", "-o", tmp_path / "out", timeout=600)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (tmp_path / "out" / "runs" / "TS-ICS-seed0" / "mmts.yaml").exists()
    assert not (tmp_path / "out" / "runs" / "plain-seed0" / "mmts.yaml").exists()
    recall = [found["metrics"][name]["text_to_image_R@10"] for name in ("plain", "TS&ICS")]
    assert all(0 <= groups[group]["mean"] <= 1 for groups in recall for group in ("all", "head", "middle", "tail"))
    assert found["runs"]["plain-seed0"]["status"] == "finished"


@pytest.mark.parametrize(
    ("name", "runs"),
    [("compare_digits/compare", 18), ("compare_digits/max_margin", 18), ("openclip_flickr8k/compare", 18),
     ("openclip_flickr8k/one_epoch", 8)],
)  # fmt: skip
def test_the_examples_are_commands_that_openclip_and_we_take(name: str, runs: int, tmp_path: Path) -> None:
    """Their flags are parsed by the real parsers; nothing is run."""
    params = pytest.importorskip("open_clip_train.params")
    path = REPOSITORY / "examples" / f"{name}.yaml"
    plan = plans.make(plans.read(str(path)), str(tmp_path))
    assert len(plan.runs) == runs
    plain = plan.runs[0]
    ours, rest = split_flags(plain.resumed[plain.resumed.index("open_clip_train.main") + 1 :], ADAPTER.options)
    assert (ADAPTER.resolve(ours).config.loss if ours else None) == ("mmts-max-margin" if "margin" in name else None)
    host = params.parse_args(rest)
    assert (host.name, host.resume) == (plain.name, "latest")
    assert plain.done == Path(host.logs, host.name, "checkpoints", f"epoch_{host.epochs}.pt")
    judged = _parser("eval").parse_args(plain.evaluation[plain.evaluation.index("eval") :])
    assert (judged.checkpoint, judged.output) == (str(plain.done), str(plain.result))
    assert judged.model == host.model
    for named in (judged.classes, judged.templates):
        assert named is None or (path.parent / Path(named).name).is_file()
    shifted = {run.variant: run.command for run in plan.runs if run.seed == 0}
    with_table = {variant for variant, flags in shifted.items() if "--mmts-clusters" in flags}
    assert with_table == shifted.keys() - {"plain", "TS"}
    assert shifted.keys() - {"constant", "shuffled"} == {"plain", "TS", "ICS", "TS&ICS"}
