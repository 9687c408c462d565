"""VAST's training loop: a stand-in with its signatures always, the real one where ``VAST_ROOT`` names a checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
import reference
import torch
from conftest import REPOSITORY, run_python
from forked import free_port, one_rank, run_forked
from resolving import resolve

from mmts_plugins.errors import ConfigError
from mmts_plugins.tables import CLASS, ClusterTable
from mmts_plugins.tables.index import KeyLookup

STAND_IN = REPOSITORY / "tests" / "vast_stand_in"
LAUNCH = ("-m", "torch.distributed.launch", "--standalone", "--nproc_per_node")
VERBS, NOUNS = ("cut", "fry", "mix"), ("egg", "rice", "oil", "beans")
CAPTIONS = [f"{VERBS[i % 3]} the {NOUNS[i % 7 % 4]}" for i in range(20)]
CLUSTER_OF = {caption: NOUNS.index(caption.split()[-1]) for caption in CAPTIONS}
TOTAL = 10
NOISE = 4e-6  # the stand-in's similarities reach 1, its logits 33: neighbours in float32 are that far apart
INFONCE, MAX_MARGIN = (0.06, 0.06, 0.09), (0.20, 0.10, 0.30)


class Set:
    """Annotations in VAST's form, with their cluster table."""

    def __init__(self, folder: Path, captions=CAPTIONS, **changes) -> None:
        annotations = [{"video_id": f"clip{i}", "desc": caption} for i, caption in enumerate(captions)]
        for number, caption in changes.items():
            annotations[int(number[1:])]["desc"] = caption
        self.txt, self.table = folder / "train.json", folder / "clusters.parquet"
        self.txt.write_text(json.dumps(annotations))
        count = Counter(captions)
        sizes = Counter(CLUSTER_OF[caption] for caption in captions)
        self.frequency = {caption: sizes[CLUSTER_OF[caption]] for caption in count}
        ClusterTable.build(
            list(count), [CLUSTER_OF[c] for c in count], list(self.frequency.values()), list(count.values())
        ).save(self.table)

    @property
    def ours(self) -> tuple[object, ...]:
        return "--loss", "mmts", "--mmts-clusters", self.table


@pytest.fixture
def data(tmp_path) -> Set:
    return Set(tmp_path)


# -- running -----------------------------------------------------------------------------------------------------------


def overlay(folder: Path, root: Path) -> Path:
    """A checkout whose script is our recorder, which becomes the real one."""
    made = folder / "overlay"
    if not made.exists():
        made.mkdir()
        for path in root.iterdir():
            (made / path.name).symlink_to(REPOSITORY / "tests" / "recorded_vast.py" if path.name == "run.py" else path)
    return made


def environment(record: Path, root: Path, install: bool = True, **more: str) -> dict[str, str]:
    return {"TEST_RECORD": str(record), "TEST_SCRIPT": str(root / "run.py"), "TEST_INSTALL": str(int(install)), **more}


def read(record: Path, ranks: int) -> list[list[dict]]:
    return [json.loads(Path(f"{record}-{rank}.json").read_text()) for rank in range(ranks)]


def run_stand_in(
    folder: Path, data: Set, name: str, *flags: object, ranks: int = 0, code: int = 0, root: Path = STAND_IN, **more
):
    install, launched = more.pop("install", True), more.pop("launched", False)
    script = overlay(folder, root) / "run.py"
    given = ("--train_txt", data.txt, "--output_dir", folder / "out" / name, *flags)
    variables = environment(folder / name, root, install, PYTHONPATH=str(REPOSITORY), **more)
    if launched:
        done = run_python(*LAUNCH, ranks, script, *given, **variables)
    elif install:
        done = run_forked(script, "--local_rank", 0, *given, ranks=max(1, ranks), **variables)
    else:  # where no start-up file ran either
        done = run_python(script, "--local_rank", 0, *given, **{**one_rank(), **variables})
    assert (done.returncode == 0) == (code == 0), done.stdout[-3000:]
    return done.stdout, read(folder / name, max(1, ranks))


def plain_run(folder: Path, data: Set, *flags: object, root: Path = STAND_IN, **more: str):
    """As a user starts it, with our launcher."""
    return run_forked(
        *("-m", "mmts_plugins", "run", root / "run.py", "--local_rank", 0, "--train_txt", data.txt),
        *("--output_dir", folder / "out", *flags),
        **{"PYTHONPATH": str(REPOSITORY), **one_rank(), **more},
    )


# -- the paper's words -------------------------------------------------------------------------------------------------


def margins(record: dict, frequency: dict, preset, total: int, key: str = "captions") -> torch.Tensor:
    known = [frequency.get(name, min(frequency.values())) for name in record[key]]
    values = reference.temperature(known, list(frequency.values()), *preset, record["step"], total / 5)
    return torch.from_numpy(values)


