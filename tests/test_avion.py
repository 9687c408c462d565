"""AVION's training loop: a stand-in with its signatures always, the real one where ``AVION_ROOT`` names a checkout."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import REPOSITORY, run_python

from mmts_plugins.clusters import CAPTION, CLASS, ClusterTable

SCRIPT = "main_lavila_finetune_mir.py"
STAND_IN = REPOSITORY / "tests" / "avion_stand_in"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
HEADER = (
    "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame stop_frame"
)
COLUMNS = [*HEADER.split(), "narration", "verb", "verb_class", "noun", "noun_class", "all_nouns", "all_noun_classes"]
CLASSES = [(0, 2)] * 9 + [(1, 2)] * 4 + [(2, 2)] * 2 + [(0, 1)] * 3 + [(2, 0)] * 2 + [(3, 3)] * 2 + [(4, 8), (3, 12)]


@pytest.fixture
def metadata(tmp_path) -> Path:
    return write_metadata(tmp_path / "EPIC_train.csv", CLASSES)


def write_metadata(path: Path, classes, columns=COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i, (verb, noun) in enumerate(classes):
            values = {"narration_id": i, "narration": f"{'abcde'[verb]} {noun}", "verb_class": verb, "noun_class": noun}
            writer.writerow([values.get(column, "") for column in columns])
    return path


def overlay(folder: Path, root: Path) -> Path:
    """A checkout whose script is our recorder, which becomes the real one."""
    made = folder / "overlay"
    if not made.exists():
        (made / "scripts").mkdir(parents=True)
        (made / "avion").symlink_to(root / "avion")
        (made / "scripts" / SCRIPT).symlink_to(REPOSITORY / "tests" / "recorded_avion.py")
    return made


def environment(record: Path, root: Path, install: bool = True, **more: str) -> dict[str, str]:
    script = str(root / "scripts" / SCRIPT)
    return {"TEST_RECORD": str(record), "TEST_SCRIPT": script, "TEST_INSTALL": str(int(install)), **more}


def read(record: Path, ranks: int):
    return [dict(np.load(f"{record}-{rank}.npz")) for rank in range(ranks)]


def run_stand_in(folder: Path, metadata: Path, name: str, *flags: object, ranks: int = 0, code: int = 0, **more):
    made = overlay(folder, STAND_IN)
    install = more.pop("install", True)
    done = run_python(
        *((*TORCHRUN, ranks) if ranks else ()),
        made / "scripts" / SCRIPT,
        *("--train-metadata", metadata, "--val-metadata", metadata, "--output-dir", folder / "out" / name, *flags),
        **environment(folder / name, STAND_IN, install, PYTHONPATH=f"{REPOSITORY}{os.pathsep}{made}", **more),
    )
    assert (done.returncode == 0) == (code == 0), done.stdout[-3000:]
    return done.stdout, read(folder / name, max(1, ranks))


def check(ranks, key, counts, total, loss="max_margin", alpha=0.2, shift_min=0.17, shift_max=0.3, first=0) -> float:
    """The greatest difference of any rank's loss at any step from the paper's words."""
    worst = 0.0
    for call in range(len(ranks[0]["loss"])):
        images, texts = (torch.from_numpy(np.concatenate([r[n][call] for r in ranks])) for n in ("image", "text"))
        images, texts = torch.nn.functional.normalize(images), torch.nn.functional.normalize(texts)
        classes = [key(v, n) for r in ranks for v, n in zip(r["verb"][call], r["noun"][call])]
        frequency = [counts[c] for c in classes]
        tau = reference.temperature(
            frequency, list(counts.values()), alpha, shift_min, shift_max, first + call, total / 5
        )
        expected = float(getattr(reference, loss)(images, texts, torch.from_numpy(tau)))
        worst = max(worst, *(abs(r["loss"][call] - expected) for r in ranks))
    return worst


KEYS = {
    "noun": lambda verb, noun: str(noun),
    "verb": lambda verb, noun: str(verb),
    "verb_noun": lambda verb, noun: f"{verb}_{noun}",
}


def counts_of(classes, distribution):
    return Counter(KEYS[distribution](*pair) for pair in classes)


@pytest.mark.parametrize("distribution", ["noun", "verb", "verb_noun"])
def test_every_step_equals_the_reference(distribution, metadata, tmp_path):
    flags = ["--loss", "mmts"] + (["--mmts-distribution", distribution] if distribution != "noun" else [])
    output, ranks = run_stand_in(tmp_path, metadata, "run", *flags, "--print-freq", 1)
    assert len(ranks[0]["loss"]) == 12
    assert check(ranks, KEYS[distribution], counts_of(CLASSES, distribution), 12) < 1e-6
    assert output.count("MM-TS: mmts-max-margin: alpha 0.2 over 12 steps, period 2.4; shifts 0.17 to 0.3") == 1
    assert output.count("MM-TS step ") == 12
    assert f"distribution: {distribution}" in (tmp_path / "out" / "run" / "mmts.yaml").read_text()


def test_info_nce(metadata, tmp_path):
    _, ranks = run_stand_in(tmp_path, metadata, "run", "--loss=mmts-infonce")
    found = check(ranks, KEYS["noun"], counts_of(CLASSES, "noun"), 12, "info_nce", 0.08, 0.05, 0.20)
    assert found < 1e-6


def test_ablations_and_a_saved_config(metadata, tmp_path):
    _, schedule = run_stand_in(tmp_path, metadata, "ts", "--loss", "mmts", "--mmts-no-shifts")
    assert check(schedule, KEYS["noun"], dict.fromkeys(counts_of(CLASSES, "noun"), 1), 12) < 1e-6
    flags = ("--loss", "mmts", "--mmts-no-schedule", "--mmts-distribution", "verb")
    _, shifts = run_stand_in(tmp_path, metadata, "ics", *flags)
    assert check(shifts, KEYS["verb"], counts_of(CLASSES, "verb"), 12, alpha=0) < 1e-6
    _, again = run_stand_in(tmp_path, metadata, "again", "--mmts-config", tmp_path / "out" / "ics" / "mmts.yaml")
    np.testing.assert_array_equal(again[0]["loss"], shifts[0]["loss"])


def test_distribution_files_of_both_kinds(metadata, tmp_path):
    counts = {"0": 7, "1": 100, "2": 3, "3": 50, "8": 20, "12": 1}
    table = ClusterTable.build(list(counts), range(6), list(counts.values()), kind=CLASS)
    table.save(tmp_path / "classes.parquet")
    lines = ["class_id,count", *(f"{key},{count}" for key, count in counts.items())]
    (tmp_path / "classes.csv").write_text("\n".join(lines) + "\n")
    for name in ("classes.parquet", "classes.csv"):
        _, ranks = run_stand_in(tmp_path, metadata, name, "--loss", "mmts", "--mmts-clusters", tmp_path / name)
        assert check(ranks, KEYS["noun"], counts, 12) < 1e-6


def test_two_ranks(metadata, tmp_path):
    output, ranks = run_stand_in(tmp_path, metadata, "run", "--loss", "mmts", "--print-freq", 1, ranks=2)
    assert len(ranks[0]["loss"]) == 6
    assert check(ranks, KEYS["noun"], counts_of(CLASSES, "noun"), 6) < 1e-6
    assert output.count("MM-TS: mmts-max-margin") == 1
    assert output.count("MM-TS step ") == 6


def test_without_the_flag_nothing_changes(metadata, tmp_path):
    armed, with_us = run_stand_in(tmp_path, metadata, "armed")
    plain, without = run_stand_in(tmp_path, metadata, "plain", install=False, MMTS="0")
    assert armed == plain
    for name, values in without[0].items():
        np.testing.assert_array_equal(values, with_us[0][name])
    assert not (tmp_path / "out" / "armed" / "mmts.yaml").exists()
    scheduled = run_stand_in(tmp_path, metadata, "ours", "--loss", "mmts")[1]
    assert not np.isclose(scheduled[0]["loss"], without[0]["loss"], atol=1e-4).all()


def test_validation_keeps_the_hosts_own_loss(metadata, tmp_path):
    # lr 0: the model stays as it was made, and so do its validation losses.
    _, ours = run_stand_in(tmp_path, metadata, "ours", "--loss", "mmts", "--lr", 0)
    _, plain = run_stand_in(tmp_path, metadata, "plain", "--lr", 0)
    np.testing.assert_array_equal(ours[0]["validation"], plain[0]["validation"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes(context, metadata, tmp_path):
    inline, _ = run_stand_in(tmp_path, metadata, "inline", "--loss", "mmts")
    with_workers = run_python(
        *("-m", "mmts_plugins", "run", STAND_IN / "scripts" / SCRIPT, "--loss", "mmts", "-j", 1, "--print-freq", 1),
        *("--train-metadata", metadata, "--val-metadata", metadata, "--output-dir", tmp_path / "out"),
        PYTHONPATH=f"{REPOSITORY}{os.pathsep}{STAND_IN}",
        TEST_WORKERS=context,
    )
    assert with_workers.returncode == 0, with_workers.stdout[-3000:]
    assert with_workers.stdout.count("MM-TS step ") == 12
    assert inline.count("Epoch: ") == with_workers.stdout.count("Epoch: ") == 12


def test_killed_and_resumed_equals_uninterrupted(metadata, tmp_path):
    _, whole = run_stand_in(tmp_path, metadata, "whole", "--loss", "mmts", ranks=1)
    _, first = run_stand_in(tmp_path, metadata, "cut", "--loss", "mmts", ranks=1, code=9, TEST_DIE_AT="6")
    _, second = run_stand_in(tmp_path, metadata, "cut", "--loss", "mmts", ranks=1)
    np.testing.assert_array_equal(np.concatenate([first[0]["loss"], second[0]["loss"]]), whole[0]["loss"])


def plain_run(metadata, tmp_path, *flags: object, **more: str) -> subprocess.CompletedProcess:
    return run_python(
        *("-m", "mmts_plugins", "run", STAND_IN / "scripts" / SCRIPT, "--train-metadata", metadata),
        *("--val-metadata", metadata, "--output-dir", tmp_path / "out", *flags),
        **{"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{STAND_IN}", **more},
    )


def assert_one_error(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode != 0
    last = done.stdout.splitlines()[-1]
    assert last.startswith("mmts: error: "), done.stdout[-2000:]
    assert message in last
    assert "Traceback" not in done.stdout
    assert "Epoch: " not in done.stdout


def test_resume_with_another_config_stops(metadata, tmp_path):
    done = plain_run(metadata, tmp_path, "--loss", "mmts")
    assert done.returncode == 0, done.stdout[-2000:]
    done = plain_run(metadata, tmp_path, "--loss", "mmts", "--mmts-alpha", "0.1")
    assert_one_error(done, "alpha was 0.2 and is 0.1")
    done = plain_run(metadata, tmp_path, "--loss", "mmts", "--mmts-distribution", "verb")
    assert_one_error(done, "distribution was 'noun' and is 'verb'")
    done = plain_run(metadata, tmp_path, "--loss", "mmts", "--mmts-alpha", "0.1", "--mmts-allow-config-change")
    assert done.returncode == 0
    (tmp_path / "out" / "mmts.yaml").unlink()
    done = plain_run(metadata, tmp_path, "--loss", "mmts")
    assert_one_error(done, "the checkpoint was not trained with MM-TS")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "clip"], "unknown --loss 'clip'"),
        (["--loss", "mmts", "--mmts-alhpa", "1"], "did you mean --mmts-alpha?"),
        (["--mmts-alpha", "0.1"], "--mmts-* flags are given but not --loss"),
        (["--loss", "mmts", "--update-freq", "2"], "gradient accumulation is broken in AVION itself"),
        (["--loss", "mmts", "--mmts-clusters", "captions.parquet"], "a table of captions, but AVION's samples"),
        (["--loss", "mmts", "--mmts-clusters", "few.csv"], "1 noun classes that few.csv does not know, for example 12"),
        (["--loss", "mmts", "--mmts-clusters", "none.csv"], "none.csv: cannot be read"),
        (["--loss", "mmts", "--mmts-clusters", "bad.csv"], "bad.csv, line 2: the count of class 0 is 'many'"),
        (["--loss", "mmts", "--train-metadata", "sentence.csv"], "column 'noun_class' is missing"),
        (["--loss", "mmts", "--train-metadata", "none.csv"], "none.csv: cannot be read"),
    ],
)
def test_one_clear_error_before_training(flags, message, metadata, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ClusterTable.build(["a", "b"], [0, 1], [1, 2], kind=CAPTION).save("captions.parquet")
    Path("few.csv").write_text("class_id,count\n0,3\n1,2\n2,9\n3,2\n8,1\n")
    Path("bad.csv").write_text("class_id,count\n0,many\n")
    write_metadata(Path("sentence.csv"), CLASSES, [column for column in COLUMNS if column != "noun_class"])
    assert_one_error(plain_run(metadata, tmp_path, *flags), message)
    assert not list(tmp_path.rglob("mmts.yaml"))
    assert not list(tmp_path.rglob("*.pt"))


def test_unknown_classes_get_what_the_user_says(metadata, tmp_path):
    (tmp_path / "few.csv").write_text("class_id,count\n0,3\n1,2\n2,9\n3,2\n8,1\n")
    flags = ("--loss", "mmts", "--mmts-clusters", tmp_path / "few.csv", "--mmts-missing", "tail")
    _, ranks = run_stand_in(tmp_path, metadata, "run", *flags)
    assert check(ranks, KEYS["noun"], {"0": 3, "1": 2, "2": 9, "3": 2, "8": 1, "12": 1}, 12) < 1e-6


def test_other_scripts_of_avion_are_refused(tmp_path):
    script = tmp_path / "run_with_submit_lavila_finetune_mir.py"
    script.write_text("import avion.losses.losses\nprint('trained')\n")
    code = (
        f"import sys, runpy, mmts_plugins; mmts_plugins.install(); sys.argv = [{str(script)!r}, '--loss', 'mmts']; "
        "runpy.run_path(sys.argv[0])"
    )
    done = run_python("-c", code, PYTHONPATH=f"{REPOSITORY}{os.pathsep}{STAND_IN}")
    assert_one_error(done, "in AVION, --loss mmts is for main_lavila_finetune_mir.py")


def test_the_authors_fork_is_left_alone(metadata, tmp_path):
    fork = tmp_path / "fork"
    for path in STAND_IN.rglob("*.py"):
        copy = fork / path.relative_to(STAND_IN)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    with (fork / "avion" / "losses" / "losses.py").open("a") as file:
        file.write("\n\nclass MMTSMaxMarginRankingLoss(MaxMarginRankingLoss):\n    pass\n")
    script = fork / "scripts" / SCRIPT
    script.write_text(
        script.read_text().replace("    return parser", '    parser.add_argument("--mmts-alpha")\n    return parser')
    )
    flags = ("--train-metadata", metadata, "--val-metadata", metadata, "--output-dir", tmp_path / "out")
    paths = f"{REPOSITORY}{os.pathsep}{fork}"
    ours = run_python("-m", "mmts_plugins", "run", script, *flags, "--mmts-alpha", "0.2", PYTHONPATH=paths)
    assert ours.returncode == 0, ours.stdout[-2000:]
    assert ours.stdout.count("is the MM-TS authors' fork of AVION") == 1
    assert "MM-TS step" not in ours.stdout
    (tmp_path / "out" / "checkpoint.pt").unlink()
    plain = run_python(script, *flags, MMTS="0", PYTHONPATH=paths)
    assert plain.stdout == "\n".join(ours.stdout.splitlines()[1:]) + "\n"


def test_help_lists_our_flags(tmp_path):
    done = run_python(
        *("-m", "mmts_plugins", "run", STAND_IN / "scripts" / SCRIPT, "--help"),
        PYTHONPATH=f"{REPOSITORY}{os.pathsep}{STAND_IN}",
    )
    assert done.returncode == 0
    assert "--mmts-distribution {noun,verb,verb_noun}" in done.stdout
    assert "--train-metadata" in done.stdout


def test_counts_equal_the_published_distributions():
    from mmts_plugins.adapters.avion import count_classes, load_classes

    folder = Path(os.environ.get("MMTS_DATA", REPOSITORY.parent / "shared" / "data")) / "ek100"
    if not folder.is_dir():
        pytest.skip(f"no EK-100 annotations at {folder} (set MMTS_DATA)")
    for distribution in KEYS:
        counted = count_classes(str(folder / "train_narrations_partly_imputed.csv"), distribution)
        published = load_classes(str(folder / f"ek100_{distribution}_freq.csv"))
        assert counted.content_hash == published.content_hash


# -- the real AVION ----------------------------------------------------------------------------------------------------

HARNESS = Path(os.environ.get("MMTS_HOSTS", REPOSITORY.parent / "shared" / "hosts")) / "avion" / "run.sh"
needs_avion = pytest.mark.skipif(
    not os.environ.get("AVION_ROOT") or not HARNESS.exists() or importlib.util.find_spec("decord") is None,
    reason="set AVION_ROOT to a checkout of AVION, MMTS_HOSTS to the CPU harness, and install AVION's packages",
)


@pytest.fixture(scope="session")
def real_data():
    # Not under pytest's own folder: AVION replaces "test" anywhere in a path.
    with tempfile.TemporaryDirectory(prefix="avion-") as folder:
        yield Path(folder) / "data"


def run_real(folder: Path, real: Path, name: str, *flags: object, ranks: int = 1, code: int = 0, **more):
    root = Path(os.environ["AVION_ROOT"]).resolve()
    install = more.pop("install", True)
    done = subprocess.run(
        ["bash", str(HARNESS), str(folder / "out" / name), "--lr", "1e-3", *map(str, flags)],
        env={
            **os.environ,
            **environment(folder / name, root, install, PY=sys.executable, DATA=str(real), NPROC=str(ranks)),
            "AVION_ROOT": str(overlay(folder, root)),
            "EXTRA_PP": str(REPOSITORY),
            **more,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode == 0) == (code == 0), done.stdout[-3000:]
    return done.stdout, read(folder / name, ranks)


def real_counts(real: Path, distribution: str):
    with (real / "ann" / "EPIC_100_retrieval_train.csv").open() as file:
        return Counter(KEYS[distribution](row["verb_class"], row["noun_class"]) for row in csv.DictReader(file))


@needs_avion
@pytest.mark.parametrize(
    ("ranks", "distribution", "flags"),
    [
        (1, "noun", ["--loss", "mmts"]),
        (2, "verb", ["--loss", "mmts-infonce", "--mmts-distribution", "verb"]),
        (2, "noun", ["--loss", "mmts", "--no-gather-with-grad", "--use-zero"]),
        (2, "verb_noun", ["--loss", "mmts", "--mmts-distribution", "verb_noun", "--local-loss"]),
    ],
)
def test_real_loop_equals_the_reference(ranks, distribution, flags, real_data, tmp_path):
    output, recorded = run_real(tmp_path, real_data, "run", *flags, ranks=ranks)
    total = 12 // ranks
    assert len(recorded[0]["loss"]) == total
    preset = ("info_nce", 0.08, 0.05, 0.20) if "mmts-infonce" in flags else ()
    worst = check(recorded, KEYS[distribution], real_counts(real_data, distribution), total, *preset)
    print(f"greatest difference {worst:.1e}")
    assert worst < 1e-6
    assert output.count("MM-TS step ") == total


@needs_avion
def test_real_loop_without_the_flag_and_resumed(real_data, tmp_path):
    _, armed = run_real(tmp_path, real_data, "armed")
    _, plain = run_real(tmp_path, real_data, "plain", install=False, MMTS="0")
    for name, values in plain[0].items():
        np.testing.assert_array_equal(values, armed[0][name])
    _, whole = run_real(tmp_path, real_data, "whole", "--loss", "mmts")
    _, first = run_real(tmp_path, real_data, "cut", "--loss", "mmts", code=9, TEST_DIE_AT="6")
    output, second = run_real(tmp_path, real_data, "cut", "--loss", "mmts")
    assert "loaded latest checkpoint" in output
    np.testing.assert_array_equal(np.concatenate([first[0]["loss"], second[0]["loss"]]), whole[0]["loss"])
