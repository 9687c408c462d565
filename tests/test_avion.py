"""AVION's training loop: a stand-in with its signatures always, the real one where ``AVION_ROOT`` names a checkout."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import pickle
import re
import shutil
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
from forked import run_forked

from mmts_plugins.adapters.avion import (
    FINETUNING,
    PRETRAINING,
    AVIONSession,
    Job,
    authors_flags,
    load_classes,
)
from mmts_plugins.adapters.ek100 import count_classes, narrations
from mmts_plugins.errors import MMTSError, SeamError, TableError
from mmts_plugins.options import split_flags
from mmts_plugins.tables import CAPTION, CLASS, ClusterTable

SCRIPT, PRETRAIN = "main_lavila_finetune_mir.py", "main_lavila_pretrain.py"
STAND_IN = REPOSITORY / "tests" / "avion_stand_in"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
HEADER = (
    "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame stop_frame"
)
COLUMNS = [*HEADER.split(), "narration", "verb", "verb_class", "noun", "noun_class", "all_nouns", "all_noun_classes"]
CLASSES = [(0, 2)] * 9 + [(1, 2)] * 4 + [(2, 2)] * 2 + [(0, 1)] * 3 + [(2, 0)] * 2 + [(3, 3)] * 2 + [(4, 8), (3, 12)]

NARRATIONS = sorted({f"{'abcde'[verb]} {noun}" for verb, noun in CLASSES})
_spec = importlib.util.spec_from_file_location("tokenizer", STAND_IN / "avion" / "data" / "tokenizer.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
tokenize = _module.tokenize

FEW = "class_id,count\n0,3\n1,2\n2,9\n3,2\n8,1\n"


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
    """A checkout whose scripts are our recorder, which becomes the real ones."""
    made = folder / "overlay"
    if not made.exists():
        (made / "scripts").mkdir(parents=True)
        (made / "avion").symlink_to(root / "avion")
        for script in (SCRIPT, PRETRAIN):
            (made / "scripts" / script).symlink_to(REPOSITORY / "tests" / "recorded_avion.py")
    return made


def environment(record: Path, script: Path, install: bool = True, **more: str) -> dict[str, str]:
    return {"TEST_RECORD": str(record), "TEST_SCRIPT": str(script), "TEST_INSTALL": str(int(install)), **more}


def read(record: Path, ranks: int):
    return [dict(np.load(f"{record}-{rank}.npz")) for rank in range(ranks)]


def run_stand_in(folder: Path, metadata: Path, name: str, *flags: object, ranks: int = 0, code: int = 0, **more):
    made = overlay(folder, STAND_IN)
    install, script = more.pop("install", True), more.pop("script", SCRIPT)
    launched = more.pop("launched", False)
    validation = ("--val-metadata", metadata) if script == SCRIPT else ()
    given = ("--train-metadata", metadata, *validation, "--output-dir", folder / "out" / name, *flags)
    paths = f"{REPOSITORY}{os.pathsep}{made}"
    variables = environment(folder / name, STAND_IN / "scripts" / script, install, PYTHONPATH=paths, **more)
    if launched:
        done = run_python(*TORCHRUN, ranks, made / "scripts" / script, *given, **variables)
    elif install and "TEST_WORKERS" not in more:
        done = run_forked(made / "scripts" / script, *given, ranks=ranks, **variables)
    else:  # where no start-up file ran either
        done = run_python(made / "scripts" / script, *given, **variables)
    assert (done.returncode == 0) == (code == 0), done.stdout[-3000:]
    return done.stdout, read(folder / name, max(1, ranks))


def check(
    ranks, frequency, frequencies, total, loss="max_margin", alpha=0.2, shift_min=0.17, shift_max=0.3, steps=None
) -> float:
    """The greatest difference of any rank's loss at any step from the paper's words, relative where it is above 1.

    ``frequency(verb, noun, caption)`` is a sample's, ``frequencies`` those of the whole table. ``steps`` are recorded,
    all ``total`` of them where they are not given.
    """
    assert [len(rank["loss"]) for rank in ranks] == [total if steps is None else steps] * len(ranks)
    worst = 0.0
    for call in range(len(ranks[0]["loss"])):
        images, texts = (torch.from_numpy(np.concatenate([r[n][call] for r in ranks])) for n in ("image", "text"))
        images, texts = torch.nn.functional.normalize(images), torch.nn.functional.normalize(texts)
        own = [frequency(*of) for r in ranks for of in zip(r["verb"][call], r["noun"][call], r["caption"][call])]
        tau = reference.temperature(own, list(frequencies), alpha, shift_min, shift_max, call, total / 5)
        expected = float(getattr(reference, loss)(images, texts, torch.from_numpy(tau)))
        worst = max(worst, *(abs(r["loss"][call] - expected) / max(1.0, expected) for r in ranks))
    return worst


def check_classes(ranks, distribution, counts, total, *preset, **more) -> float:
    return check(
        ranks, lambda verb, noun, _: counts[KEYS[distribution](verb, noun)], counts.values(), total, *preset, **more
    )


KEYS = {
    "noun": lambda verb, noun: str(noun),
    "verb": lambda verb, noun: str(verb),
    "verb_noun": lambda verb, noun: f"{verb}_{noun}",
}


def counts_of(classes, distribution):
    return Counter(KEYS[distribution](*pair) for pair in classes)


@pytest.mark.parametrize(("distribution", "loss"), [("noun", "mmts"), ("verb_noun", "mmts-infonce")])
def test_every_step_equals_the_reference(distribution, loss, metadata, tmp_path):
    flags = ["--loss", loss] + (["--mmts-distribution", distribution] if distribution != "noun" else [])
    output, ranks = run_stand_in(tmp_path, metadata, "run", *flags, "--print-freq", 1)
    preset = ("info_nce", 0.08, 0.05, 0.20) if loss == "mmts-infonce" else ()
    assert check_classes(ranks, distribution, counts_of(CLASSES, distribution), 12, *preset) < 1e-6
    banner = "MM-TS: mmts-max-margin: alpha 0.2 over 12 steps, period 2.4; shifts 0.17 to 0.3"
    assert output.count(banner) == (loss == "mmts")
    lines = [line for line in output.splitlines() if line.startswith("Epoch: ")]
    assert ["MM-TS 5/12 " in line for line in lines].index(True) == 5
    assert all("\tMM-TS " in line for line in lines)
    assert "MM-TS" not in (tmp_path / "out" / "run" / "log.txt").read_text()
    assert f"distribution: {distribution}" in (tmp_path / "out" / "run" / "mmts.yaml").read_text()


def test_the_drawn_caption_counts(metadata, tmp_path):
    # Of classes: a drawn narration has the count of its own class.
    flags = ("--loss", "mmts", "--mmts-cluster-of", "caption")
    _, ranks = run_stand_in(tmp_path, metadata, "classes", *flags)
    counts = counts_of(CLASSES, "noun")
    assert check(ranks, lambda _verb, _noun, caption: counts[caption.split()[1]], counts.values(), 12) < 1e-6
    assert check_classes(ranks, "noun", counts, 12) > 1e-3
    # Of clusters: a table of captions.
    sizes = {caption: 1 + i**2 for i, caption in enumerate(NARRATIONS)}
    ClusterTable.build(list(sizes), range(len(sizes)), list(sizes.values())).save(tmp_path / "captions.parquet")
    flags += ("--mmts-clusters", tmp_path / "captions.parquet")
    _, ranks = run_stand_in(tmp_path, metadata, "clusters", *flags, ranks=2)
    assert check(ranks, lambda _verb, _noun, caption: sizes[caption], sizes.values(), 6) < 1e-6
    assert "distribution: null" in (tmp_path / "out" / "clusters" / "mmts.yaml").read_text()


def test_two_ranks_killed_and_resumed(metadata, tmp_path):
    flags = ("--loss", "mmts", "--print-freq", 1)
    output, whole = run_stand_in(tmp_path, metadata, "whole", *flags, ranks=2, launched=True)
    assert check_classes(whole, "noun", counts_of(CLASSES, "noun"), 6) < 1e-6
    assert output.count("MM-TS: mmts-max-margin") == 1
    _, first = run_stand_in(tmp_path, metadata, "cut", *flags, ranks=2, code=9, TEST_DIE_AT="3")
    _, second = run_stand_in(tmp_path, metadata, "cut", *flags, ranks=2)
    for rank in range(2):
        resumed = np.concatenate([first[rank]["loss"], second[rank]["loss"]])
        np.testing.assert_array_equal(resumed, whole[rank]["loss"])


def test_ablation_and_a_saved_config(metadata, tmp_path):
    flags = ("--loss", "mmts", "--mmts-no-schedule", "--mmts-distribution", "verb")
    _, shifts = run_stand_in(tmp_path, metadata, "ics", *flags)
    assert check_classes(shifts, "verb", counts_of(CLASSES, "verb"), 12, alpha=0) < 1e-6
    _, again = run_stand_in(tmp_path, metadata, "again", "--mmts-config", tmp_path / "out" / "ics" / "mmts.yaml")
    np.testing.assert_array_equal(again[0]["loss"], shifts[0]["loss"])


def test_without_the_flag_nothing_changes(metadata, tmp_path):
    armed, with_us = run_stand_in(tmp_path, metadata, "armed", "--lr", 0)
    plain, without = run_stand_in(tmp_path, metadata, "plain", "--lr", 0, install=False, MMTS="0")
    assert armed == plain
    for name, values in without[0].items():
        np.testing.assert_array_equal(values, with_us[0][name])
    assert not (tmp_path / "out" / "armed" / "mmts.yaml").exists()
    # lr 0: the model stays as it was made; training is ours then, and validation still the host's.
    _, ours = run_stand_in(tmp_path, metadata, "ours", "--loss", "mmts", "--lr", 0)
    assert not np.isclose(ours[0]["loss"], without[0]["loss"], atol=1e-4).all()
    np.testing.assert_array_equal(ours[0]["validation"], without[0]["validation"])


def test_spawned_workers_know_the_samples(metadata, tmp_path):
    flags = ("--loss", "mmts", "-j", 1, "--print-freq", 1)
    spawned, _ = run_stand_in(tmp_path, metadata, "spawn", *flags, TEST_WORKERS="spawn")
    forked, _ = run_stand_in(tmp_path, metadata, "fork", *flags, TEST_WORKERS="fork")
    # Margins alone: what a sample looks like is fixed by our recorder, which a spawned worker does not run.
    margins = [line.split("MM-TS ")[1] for line in spawned.splitlines() if "\tMM-TS " in line]
    assert len(margins) == 12
    assert margins == [line.split("MM-TS ")[1] for line in forked.splitlines() if "\tMM-TS " in line]


@pytest.fixture
def ego4d(tmp_path) -> Path:
    narrations = [name if i % 3 else [name, NARRATIONS[0]] for i, name in enumerate(NARRATIONS * 4)]
    path = tmp_path / "ego4d.json"
    path.write_text(json.dumps([[f"video{i}", 0.0, 1.0, text] for i, text in enumerate(narrations)]))
    return path


@pytest.mark.parametrize("rate", [[], ["--fix-lr"]])
def test_pretraining_on_narrations(rate, ego4d, tmp_path):
    sizes = {caption: 1 + i**2 for i, caption in enumerate(NARRATIONS)}
    ClusterTable.build(list(sizes), range(len(sizes)), list(sizes.values())).save(tmp_path / "captions.parquet")
    flags = ("--loss", "mmts", "--mmts-clusters", tmp_path / "captions.parquet", *rate)
    output, whole = run_stand_in(tmp_path, ego4d, "whole", *flags, ranks=2, script=PRETRAIN)
    total = len(whole[0]["loss"])
    assert total == 2 * (len(NARRATIONS) * 4 // 8)
    preset = ("info_nce", 0.08, 0.05, 0.20)
    assert check(whole, lambda _verb, _noun, caption: sizes[caption], sizes.values(), total, *preset) < 1e-6
    for call in range(total):
        images, texts = (np.concatenate([rank[name][call] for rank in whole]) for name in ("image", "text"))
        scores = images @ texts.T
        ahead = scores.diagonal() - np.where(np.eye(8), -np.inf, scores).max(1)  # equal captions tie
        accuracy = np.mean([rank["accuracy"][call] for rank in whole])
        assert 100 * (ahead > 1e-6).mean() <= accuracy <= 100 * (ahead > -1e-6).mean()
    assert f"MM-TS {total - 1}/{total} tau " in output
    _, first = run_stand_in(
        tmp_path, ego4d, "cut", *flags, ranks=2, script=PRETRAIN, code=9, TEST_DIE_AT=str(total // 2)
    )
    _, second = run_stand_in(tmp_path, ego4d, "cut", *flags, ranks=2, script=PRETRAIN)
    for rank in range(2):
        resumed = np.concatenate([first[rank]["loss"], second[rank]["loss"]])
        np.testing.assert_array_equal(resumed, whole[rank]["loss"])


def test_submitted_jobs_take_our_flags_along(metadata, tmp_path):
    pytest.importorskip("submitit", reason="install submitit")
    common = ("--train-metadata", metadata, "--val-metadata", metadata, "--print-freq", 1)
    paths = f"{REPOSITORY}{os.pathsep}{STAND_IN}"
    done = run_python(
        *("-m", "mmts_plugins", "run", STAND_IN / "scripts" / "run_with_submit_lavila_finetune_mir.py", *common),
        *("--output-dir", tmp_path / "job", "--job_dir", tmp_path / "jobs", "--loss", "mmts", "--mmts-alpha", "0.1"),
        PYTHONPATH=paths,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("\tMM-TS ") == 12
    direct = plain_run(metadata, tmp_path, "--loss", "mmts", "--mmts-alpha", "0.1", "--print-freq", 1)
    steps = [line for line in direct.stdout.splitlines() if "\tMM-TS " in line]
    assert len(steps) == 12
    assert all(step in done.stdout for step in steps)
    # The checkpoint holds plain values: it must load where we are not installed.
    load = "print(torch.load(sys.argv[1], weights_only=False)['args'])"
    code = f"import sys, torch; sys.modules['mmts_plugins'] = None; {load}"
    loaded = run_python("-c", code, tmp_path / "job" / "checkpoint.pt")
    assert "mmts_alpha=0.1" in loaded.stdout


def plain_run(metadata, tmp_path, *flags: object, **more: str) -> subprocess.CompletedProcess:
    return run_forked(
        *("-m", "mmts_plugins", "run", STAND_IN / "scripts" / SCRIPT, "--train-metadata", metadata),
        *("--val-metadata", metadata, "--output-dir", tmp_path / "out", *flags),
        **{"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{STAND_IN}", **more},
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "mmts", "--mmts-alhpa", "1"], "did you mean --mmts-alpha?"),
        (["--loss", "mmts", "--update-freq", "2"], "gradient accumulation is broken in AVION itself"),
        (
            ["--loss", "mmts", "--mmts-clusters", "few.csv"],
            "EPIC_train.csv are not in few.csv (95% found by noun class), for example '12'",
        ),
    ],
)
def test_one_clear_error_before_training(flags, message, metadata, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("few.csv").write_text(FEW)
    done = plain_run(metadata, tmp_path, *flags)
    assert done.returncode != 0
    last = done.stdout.splitlines()[-1]
    assert last.startswith("mmts: error: "), done.stdout[-2000:]
    assert message in last
    assert "Traceback" not in done.stdout
    assert "Epoch: " not in done.stdout
    assert not list(tmp_path.rglob("mmts.yaml"))
    assert not list(tmp_path.rglob("*.pt"))


# -- the adapter alone -------------------------------------------------------------------------------------------------


def arguments(tmp_path, metadata, **more):
    given = {"train_metadata": str(metadata), "output_dir": str(tmp_path / "out"), "resume": "", "update_freq": 1}
    (tmp_path / "out").mkdir(exist_ok=True)
    return argparse.Namespace(
        **{**given, "world_size": 1, "rank": 0, "gpu": None, "epochs": 2, "print_freq": 10, **more}
    )


def samples(classes=CLASSES):
    rows = [("video", 0.0, 1.0, 30.0, f"{'abcde'[verb]} {noun}", verb, noun) for verb, noun in classes]
    return argparse.Namespace(samples=rows, metadata="metadata.csv", tokenizer=None)


def begun(tmp_path, metadata, *flags, pretraining=False, **more) -> Job:
    loss = [] if "--loss" in flags else ["--loss", "mmts"]
    given, _ = split_flags(authors_flags([*loss, *map(str, flags)]))
    job = Job(PRETRAINING if pretraining else FINETUNING, given, "checkout")
    job.begin(arguments(tmp_path, metadata, **more))
    return job


def started(job: Job, dataset=None, total: int = 12) -> AVIONSession:
    """As AVION does it: the training data first, then the length of the run."""
    job.find(samples() if dataset is None else dataset)
    return job.start(total)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mmts-clusters", "none.csv"], "none.csv: cannot be read"),
        (["--mmts-clusters", "bad.csv"], "bad.csv: line 2: the count of class '0' is 'many'"),
        (["--mmts-clusters", "captions.parquet", "--mmts-distribution", "noun"], "captions has no classes"),
        (
            ["--mmts-clusters", "captions.parquet"],
            "19 of 24 training samples of metadata.csv are not in captions.parquet (20% found by caption)",
        ),
        (
            ["--mmts-clusters", "captions.parquet", "--mmts-missing", "tail"],
            "made from other captions, classes or annotations?",
        ),
    ],
)
def test_tables_that_do_not_fit(flags, message, metadata, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ClusterTable.build(["a 1", "d 3"], [0, 1], [1, 2], kind=CAPTION).save("captions.parquet")
    Path("bad.csv").write_text("class_id,count\n0,many\n")
    with pytest.raises(MMTSError, match=re.escape(message)):
        begun(tmp_path, metadata, *flags).find(samples())


@pytest.mark.parametrize(
    ("columns", "message"),
    [(("narration", "verb_class"), "column 'noun_class' is missing"), (None, "cannot be read as an EK-100")],
)
def test_metadata_without_classes(columns, message, tmp_path):
    metadata = tmp_path / "other.csv"
    if columns is not None:
        write_metadata(metadata, CLASSES, columns)
    with pytest.raises(TableError, match=f"other.csv: .*{message}"):
        begun(tmp_path, metadata)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mmts-distribution", "noun", "--mmts-clusters", "t"], "narrations and no classes"),
        (["--mmts-cluster-of", "segment", "--mmts-clusters", "t"], "narrations and no classes"),
        ([], "needs the cluster table"),
        (["--mmts-clusters", "classes.csv"], "a table of classes, but narrations of pre-training have none"),
    ],
)
def test_pretraining_refuses_classes(flags, message, metadata, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("classes.csv").write_text(FEW)
    with pytest.raises(MMTSError, match=message):
        begun(tmp_path, metadata, *flags, pretraining=True)


def test_distribution_files_of_both_kinds_and_unknown_classes(metadata, tmp_path):
    (tmp_path / "few.csv").write_text(FEW)
    from_csv = begun(tmp_path, metadata, "--mmts-clusters", tmp_path / "few.csv", "--mmts-missing", "tail")
    ClusterTable.build(["0", "1", "2", "3", "8"], range(5), [3, 2, 9, 2, 1], [3, 2, 9, 2, 1], CLASS).save(
        tmp_path / "few.parquet"
    )
    from_table = begun(tmp_path, metadata, "--mmts-clusters", tmp_path / "few.parquet", "--mmts-missing", "tail")
    for job in (from_csv, from_table):
        run = started(job)
        shift = run.tau.shift(torch.from_numpy(job.find(samples())))
        counts = {"0": 3, "1": 2, "2": 9, "3": 2, "8": 1, "12": 1}
        expected = [0.17 + 0.13 * (counts[str(noun)] - 1) / 8 for _, noun in CLASSES]
        np.testing.assert_allclose(shift.numpy(), expected, atol=1e-12)


def test_a_segments_own_narration_in_a_caption_table(metadata, tmp_path):
    sizes = {caption: 1 + i**2 for i, caption in enumerate(NARRATIONS)}
    ClusterTable.build(list(sizes), range(len(sizes)), list(sizes.values())).save(tmp_path / "captions.parquet")
    job = begun(tmp_path, metadata, "--mmts-clusters", tmp_path / "captions.parquet")
    shift = started(job).tau.shift(torch.from_numpy(job.find(samples())))
    own = [sizes[sample[4]] for sample in samples().samples]
    np.testing.assert_allclose(shift, 0.17 + 0.13 * (np.array(own) - 1) / (max(sizes.values()) - 1), atol=1e-12)


def test_the_authors_own_names(metadata, tmp_path):
    (tmp_path / "verbs.csv").write_text("class_id,count\n0,3\n1,2\n2,9\n3,2\n4,1\n")
    theirs = ["--use-distribution", "verb", f"--mmts-verb-dist-path={tmp_path / 'verbs.csv'}"]
    theirs += ["--mmts-noun-dist-path", "unused.csv", "--mmts-alpha", "0.1", "--epochs", "3"]
    given, rest = split_flags(authors_flags(["--loss-type", "mmts_clip", *theirs]))
    assert rest == ["--epochs", "3"]
    assert given == {
        "loss": "mmts-infonce",
        "mmts_distribution": "verb",
        "mmts_clusters": str(tmp_path / "verbs.csv"),
        "mmts_alpha": 0.1,
    }
    with pytest.raises(MMTSError, match="--loss-type max_margin: without our"):
        authors_flags(["--loss-type", "max_margin"])


def test_resume_with_another_config_stops(metadata, tmp_path):
    started(begun(tmp_path, metadata))
    (tmp_path / "out" / "checkpoint.pt").touch()
    started(begun(tmp_path, metadata))
    with pytest.raises(MMTSError, match=r"alpha was 0\.2 and is 0\.1"):
        started(begun(tmp_path, metadata, "--mmts-alpha", "0.1"))
    with pytest.raises(MMTSError, match="distribution was 'noun' and is 'verb'"):
        started(begun(tmp_path, metadata, "--mmts-distribution", "verb"))
    started(begun(tmp_path, metadata, "--mmts-alpha", "0.1", "--mmts-allow-config-change"))
    (tmp_path / "out" / "mmts.yaml").unlink()
    with pytest.raises(MMTSError, match="the checkpoint was not trained with MM-TS"):
        started(begun(tmp_path, metadata))


def test_a_step_without_clock_or_classes_stops(metadata, tmp_path):
    host = argparse.Namespace(local_loss=False, gather_with_grad=False, rank=0, world_size=1)
    features = torch.randn(4, 8)
    with pytest.raises(SeamError, match="its training data were never seen"):
        begun(tmp_path, metadata).start(12)
    run = started(begun(tmp_path, metadata))
    with pytest.raises(SeamError, match="no clock"):
        run.loss_of_batch(host, features, features, torch.zeros(4, dtype=torch.long))
    run.at_step(0)
    with pytest.raises(SeamError, match="does not carry the samples' classes"):
        run.loss_of_batch(host, features, features, torch.full((4,), 0.5))
    flags = ("--mmts-cluster-of", "caption", "--mmts-no-shifts", "--mmts-allow-config-change")
    drawn = started(begun(tmp_path, metadata, *flags))
    drawn.at_step(0)
    with pytest.raises(SeamError, match="captions the model was not given"):
        drawn.loss_of_batch(host, features, features)


def test_drawn_captions_that_were_not_tried_before_training(metadata, tmp_path, capsys):
    """Of 12,000 narrations 10,000 are tried, and the first 100 batches draw none of those."""
    known = [f"take {i}" for i in range(12_000)]
    ClusterTable.build(known, [0] * len(known), range(1, len(known) + 1)).save(tmp_path / "captions.parquet")
    tried = set(np.unique(np.linspace(0, 11_999, 10_000).astype(int)).tolist())
    texts = [name if i in tried else name.replace("take", "lose") for i, name in enumerate(known)]
    drawn = [text for text in texts if text.startswith("lose")]
    dataset = argparse.Namespace(
        samples=[("v", 0.0, 1.0, text) for text in texts], metadata="m.pkl", tokenizer=tokenize
    )
    host = argparse.Namespace(local_loss=False, gather_with_grad=False, rank=0, world_size=1)
    features = torch.randn(20, 8)
    for missing, steps, message in (
        (
            "error",
            1,
            "20 of the first 20 drawn captions are not in .* for example .*made from other captions",
        ),
        ("tail", 64, "1280 of the first 1280 drawn captions are not in .*made from other captions"),
    ):
        flags = ("--mmts-clusters", tmp_path / "captions.parquet", "--mmts-missing", missing)
        job = begun(tmp_path, metadata, *flags, pretraining=True)
        assert job.find(dataset) is None
        run = job.start(500)
        run._steps_per_epoch = 500
        for step in range(steps):
            run.at_step(step)
            run.take_tokens(tokenize(drawn[20 * step :][:20]))
            with pytest.raises(TableError, match=message) if step == steps - 1 else contextlib.nullcontext():
                run.loss_of_batch(host, features, features)
    # The first epoch ends before so many were seen: then it is judged as it is.
    run = started(begun(tmp_path, metadata, *flags, pretraining=True), dataset, 10)
    run._steps_per_epoch = 2
    for step, captions in enumerate([known[:20], [*known[:11], *drawn[:9]]]):
        run.at_step(step)
        run.take_tokens(tokenize(captions))
        run.loss_of_batch(host, features, features)
    said = "MM-TS: warning: 9 of the first 40 drawn captions are not in "
    assert [line.split(said)[1] for line in capsys.readouterr().out.splitlines() if said in line] == [
        f"{tmp_path}/captions.parquet (77% found), for example 'lose 5'; 'lose 11'; 'lose 17'; they get the tail shift "
        "(--mmts-missing)"
    ]


def test_evaluation_alone_says_so(metadata, tmp_path, capsys):
    begun(tmp_path, metadata, evaluate=True)
    assert "MM-TS: warning: --loss mmts changes nothing here: --evaluate trains nothing" in capsys.readouterr().out
    started(begun(tmp_path, metadata, start_epoch=2))
    assert "MM-TS: warning: 2 of --epochs 2 are done: nothing is trained" in capsys.readouterr().out


def test_a_narration_of_several_classes_counts_as_its_commonest(metadata, tmp_path):
    rows = [("stir", 0, 5)] * 3 + [("stir", 0, 7)] * 2 + [("cut", 1, 7)] * 9
    with metadata.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["narration", "verb_class", "noun_class"])
        writer.writerows(sorted(rows, key=lambda row: -row[2]))  # the other class comes first
    table = narrations(str(metadata), "noun", count_classes(str(metadata), "noun"))
    found = dict(zip(table.keys.to_pylist(), zip(table.frequency.tolist(), table.count.tolist())))
    assert found == {"cut": (11, 9), "stir": (3, 5)}


BAD_COUNTS = {
    "1e3": "'1e3': not a whole number",
    "1_000": "'1_000': not a whole number",
    "9" * 5000: "too large",
    "9" * 16: "too large",
    "-3": "'-3': not a whole number",
    "": "'': not a whole number",
    "0": "class 7 has the count 0",
}


@pytest.mark.parametrize(("count", "message"), BAD_COUNTS.items(), ids=[name[:9] for name in BAD_COUNTS])
def test_counts_that_are_none(count, message, tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text(f"class_id,count\n7,{count}\n8,3\n")
    with pytest.raises(TableError, match=re.escape(message)) as stopped:
        load_classes(str(path))
    assert len(str(stopped.value)) < 500


def test_counts_as_a_spreadsheet_saves_them(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_bytes("class_id,count,note\r\n7, 4 ,x,y\r\n8,3\r\n".encode("utf-8-sig"))
    table = load_classes(str(path))
    assert dict(zip(table.keys.to_pylist(), table.frequency.tolist())) == {"7": 4, "8": 3}
    path.write_text("class_id,count\n,4\n8,3\n")
    with pytest.raises(TableError, match="line 2: no class_id"):
        load_classes(str(path))


def test_half_precision_features(metadata, tmp_path):
    host = argparse.Namespace(local_loss=False, gather_with_grad=False, rank=0, world_size=1)
    images, texts = torch.randn(2, 16, 32, dtype=torch.bfloat16).unbind()
    found = []
    for features in ((images, texts), (images.float(), texts.float())):
        job = begun(tmp_path, metadata, "--loss", "mmts-infonce", "--mmts-allow-config-change")
        run = started(job)
        run.at_step(3)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run.loss_of_batch(host, *features, torch.from_numpy(job.find(samples())[:16])))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_the_authors_fork_is_left_alone(metadata, tmp_path):
    fork = tmp_path / "fork"
    shutil.copytree(STAND_IN, fork, ignore=shutil.ignore_patterns("__pycache__"))
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
    assert "MM-TS 0/" not in ours.stdout
    (tmp_path / "out" / "checkpoint.pt").unlink()
    plain = run_python(script, *flags, MMTS="0", PYTHONPATH=paths)
    assert plain.stdout == "\n".join(ours.stdout.splitlines()[1:]) + "\n"


def test_help_and_other_scripts(tmp_path):
    paths = f"{REPOSITORY}{os.pathsep}{STAND_IN}"
    done = run_python(*("-m", "mmts_plugins", "run", STAND_IN / "scripts" / SCRIPT, "--help"), PYTHONPATH=paths)
    assert done.returncode == 0
    assert "--mmts-distribution {noun,verb,verb_noun}" in done.stdout
    assert "--train-metadata" in done.stdout
    script = tmp_path / "main_lavila_finetune_cls.py"
    script.write_text("import avion.losses.losses\nprint('trained')\n")
    become = f"import runpy, sys; sys.argv = [{str(script)!r}, '--loss', 'mmts']; runpy.run_path(sys.argv[0])"
    done = run_python("-c", f"import mmts_plugins; mmts_plugins.install(); {become}", PYTHONPATH=paths)
    assert done.returncode != 0
    assert "in AVION, --loss mmts is for main_lavila_finetune_mir.py" in done.stdout.splitlines()[-1]


def test_example_dry_run(metadata, tmp_path):
    folders = {name: tmp_path / name for name in ("AVION", "videos", "annotations")}
    for folder in (*folders.values(), folders["AVION"] / "third_party/decord/python", folders["AVION"] / "scripts"):
        folder.mkdir(parents=True, exist_ok=True)
    (folders["AVION"] / "scripts" / SCRIPT).touch()
    (folders["annotations"] / "relevancy").mkdir()
    for split in ("train", "test"):
        shutil.copy(metadata, folders["annotations"] / f"EPIC_100_retrieval_{split}.csv")
        (folders["annotations"] / f"EPIC_100_retrieval_{split}_sentence.csv").touch()
        (folders["annotations"] / "relevancy" / f"caption_relevancy_EPIC_100_retrieval_{split}.pkl").touch()
    flags = [word for name, folder in folders.items() for word in (f"--{name.lower()}", folder)]
    flags += ["--checkpoint", tmp_path / "checkpoint.pt", "--output", tmp_path / "out", "--dry-run"]
    example = REPOSITORY / "examples" / "avion_ek100_mir" / "run.py"
    done = run_python(example, "clip-ts", *flags)
    assert done.returncode == 1
    assert f"missing: {tmp_path / 'checkpoint.pt'}" in done.stdout
    (tmp_path / "checkpoint.pt").touch()
    # 24 samples fill no batch of 512: the run would have no step, and the dry run says so.
    done = run_python(example, "clip-ts", *flags)
    assert done.returncode == 1
    assert "a run has at least one optimizer step" in done.stdout
    write_metadata(folders["annotations"] / "EPIC_100_retrieval_train.csv", CLASSES * 30)
    done = run_python(example, "verbs-nouns", *flags, "--", "--print-freq", 50)
    assert done.returncode == 0, done.stdout
    assert "--loss mmts --mmts-distribution verb_noun --print-freq 50" in done.stdout
    assert "period 20 steps: 5 periods over 100 steps" in " ".join(done.stdout.split())
    assert not (tmp_path / "out").exists()


def test_counts_equal_the_published_distributions():
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


TEST_METADATA = "EPIC_100_retrieval_test.csv"
TEST_RELEVANCY = "relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl"
PRETRAIN_FLAGS = ["--model", "CLIP_TINY", "--project-embed-dim", "32", "--clip-length", "2", "--batch-size", "4"]
PRETRAIN_FLAGS += ["-j", "0", "--epochs", "2", "--print-freq", "1", "--lr", "1e-3"]


@pytest.fixture(scope="session")
def real_data():
    # Not under pytest's own folder: AVION replaces "test" anywhere in a path.
    with tempfile.TemporaryDirectory(prefix="avion-") as folder:
        yield Path(folder) / "data"


def run_real(folder: Path, real: Path, name: str, *flags: object, ranks: int = 1, code: int = 0, **more):
    root, script = Path(os.environ["AVION_ROOT"]).resolve(), more.pop("script", SCRIPT)
    made, install, out = overlay(folder, root), more.pop("install", True), folder / "out" / name
    command = ["bash", str(HARNESS), str(out), "--lr", "1e-3", *map(str, flags)]
    variables = {"PY": sys.executable, "DATA": str(real), "NPROC": str(ranks), "EXTRA_PP": str(REPOSITORY)}
    if script == PRETRAIN:  # what the harness does for the other script
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *TORCHRUN, str(ranks), f"scripts/{script}", *PRETRAIN_FLAGS, *map(str, flags)]
        command += ["--root-val", str(real / "video"), "--output-dir", str(out)]
        for name_, file in (("val-metadata", TEST_METADATA), ("relevancy-path", TEST_RELEVANCY)):
            command += [f"--{name_}", str(real / "ann" / file)]
        paths = (HARNESS.parent / "site", made, REPOSITORY)
        variables |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "AVION_CPU_SHIM": "1", "OMP_NUM_THREADS": "1"}
        variables |= {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "TEST_SPREAD": "1"}
    done = subprocess.run(
        command,
        env={
            **os.environ,
            **environment(folder / name, root / "scripts" / script, install),
            **variables,
            "AVION_ROOT": str(made),
            **more,
        },
        cwd=made,
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
    worst = check_classes(recorded, distribution, real_counts(real_data, distribution), total, *preset)
    print(f"greatest difference {worst:.1e}")
    assert worst < 1e-6
    assert output.count("\tMM-TS ") == total
    assert "mm" not in (tmp_path / "out" / "run" / "log.txt").read_text().lower()


@needs_avion
def test_real_loop_counts_the_drawn_caption(real_data, tmp_path):
    with (real_data / "ann" / "EPIC_100_retrieval_train.csv").open() as file:
        noun = {row["narration"]: row["noun_class"] for row in csv.DictReader(file)}
    counts = real_counts(real_data, "noun")
    flags = ("--loss", "mmts", "--mmts-cluster-of", "caption")
    _, recorded = run_real(tmp_path, real_data, "run", *flags, ranks=2)
    worst = check(recorded, lambda _verb, _noun, caption: counts[noun[caption]], counts.values(), 6)
    print(f"greatest difference {worst:.1e}")
    assert worst < 1e-6
    assert check_classes(recorded, "noun", counts, 6) > 1e-4


@needs_avion
def test_real_spawned_workers(real_data, tmp_path):
    flags = ("--loss", "mmts", "-j", 1, "--use-multi-epochs-loader")
    lines = {}
    for context in ("spawn", "fork"):
        output, _ = run_real(tmp_path, real_data, context, *flags, TEST_WORKERS=context)
        lines[context] = [line.split("MM-TS ")[1] for line in output.splitlines() if "\tMM-TS " in line]
    assert len(lines["fork"]) == 12
    assert lines["spawn"] == lines["fork"]


@needs_avion
@pytest.mark.parametrize("ranks", [1, 2])
def test_real_loop_killed_and_resumed(ranks, real_data, tmp_path):
    flags = ("--loss", "mmts")
    _, whole = run_real(tmp_path, real_data, "whole", *flags, ranks=ranks)
    die = {"TEST_DIE_AT": str(6 // ranks)}
    _, first = run_real(tmp_path, real_data, "cut", *flags, ranks=ranks, code=9, **die)
    output, second = run_real(tmp_path, real_data, "cut", *flags, ranks=ranks)
    assert "loaded latest checkpoint" in output
    for rank in range(ranks):
        resumed = np.concatenate([first[rank]["loss"], second[rank]["loss"]])
        np.testing.assert_array_equal(resumed, whole[rank]["loss"])


@needs_avion
def test_real_loop_without_the_flag(real_data, tmp_path):
    _, armed = run_real(tmp_path, real_data, "armed")
    _, plain = run_real(tmp_path, real_data, "plain", install=False, MMTS="0")
    for name, values in plain[0].items():
        np.testing.assert_array_equal(values, armed[0][name])


@needs_avion
@pytest.mark.parametrize("rate", [[], ["--fix-lr", "--freeze-temperature"]])
def test_real_pretraining(rate, real_data, tmp_path):
    run_real(tmp_path, real_data, "data")  # the harness makes its data
    with (real_data / "ann" / "EPIC_100_retrieval_train.csv").open() as file:
        rows = list(csv.DictReader(file))
    seconds = lambda stamp: sum(float(part) * 60 ** (2 - i) for i, part in enumerate(stamp.split(":")))  # noqa: E731
    samples = [
        (r["video_id"], seconds(r["start_timestamp"]), seconds(r["stop_timestamp"]), r["narration"]) for r in rows
    ]
    samples = [(*s[:3], [s[3], samples[0][3]]) if i % 3 == 0 else s for i, s in enumerate(samples)]
    with tempfile.TemporaryDirectory(prefix="ego-") as name:
        folder = Path(name)
        (folder / "narrations.pkl").write_bytes(pickle.dumps(samples))
        for chunk in real_data.glob("video/*/*.MP4/*.MP4"):
            link = folder / f"{chunk.parent.stem}.mp4" / f"{chunk.stem}.mp4"
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(chunk)
        captions = sorted({r["narration"] for r in rows})
        sizes = {caption: 1 + i**2 for i, caption in enumerate(captions)}
        ClusterTable.build(captions, range(len(sizes)), list(sizes.values())).save(tmp_path / "captions.parquet")
        flags = ("--root", folder, "--train-metadata", folder / "narrations.pkl", "--loss", "mmts", *rate)
        flags += ("--mmts-clusters", tmp_path / "captions.parquet")
        output, whole = run_real(tmp_path, real_data, "whole", *flags, ranks=2, script=PRETRAIN)
        preset = ("info_nce", 0.08, 0.05, 0.20)
        worst = check(whole, lambda _verb, _noun, caption: sizes[caption], sizes.values(), 6, *preset)
        print(f"greatest difference {worst:.1e}")
        assert worst < 1e-6
        assert np.ptp([rank["loss"] for rank in whole]) > 0.1
        assert output.count("\tMM-TS ") == 6
        die = {"TEST_DIE_AT": "3"}
        _, first = run_real(tmp_path, real_data, "cut", *flags, ranks=2, script=PRETRAIN, code=9, **die)
        _, second = run_real(tmp_path, real_data, "cut", *flags, ranks=2, script=PRETRAIN)
        for rank in range(2):
            resumed = np.concatenate([first[rank]["loss"], second[rank]["loss"]])
            np.testing.assert_array_equal(resumed, whole[rank]["loss"])