def pairs(ranks: list[list[dict]], call: int, subtask: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip and text features of all ranks, in rank order."""
    clips, texts = (
        torch.tensor(np.concatenate([r[call]["features"][name] for r in ranks])) for name in (subtask, "feat_t")
    )
    return clips, texts


def smoothed(anchors: torch.Tensor, others: torch.Tensor, tau: torch.Tensor, first: int) -> torch.Tensor:
    """Cross-entropy of each anchor's row with the smoothing of 0.1 that VAST has."""
    logits = anchors @ others.T / tau[:, None]
    log_p = logits - torch.logsumexp(logits, 1, keepdim=True)
    right = log_p[torch.arange(len(anchors)), first + torch.arange(len(anchors))]
    return -(0.9 * right + 0.1 * log_p.mean(1)).mean()


def expected_loss(ranks, call: int, rank: int, taus: list[torch.Tensor], max_margin: bool) -> float:
    """``loss_itc`` of one rank: InfoNCE of its own rows against all, or max-margin over all."""
    losses = []
    for subtask in ranks[rank][call]["task"].split("%")[1:]:
        clips, texts = pairs(ranks, call, f"feat_{subtask[1:]}")
        if max_margin:
            losses.append(reference.max_margin(clips, texts, torch.cat(taus)))
            continue
        n = len(taus[rank])
        own = slice(rank * n, (rank + 1) * n)
        rows = (smoothed(a[own], b, taus[rank], rank * n) for a, b in ((clips, texts), (texts, clips)))
        losses.append(sum(rows) / 2)
    return float(sum(losses) / len(losses))


def expected_weights(ranks, call: int, rank: int, taus) -> list[torch.Tensor]:
    """What hard negatives are drawn by, in VAST's order: clips for each text, then texts for each clip."""
    found = []
    for subtask in ranks[rank][call]["task"].split("%")[1:]:
        clips, texts = pairs(ranks, call, f"feat_{subtask[1:]}")
        n = len(taus)
        for anchors, others in ((texts, clips), (clips, texts)):
            weights = torch.softmax(anchors[rank * n : (rank + 1) * n] @ others.T / taus[:, None], 1) + 1e-4
            weights[torch.arange(n), rank * n + torch.arange(n)] = 0
            found += list(weights)
    return found


def check(
    ranks,
    frequency: dict,
    total: int = TOTAL,
    preset=INFONCE,
    max_margin: bool = False,
    host_negatives: Optional[bool] = None,
    key: str = "captions",
    steps: Optional[list[int]] = None,
) -> tuple[float, float]:
    """The greatest differences from the paper's words, at any step of any rank: of the loss, of negatives' weights.

    ``steps`` are those recorded; all of the run's, once, where they are not given.
    """
    for records in ranks:
        assert [record["step"] for record in records] == (list(range(total)) if steps is None else steps)
    worst_loss = worst_weight = 0.0
    host_negatives = max_margin if host_negatives is None else host_negatives
    for call in range(len(ranks[0])):
        taus = [margins(r[call], frequency, preset, total, key) for r in ranks]
        for rank, records in enumerate(ranks):
            record = records[call]
            found = record["losses"]["loss_itc"]
            worst_loss = max(worst_loss, abs(found - expected_loss(ranks, call, rank, taus, max_margin)))
            drawn_by = torch.full_like(taus[rank], record["temperature"]) if host_negatives else taus[rank]
            weights = expected_weights(ranks, call, rank, drawn_by)
            assert len(weights) == len(record["weights"]) > 0
            for ours, theirs in zip(weights, record["weights"]):
                worst_weight = max(worst_weight, float((ours - torch.tensor(theirs)).abs().max()))
    return worst_loss, worst_weight


# -- the stand-in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["ret%tv", "ret%tvas%ta%tv", "ret%tva_cap%tv"])
def test_every_step_equals_the_reference(task, data, tmp_path):
    output, ranks = run_stand_in(tmp_path, data, "run", *data.ours, "--train_task", task)
    assert max(check(ranks, data.frequency)) < NOISE
    assert output.count("MM-TS: mmts-infonce: alpha 0.06 over 10 steps, period 2; shifts 0.06 to 0.09") == 1
    assert output.count("MM-TS step 0/10: base +0.0300, mean 0.1") == 1
    assert "itm_temperature: mmts" in (tmp_path / "out" / "run" / "log" / "mmts.yaml").read_text()
    assert {record["temperature"] for record in ranks[0]} == {float(np.float32(0.07))}


def test_two_ranks_under_torch_distributed_launch(data, tmp_path):
    output, ranks = run_stand_in(tmp_path, data, "run", *data.ours, ranks=2, launched=True)
    assert max(check(ranks, data.frequency)) < NOISE
    assert output.count("MM-TS: mmts-infonce") == output.count("MM-TS step 0/10") == 1


@pytest.mark.parametrize("ranks", [0, 2])
def test_max_margin(ranks, data, tmp_path):
    flags = ("--loss", "mmts-max-margin", "--mmts-clusters", data.table)
    _, recorded = run_stand_in(tmp_path, data, "run", *flags, ranks=ranks)
    assert max(check(recorded, data.frequency, preset=MAX_MARGIN, max_margin=True)) < NOISE
    assert "loss_itc" in recorded[0][0]["losses"]
    assert set(recorded[0][0]["losses"]) == {"loss_itc", "loss_itm"}


def test_negatives_of_the_host(data, tmp_path):
    """The same loss with the host's own negatives."""
    _, own = run_stand_in(tmp_path, data, "own", *data.ours)
    _, host = run_stand_in(tmp_path, data, "host", *data.ours, "--mmts-itm-temperature", "host")
    assert max(check(host, data.frequency, host_negatives=True)) < NOISE
    assert np.isclose(own[0][0]["losses"]["loss_itc"], host[0][0]["losses"]["loss_itc"], atol=NOISE)
    difference = max(abs(a - b) for a, b in zip(own[0][0]["weights"][0], host[0][0]["weights"][0]))
    assert difference > 1e-3


def test_ablations(data, tmp_path):
    _, schedule = run_stand_in(tmp_path, data, "ts", "--loss", "mmts", "--mmts-no-shifts")
    assert max(check(schedule, dict.fromkeys(data.frequency, 1))) < NOISE
    _, shifts = run_stand_in(tmp_path, data, "ics", *data.ours, "--mmts-no-schedule")
    assert max(check(shifts, data.frequency, preset=(0.0, 0.06, 0.09))) < NOISE


def test_loops_of_other_kinds(data, tmp_path):
    """fp16 (here: CPU autocast), gradients summed by hand, captions in lists of one, a loader without retrieval."""
    listed = tmp_path / "lists.json"
    listed.write_text(json.dumps([{"video_id": f"c{i}", "desc": [caption]} for i, caption in enumerate(CAPTIONS)]))
    flags = ("--train_txt", listed, data.txt, "--train_task", "ret%tvas", "cap%tv", "--checkpointing", "true")
    _, ranks = run_stand_in(tmp_path, data, "mixed", *data.ours, *flags, ranks=2)
    assert max(check(ranks, data.frequency, steps=[0, 2, 4, 6, 8])) < NOISE
    for loss in ("mmts", "mmts-max-margin"):
        flags = ("--loss", loss, "--mmts-clusters", data.table, "--fp16", "true")
        _, half = run_stand_in(tmp_path, data, loss, *flags)
        preset = MAX_MARGIN if loss == "mmts-max-margin" else INFONCE
        worst, _ = check(half, data.frequency, preset=preset, max_margin=loss == "mmts-max-margin")
        assert half[0][0]["dtype"] == "torch.float32"
        assert worst < 0.03  # the host's similarities are in bfloat16


def test_clip_ids_as_keys(data, tmp_path):
    """A class for each clip, as for SSv2-LT; the same form as clusters of visual features."""
    frequency = {f"clip{i}": float(1 + i % 5) for i in range(len(CAPTIONS))}
    ClusterTable.build(list(frequency), [i % 5 for i in range(20)], list(frequency.values())).save(data.table)
    _, ranks = run_stand_in(tmp_path, data, "run", *data.ours, "--mmts-key", "id")
    assert max(check(ranks, frequency, key="ids")) < NOISE
    done = plain_run(tmp_path, data, *data.ours)
    assert_one_error(done, "20 of 20 training samples of ret%tvas--set0 are not in")
    assert "Its keys are ids: add --mmts-key id." in done.stdout


def test_killed_and_resumed_equals_uninterrupted(data, tmp_path):
    _, whole = run_stand_in(tmp_path, data, "whole", *data.ours)
    _, first = run_stand_in(tmp_path, data, "cut", *data.ours, code=9, TEST_DIE_AT="5")
    _, second = run_stand_in(tmp_path, data, "cut", *data.ours, "--resume")
    assert [record["step"] for record in second[0]] == list(range(3, TOTAL))
    assert [*first[0][:3], *second[0]] == whole[0]
    done = plain_run(tmp_path / "..", data, *data.ours, "--resume", "--output_dir", tmp_path / "out" / "cut",
                     "--mmts-alpha", "0.04")  # fmt: skip
    assert_one_error(done, "alpha was 0.06 and is 0.04")


def checkpoints(folder: Path) -> list:
    return [torch.load(path, weights_only=True) for path in sorted((folder / "ckpt").iterdir())]


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_without_the_flag_nothing_changes(data, tmp_path):
    armed, with_us = run_stand_in(tmp_path, data, "armed", "--loss", "x", "--los", "y")
    plain, without = run_stand_in(tmp_path, data, "plain", "--loss", "x", "--los", "y", install=False, MMTS="0")
    assert armed == plain
    assert with_us == without
    assert same(checkpoints(tmp_path / "out" / "armed"), checkpoints(tmp_path / "out" / "plain"))
    assert '"loss_type": "y"' in (tmp_path / "out" / "armed" / "log" / "hps.json").read_text()
    assert not list((tmp_path / "out").rglob("mmts.yaml"))
    _, ours = run_stand_in(tmp_path, data, "ours", *data.ours)
    assert not np.isclose(ours[0][0]["losses"]["loss_itc"], without[0][0]["losses"]["loss_itc"], atol=1e-3)
    assert not same(checkpoints(tmp_path / "out" / "ours"), checkpoints(tmp_path / "out" / "plain"))


def test_hps_json_is_the_hosts_own(data, tmp_path):
    run_stand_in(tmp_path, data, "plain", "--loss_t", "x", install=False, MMTS="0")
    run_stand_in(tmp_path, data, "ours", "--loss_t", "x", *data.ours)
    plain, ours = ((tmp_path / "out" / name / "log" / "hps.json").read_text() for name in ("plain", "ours"))
    assert plain == ours


def test_the_launcher_under_torch_distributed_launch(data, tmp_path):
    done = run_python(
        *(*LAUNCH, 1, "-m", "mmts_plugins", "run", STAND_IN / "run.py", "--train_txt", data.txt),
        *("--output_dir", tmp_path / "out", *data.ours),
        PYTHONPATH=str(REPOSITORY),
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.count("MM-TS step 0/10") == 1


# -- errors ------------------------------------------------------------------------------------------------------------


def assert_one_error(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("mmts: error: ")]
    assert len(errors) == 1, done.stdout[-2000:]
    assert message in errors[0]
    assert "Traceback" not in done.stdout
    assert "INFO - __main__ - step " not in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "mts"], "unknown --loss 'mts'"),
        (["--loss", "mmts-clip"], "unknown --loss 'mmts-clip'"),
        (["--los", "mmts"], "write --loss"),
        (["--mmts-alpha", "0.1"], "--mmts-* flags are given but not --loss"),
        (["--loss", "mmts"], "needs the cluster table"),
        (["--loss", "mmts", "--mmts-distribution", "noun"], "--mmts-distribution is for AVION"),
        (["--loss", "mmts-max-margin", "--mmts-no-shifts", "--mmts-itm-temperature", "mmts"], "has margins, not temp"),
        (["--loss", "mmts", "--mmts-clusters", "classes.parquet"], "a table of class ids, but VAST's samples"),
        (
            ["--loss", "mmts", "--mmts-clusters", "other.parquet"],
            "20 of 20 training samples of ret%tvas--set0 are not in other.parquet",
        ),
        (["--loss", "mmts", "--mmts-clusters", "few.parquet", "--mmts-missing", "error"], "2 of 20 training samples"),
        (["--loss", "mmts", "--mmts-no-shifts", "--train_txt", "two.json"], "clip clip3 has 2 captions"),
        (["--loss", "mmts", "--mmts-no-shifts", "--train_task", "cap%tv"], "no task of this run is retrieval"),
        (["--loss", "mmts", "--mmts-no-shifts", "--num_train_steps", "0"], "no optimizer step"),
    ],
)
def test_one_clear_error_before_training(flags, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ClusterTable.build(["0", "1"], [0, 1], [1, 2], kind=CLASS).save("classes.parquet")
    ClusterTable.build(["a dog", "a cat"], [0, 1], [1, 2]).save("other.parquet")
    few = sorted(caption for caption in data.frequency if caption != "cut the rice")
    ClusterTable.build(few, [CLUSTER_OF[c] for c in few], [data.frequency[c] for c in few]).save("few.parquet")
    two = [{"video_id": f"clip{i}", "desc": c if i != 3 else [c, c]} for i, c in enumerate(CAPTIONS)]
    Path("two.json").write_text(json.dumps(two))
    assert_one_error(plain_run(tmp_path, data, *flags), message)
    assert not list(tmp_path.rglob("mmts.yaml"))
    assert not list(tmp_path.rglob("*.pt"))


def test_captions_that_the_table_lacks_get_the_tail(data, tmp_path):
    few = {caption: size for caption, size in data.frequency.items() if caption != "cut the rice"}
    ClusterTable.build(list(few), [CLUSTER_OF[c] for c in few], list(few.values())).save(data.table)
    output, ranks = run_stand_in(tmp_path, data, "run", *data.ours)
    assert "2 of 20 training samples of ret%tvas--set0 are not in" in output
    assert "(90% found by caption), for example 'cut the rice'; they get the tail shift" in output
    assert max(check(ranks, few)) < NOISE


def test_values_are_logged_where_vast_logs_its_losses(data, tmp_path):
    output, _ = run_stand_in(tmp_path, data, "run", *data.ours, "--num_train_steps", 103, "--mmts-diagnostics-every", 0)
    assert [line.split(":")[0] for line in output.split("MM-TS step ")[1:]] == ["0/103", "49/103", "99/103"]
    lines = [json.loads(line) for line in (tmp_path / "out/run/log/mmts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 49, 99]
    base = [0.03 * np.cos(2 * np.pi * step / (103 / 5)) for step in (0, 49, 99)]
    assert [line["tau_base"] for line in lines] == pytest.approx(base, abs=1e-7)


def test_samples_that_are_unknown_before_training(data, tmp_path):
    """A data set without a list of annotations: the batches are judged, by all ranks together."""
    root = changed(tmp_path, data__IndexAnno=("self.annos", "self.rows"))
    ClusterTable.build(["a dog", "a cat"], [0, 1], [1, 2]).save(tmp_path / "other.parquet")
    run = (root / "run.py", "--local_rank", 0, "--train_txt", data.txt, "--output_dir", tmp_path / "out")
    flags = ("--loss", "mmts", "--mmts-clusters", tmp_path / "other.parquet")
    done = run_forked("-m", "mmts_plugins", "run", *run, *flags, ranks=2, PYTHONPATH=str(REPOSITORY))
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("mmts: error: ")]
    # All ranks stop alike, but the first to leave may reset a gloo connection that the other still reads from: that
    # one then says what gloo says. 60 samples are what both have seen; each of them drew half.
    assert len(set(errors)) == 1
    assert errors[0].startswith("mmts: error: 60 of the first 60 training samples are not in")
    few = {caption: size for caption, size in data.frequency.items() if caption != "cut the rice"}
    ClusterTable.build(list(few), [CLUSTER_OF[c] for c in few], list(few.values())).save(data.table)
    output, _ = run_stand_in(tmp_path, data, "few", *data.ours, ranks=2, root=root)
    assert output.count(" of the first 60 training samples are not in ") == 1
    assert "for example 'cut the rice'; 'cut the rice'; 'cut the rice'; they get the tail shift" in output


def test_evaluation_alone_says_so(data, tmp_path):
    root = changed(tmp_path, run=("train(model,", "len if args.run_cfg.mode == 'testing' else train(model,"))
    edited = root / "run.py"
    edited.write_text(edited.read_text().replace("    len if", "    None if"))
    edited = root / "utils" / "args.py"
    edited.write_text(
        edited.read_text().replace(
            '    parser.add_argument("--log_steps"',
            '    parser.add_argument("--mode")\n    parser.add_argument("--log_steps"',
        )
    )
    done = plain_run(tmp_path, data, *data.ours, "--mode", "testing", root=root)
    assert done.stdout.count("MM-TS: warning: --loss mmts changes nothing here: --mode testing trains nothing") == 1
    assert done.returncode == 0, done.stdout


def changed(folder: Path, **edits: tuple[str, str]) -> Path:
    """A copy of the stand-in, edited: ``model__vast`` is ``model/vast.py``."""
    copy = folder / "repository"
    for path in STAND_IN.rglob("*.py"):
        (copy / path.relative_to(STAND_IN)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(STAND_IN)).write_text(path.read_text())
    for name, (old, new) in edits.items():
        path = copy / (name.replace("__", "/") + ".py")
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return copy


def test_a_forward_that_scales_by_something_else(data, tmp_path):
    root = changed(tmp_path, model__vast=("contra_temp", "logit_scale"))
    done = plain_run(tmp_path, data, *data.ours, root=root)
    assert_one_error(done, "model.vast.VAST.forward_ret has changed: it does not use 'contra_temp'")


def test_transformers_that_lack_what_vast_imports(data, tmp_path):
    root = changed(tmp_path, model__text_encoders__bert__bert=("WORDS = 64", "from json import find_pruneable_heads"))
    done = plain_run(tmp_path, data, *data.ours, root=root)
    assert_one_error(
        done, "model.text_encoders.bert.bert cannot be imported: cannot import name 'find_pruneable_heads'"
    )
    assert "pip install 'transformers>=4.31,<4.56'" in done.stdout


def test_vast_27m_is_refused(data, tmp_path):
    root = changed(tmp_path, data__IndexAnno=('"raw_captions": list', '"omni_captions": 0, "raw_captions": list'))
    edited = root / "utils" / "pipeline.py"
    edited.write_text(edited.read_text().replace("for batch in loader", "for batch in []").replace("out[", "{}.get("))
    edited.write_text("\n".join(line for line in edited.read_text().split("\n") if "validation" not in line))
    done = plain_run(tmp_path, data, *data.ours, root=root)
    assert_one_error(done, "VAST-27M's vision, audio or omni captions")


@pytest.mark.parametrize("bypassed", ["forward_ret", "get_lr_sched"])
def test_a_bypassed_seam_stops_the_run(bypassed, data, tmp_path):
    edits = {
        "forward_ret": ("self.forward_ret if", "type(self).forward_ret.__wrapped__.__get__(self) if"),
        "get_lr_sched": ("ratio = get_lr_sched(", "ratio = get_lr_sched.__wrapped__("),
    }
    module = "model__vast" if bypassed == "forward_ret" else "utils__pipeline"
    done = plain_run(tmp_path, data, *data.ours, root=changed(tmp_path, **{module: edits[bypassed]}))
    assert done.returncode != 0
    expected = {"forward_ret": "step 0 went by without the MM-TS loss", "get_lr_sched": "without its number: no clock"}
    assert expected[bypassed] in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("flag", "value"), [("mmts_key", "id"), ("mmts_itm_temperature", "host")])
def test_other_hosts_refuse_what_is_for_vast(flag, value):
    flags = {"loss": "mmts", "mmts_no_shifts": True, flag: value}
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} is for VAST"):
        resolve(flags)


