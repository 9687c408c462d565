"""``mmts compare``: commands, what is resumed and what is not run again, and the tables; with real subprocesses."""

from __future__ import annotations

import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, openclip_flags, run_python

from mmts_plugins.cli import _parser, main
from mmts_plugins.compare import plan as plans
from mmts_plugins.compare.execute import State
from mmts_plugins.errors import MMTSError

# A trainer as a comparison sees one: says what it was given, may die half-way, leaves a checkpoint.
HOST = """
import argparse, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for flag in ("--seed", "--out", "--loss", "--mmts-clusters", "--resume"):
    parser.add_argument(flag)
parser.add_argument("--mmts-no-shifts", action="store_true")
parser.add_argument("--mmts-no-schedule", action="store_true")
args = parser.parse_args()
out = pathlib.Path(args.out)
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if (pathlib.Path.cwd() / "kill").exists() and "TS-ICS-seed1" in args.out and not args.resume:
    sys.exit("the node was taken away")
if (pathlib.Path.cwd() / "slow").exists():
    (pathlib.Path.cwd() / "slow").write_text(str(os.getpid()))
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
json.dump({"metrics": {"image_to_text_R@1": {"value": score, "head": {"value": score}, "mid": low, "tail": low},
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


def test_four_variants_over_three_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(folder) == 0
    said = capsys.readouterr().out
    assert "12 of 12 runs finished" in said
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
    assert entry["difference"]["mean"] == pytest.approx(0.1)
    assert entry["difference"]["sd"] == pytest.approx(0)
    assert found["TS&ICS"]["image_to_text_R@1"]["tail"]["difference"]["mean"] == pytest.approx(0.05)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert lines[0] == ["", "seeds", "image_to_text_R@1"]  # ranks are left out unless asked for
    assert ["plain", "3", "1.7 ± 2.1"] in lines
    assert ["TS&ICS", "3", "11.7 ± 2.1"] in lines
    assert ["TS&ICS − plain", "3", "+10.0 ± 0.0"] in lines
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


def test_a_terminated_comparison_ends_its_trainer(folder: Path) -> None:
    (folder / "slow").touch()
    output = folder / "with blank" / "out"
    command = [sys.executable, "-m", "mmts_plugins", "compare", str(folder / "plan.yaml"), "-o", str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not (folder / "slow").read_text():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        trainer = int((folder / "slow").read_text())
        process.terminate()
        assert process.wait(60) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(trainer, 0)
    assert State(output).runs["plain-seed0"]["error"] == "interrupted"
    (folder / "slow").unlink()
    assert compare(folder, "--seeds", "0") == 0
    assert calls(folder)["plain-seed0"][1].endswith("--resume latest")


def test_more_seeds_later_but_not_another_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(folder, "--seeds", "0") == 0
    made = calls(folder)
    assert compare(folder, "--seeds", "0,1") == 0
    assert {name: made[name] for name in made} == {name: calls(folder)[name] for name in made}
    assert compare(folder, "--seeds", "0", "--clusters", "other.parquet") == 2
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


REFUSED = {
    "unknown key": ({"comand": "x"}, "unknown key 'comand'; known: command"),
    "no eval": ({"eval": None}, "the plan has no 'eval'"),
    "seeds": ({"seeds": "0"}, "seeds: expected a list of whole numbers, not '0'"),
    "same seed": ({"seeds": [1, 1]}, "holds a number twice"),
    "seed unused": ({"command": "x"}, "command: has no {seed}"),
    "done shared": ({"done": "x.pt"}, "done: has no {run}"),
    "no variants": ({"clusters": None}, "give clusters: FILE for the paper's four variants"),
    "both": ({"variants": {"a": ""}}, "variants: says all flags itself"),
    "alike": ({"clusters": None, "variants": {"a b": "", "a-b": ""}}, "too much alike"),
    "quotes": ({"command": "x '{seed}"}, "command: the quotes do not match"),
    "not text": ({"command": ["x"]}, "command: expected text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message = REFUSED[case]
    content = {**yaml.safe_load((folder / "plan.yaml").read_text()), **changes}
    (folder / "plan.yaml").write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None})
    )
    assert compare(folder) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "with blank" / "out").exists()


def test_a_metric_that_nobody_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {**yaml.safe_load((folder / "plan.yaml").read_text()), "metrics": ["bleu"]}
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    assert compare(folder, "--seeds", "0") == 2
    assert "no evaluation holds 'bleu'; they hold image_to_text_R@1" in capsys.readouterr().err


def test_a_damaged_state_is_named(folder: Path) -> None:
    (folder / "state.json").write_text("{")
    with pytest.raises(MMTSError, match=r"state\.json: cannot be read as the state of a comparison"):
        State(folder)


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
    assert all(0 <= groups[group]["mean"] <= 1 for groups in recall for group in ("all", "head", "mid", "tail"))
    assert found["runs"]["plain-seed0"]["status"] == "finished"


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "examples").glob("*/compare.yaml")), ids=lambda path: path.parent.name
)
def test_the_examples_are_commands_that_openclip_and_we_take(path: Path, tmp_path: Path) -> None:
    """Their flags are parsed by the real parsers; nothing is run."""
    params = pytest.importorskip("open_clip_train.params")
    plan = plans.make(plans.read(str(path)), str(tmp_path))
    assert len(plan.runs) == 12
    plain = plan.runs[0]
    host = params.parse_args(plain.resumed[plain.resumed.index("open_clip_train.main") + 1 :])
    assert (host.name, host.resume) == (plain.name, "latest")
    assert plain.done == Path(host.logs, host.name, "checkpoints", f"epoch_{host.epochs}.pt")
    judged = _parser().parse_args(plain.evaluation[plain.evaluation.index("eval") :])
    assert (judged.checkpoint, judged.output) == (str(plain.done), str(plain.result))
    assert judged.model == host.model
    for named in (judged.classes, judged.templates):
        assert named is None or (path.parent / Path(named).name).is_file()
    shifted = {run.variant: run.command[len(plain.command) :] for run in plan.runs if run.seed == 0}
    assert ["--mmts-clusters" in flags for flags in shifted.values()] == [False, False, True, True]