def test_keys_are_found_by_their_text():
    keys = ["a dog", "", "Ünïcode ☂", *map(str, range(5000))]
    frequency = [float(1 + i % 7) for i in range(len(keys))]
    lookup = KeyLookup(ClusterTable.build(keys, [0] * len(keys), frequency))
    found = lookup([*reversed(keys), "a dog ", "5000", "\ud800"])
    assert lookup.frequencies[found[:-3]].tolist() == frequency[::-1]
    assert found[-3:].tolist() == [lookup.missing] * 3


# -- repositories derived from VAST, and others ------------------------------------------------------------------------


def test_a_checkout_that_calls_its_utils_vast_utils(data, tmp_path):
    root = changed(tmp_path)
    (root / "utils").rename(root / "vast_utils")
    for path in root.rglob("*.py"):
        path.write_text(path.read_text().replace("from utils.", "from vast_utils."))
    _, ranks = run_stand_in(tmp_path, data, "run", *data.ours, root=root)
    assert max(check(ranks, data.frequency)) < NOISE
    assert "host: VAST" in (tmp_path / "out" / "run" / "log" / "mmts.yaml").read_text()


@pytest.fixture
def gram(tmp_path) -> Path:
    """GRAM's signatures: another class, all arguments to ``train``, the scaled loss under another name."""
    root = changed(
        tmp_path,
        utils__pipeline=(
            "val_loaders, run_cfg, start_step=0, verbose_time=False):",
            "val_loaders, args, start_step=0):\n    run_cfg = args.run_cfg",
        ),
        run=("args.run_cfg, start_step=start_step, verbose_time=False", "args, start_step=start_step"),
    )
    registry = root / "model" / "__init__.py"
    registry.write_text(registry.read_text().replace("from .vast import VAST", "from .gram import GRAM as VAST"))
    model = (root / "model" / "vast.py").read_text().replace("class VAST", "class GRAM")
    model = model.replace('"loss_itc": sum', '"loss_itc": torch.tensor(0), "loss_area": sum')
    (root / "model" / "gram.py").write_text(model)
    (root / "model" / "vast.py").unlink()
    return root


def test_gram(gram, data, tmp_path):
    _, ranks = run_stand_in(tmp_path, data, "run", *data.ours, root=gram)
    for record in ranks[0]:
        record["losses"]["loss_itc"] = record["losses"]["loss_area"]
    assert max(check(ranks, data.frequency)) < NOISE
    for flags, message in (
        (("--loss", "mmts-max-margin", "--mmts-no-shifts"), "GRAM's loss is InfoNCE over volumes"),
        ((*data.ours, "--mmts-itm-temperature", "host"), "GRAM draws its negatives from the scaled volumes"),
    ):
        assert_one_error(plain_run(tmp_path, data, *flags, root=gram), message)


def test_foreign_packages_of_these_names_are_never_touched(tmp_path):
    for name in ("utils", "vast_utils", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        for module in ("pipeline", "sched", "vast", "gram"):
            (tmp_path / name / f"{module}.py").write_text(
                "def train(): pass\ndef get_lr_sched(): pass\nclass VAST: pass\n"
            )
        (tmp_path / name / "args.py").write_text("import mmts_plugins\nmmts_plugins.install()\ndef get_args(): pass\n")
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "import utils.args, vast_utils.args, utils.pipeline, utils.sched, model.vast, model.gram, mmts_plugins\n"
        "for f in (utils.args.get_args, utils.pipeline.train, utils.sched.get_lr_sched, vast_utils.args.get_args):\n"
        "    assert not hasattr(f, '_mmts_seam')\n"
        "mmts_plugins.uninstall()\n"
        "print('untouched', sys.argv[1:])\n"
    )
    for more in ({}, {"MMTS": "1"}):
        done = run_python(tmp_path / "run.py", "--loss", "mmts", "--help", PYTHONPATH=str(REPOSITORY), **more)
        assert done.stdout.splitlines()[-1] == "untouched ['--loss', 'mmts', '--help']", done.stdout
    done = run_python(*("-m", "mmts_plugins", "run", tmp_path / "run.py", "--loss", "mmts"), PYTHONPATH=str(REPOSITORY))
    assert "so --loss mmts would do nothing" in done.stdout


def test_switched_off_and_asked_for(data, tmp_path):
    from mmts_plugins import _startup

    for value, asks in (("mmts", True), ("mts", True), ("itc", False)):
        assert _startup.asks_for_us([str(STAND_IN / "run.py"), "--loss", value]) == asks
    assert not _startup.asks_for_us([str(tmp_path / "run.py"), "--loss", "mts"])
    code = (
        f"import sys; sys.path.insert(0, {str(STAND_IN)!r}); sys.argv = sys.orig_argv = ['run.py', '--loss', 'mmts']\n"
        "from mmts_plugins import _startup; _startup._started = False; _startup.start(); import utils.args"
    )
    done = run_python("-c", code, MMTS="0", PYTHONPATH=str(REPOSITORY))
    assert done.returncode != 0
    assert "MMTS=0 switches mmts-plugins off, but the command line asks for it" in done.stdout.splitlines()[-1]


def test_help_lists_our_flags(data, tmp_path):
    done = plain_run(tmp_path, data, "--help")
    assert done.returncode == 0
    assert "--mmts-itm-temperature {mmts,host}" in done.stdout
    assert "--checkpointing" in done.stdout


def test_doctor(tmp_path):
    code = (
        "from mmts_plugins import cli; from mmts_plugins.hosts import registry; from mmts_plugins.patches import vast; "
        "registry._hosts = list(vast.HOSTS); raise SystemExit(cli.main(['doctor']))"
    )
    done = run_forked("-c", code, PYTHONPATH=str(STAND_IN))
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("host VAST (DelusionalLogic/VAST checkout"))
    found = [line.split()[0] for line in lines[start + 1 : start + 7]]
    assert found == ["ok"] * 6, done.stdout
    root = changed(tmp_path, model__text_encoders__bert__bert=("WORDS = 64", "from json import find_pruneable_heads"))
    done = run_forked("-c", code, PYTHONPATH=str(root))
    assert done.returncode == 1
    assert "PROBLEM  model.text_encoders.bert.bert cannot be imported" in done.stdout
    assert "absent   put a checkout of https://github.com/ispamm/GRAM on PYTHONPATH" in done.stdout


# -- the examples ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files whose presence the examples check."""
    root = tmp_path / "VAST"
    for name in ("pretrained_weights", "datasets/srcdata/ssv2/videos", "output/vast/pretrain_vast/log", "config"):
        (root / name).mkdir(parents=True)
    (root / "run.py").touch()
    (root / "output" / "vast" / "pretrain_vast" / "log" / "hps.json").write_text("{}")
    return root


def ssv2_annotations(checkout: Path) -> None:
    labels = [
        {"id": str(i), "label": f"pushing a cup {i}", "template": f"Pushing [something] {i % 3}"} for i in range(9)
    ]
    (checkout / "labels.json").write_text(json.dumps(labels))
    (checkout / "split.csv").write_text("".join(f"{i},x\n" for i in (*range(8), 7)))
    for split in ("train", "test"):
        done = run_python(
            *(REPOSITORY / "examples" / "vast_ssv2_lt" / "annotations.py", "--labels", checkout / "labels.json"),
            *("--split", checkout / "split.csv", "-o", checkout / f"datasets/annotations/ssv2_lt/{split}.json"),
        )
        assert done.returncode == 0, done.stdout
        assert "9 clips of 3 classes" in done.stdout


def test_example_dry_run(checkout):
    ssv2_annotations(checkout)
    script = REPOSITORY / "examples" / "vast_ssv2_lt" / "run.py"
    flags = ("--vast-root", checkout, "--output", checkout / "out", "--vast", "--train_batch_size 2", "--dry-run")
    done = run_python(script, *flags)
    assert done.returncode == 0, done.stdout
    assert "40 optimizer steps" in done.stdout  # 9 // 2 batches, 10 epochs
    assert done.stdout.count("torch.distributed.launch") == 8
    assert not (checkout / "out").exists()


def test_recalls_of_vasts_log():
    spec = importlib.util.spec_from_file_location("vast_runs", REPOSITORY / "examples" / "vast_runs.py")
    runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runs)
    log = (
        "11/22 - INFO - ==== evaluation--ret%tv--set_ret_itc_tv========\n\n"
        "11/22 - INFO - {'video_r1': 1.5, 'video_recall': '1.5/6/10', 'txt_r1': 2.5, 'txt_recall': '2.5/7/11'}\n"
        "11/22 - INFO - ==== evaluation--ret%tv--set_ret_itm_tv========\n\n"
        "11/22 - INFO - {'video_r1': 3.5, 'video_recall': '3.5/8/12'}\n"
    )
    assert runs.recalls(log).splitlines() == [
        "text to video, without refinement: R@1/5/10 1.5/6/10",
        "video to text, without refinement: R@1/5/10 2.5/7/11",
        "text to video, with refinement: R@1/5/10 3.5/8/12",
    ]


def test_examples_name_the_path_that_is_missing(checkout):
    script = REPOSITORY / "examples" / "vast_ssv2_lt" / "run.py"
    done = run_python(script, "--vast-root", checkout, "--dry-run")
    assert done.returncode == 1
    assert done.stdout.startswith("error: ")
    assert "annotations/ssv2_lt/train.json: no such file or folder ('txt' of ssv2_lt_ret, train)" in done.stdout


# -- the real VAST -----------------------------------------------------------------------------------------------------

HARNESS = Path(os.environ.get("MMTS_HOSTS", REPOSITORY.parent / "shared" / "hosts")) / "vast" / "run.sh"
needs_vast = pytest.mark.skipif(
    not os.environ.get("VAST_ROOT") or not HARNESS.exists() or importlib.util.find_spec("decord") is None,
    reason="set VAST_ROOT to a checkout of VAST, MMTS_HOSTS to the CPU harness, and install VAST's packages",
)


class Real:
    """The harness's synthetic data in YouCook2's form, made once, and its cluster table."""

    def __init__(self, folder: Path, captions: str = "str") -> None:
        self.root = Path(os.environ["VAST_ROOT"]).resolve()
        self.work, self.table = folder / "run", folder / "clusters.parquet"
        made = [sys.executable, str(HARNESS.parent / "make_tiny.py"), str(self.root), str(self.work)]
        subprocess.run([*made, "--multi-caption", captions], env=self.environment(), check=True)
        self.txt = self.work / "datasets" / "annotations" / "youcook" / "descs_cap_train.json"
        found = [a["desc"] if isinstance(a["desc"], str) else a["desc"][0] for a in json.loads(self.txt.read_text())]
        count = Counter(found)
        cluster = {caption: number % 4 for number, caption in enumerate(count)}
        sizes = Counter(cluster[caption] for caption in found)
        self.frequency = {caption: sizes[cluster[caption]] for caption in count}
        values = (list(cluster.values()), list(self.frequency.values()), list(count.values()))
        ClusterTable.build(list(count), *values).save(self.table)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "VAST_CPU_SHIM": "1", "PYTHONPATH": str(HARNESS.parent / "site"), "MMTS": "0"}

    @property
    def ours(self) -> tuple[object, ...]:
        return "--loss", "mmts", "--mmts-clusters", self.table


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> Real:
    return Real(tmp_path_factory.mktemp("vast"))


def run_real(folder: Path, real: Real, name: str, *flags: object, ranks: int = 1, code: int = 0, **more):
    install, recorded = more.pop("install", True), more.pop("recorded", True)
    done = subprocess.run(
        ["bash", str(HARNESS), str(folder / name), *map(str, flags)],
        env={
            **os.environ,
            **environment(
                folder / name, real.root, install, PY=sys.executable, NPROC=str(ranks), PORT=str(free_port())
            ),
            "WORK": str(real.work),
            "EXTRA_PP": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "VAST_ROOT": str(overlay(folder, real.root) if recorded else real.root),
            **more,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert (done.returncode == 0) == (code == 0), done.stdout[-3000:]
    return done.stdout, read(folder / name, ranks) if recorded else []


def output_folder(real: Real, folder: Path, name: str) -> Path:
    return real.work / "out" / str(folder / name).lstrip("/")


def host_files(real: Real, folder: Path, name: str):
    """``hps.json`` and the checkpoint of a run, less the name of its folder."""
    made = output_folder(real, folder, name)
    return (made / "log" / "hps.json").read_text().replace(str(folder / name), ""), checkpoints(made)


@needs_vast
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, []),
        (1, ["--train_task", "ret%tvas%tv%ta"]),
        (2, ["--checkpointing", "true"]),
        (2, ["--mmts-itm-temperature", "host", "--train_task", "ret%tva"]),
    ],
)
def test_real_loop_equals_the_reference(ranks, flags, real, tmp_path):
    output, recorded = run_real(tmp_path, real, "run", *real.ours, *flags, ranks=ranks)
    worst = check(recorded, real.frequency, 12, host_negatives="host" in flags)
    print(f"greatest differences: loss {worst[0]:.1e}, weights of negatives {worst[1]:.1e}")
    assert max(worst) < 1e-6
    assert output.count("MM-TS: mmts-infonce") == output.count("MM-TS step 0/12") == 1


@needs_vast
@pytest.mark.parametrize("ranks", [1, 2])
def test_real_loop_with_max_margin(ranks, real, tmp_path):
    flags = ("--loss", "mmts-max-margin", "--mmts-clusters", real.table, "--train_task", "ret%tvas%tvs")
    _, recorded = run_real(tmp_path, real, "run", *flags, ranks=ranks)
    worst = check(recorded, real.frequency, 12, MAX_MARGIN, max_margin=True)
    print(f"greatest differences: loss {worst[0]:.1e}, weights of negatives {worst[1]:.1e}")
    assert max(worst) < 1e-6


@needs_vast
def test_real_loop_without_the_flag_and_hps_json(real, tmp_path):
    _, armed = run_real(tmp_path, real, "armed", "--loss_t", "x")
    _, plain = run_real(tmp_path, real, "plain", "--loss_t", "x", install=False, MMTS="0")
    _, ours = run_real(tmp_path, real, "ours", "--loss_t", "x", *real.ours)
    assert armed == plain
    assert ours != plain
    (hps_armed, state_armed), (hps_plain, state_plain), (hps_ours, state_ours) = (
        host_files(real, tmp_path, name) for name in ("armed", "plain", "ours")
    )
    assert hps_armed == hps_plain == hps_ours
    assert same(state_armed, state_plain)
    assert not same(state_ours, state_plain)


@needs_vast
def test_real_loop_resumed(real, tmp_path):
    _, whole = run_real(tmp_path, real, "whole", *real.ours)
    _, first = run_real(tmp_path, real, "cut", *real.ours, code=9, TEST_DIE_AT="7")
    output, second = run_real(tmp_path, real, "cut", *real.ours, "--resume")
    assert "choose previous model" in output
    assert [record["step"] for record in second[0]] == list(range(4, 12))
    assert [*first[0][:4], *second[0]] == whole[0]
    assert same(*(checkpoints(output_folder(real, tmp_path, name)) for name in ("whole", "cut")))


@pytest.mark.skipif(torch.__version__ < "2.1", reason="VAST gathers bfloat16, which gloo of this torch cannot")
@needs_vast
def test_real_loop_with_lists_of_one_caption_and_amp(tmp_path):
    listed = Real(tmp_path / "data", "list1")
    _, recorded = run_real(tmp_path, listed, "run", *listed.ours, VAST_CPU_AMP="bf16")
    worst, _ = check(recorded, listed.frequency, 12)
    assert recorded[0][0]["dtype"] == "torch.float32"
    assert worst < 0.03  # the host's similarities are in bfloat16
