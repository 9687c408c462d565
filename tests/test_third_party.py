"""Somebody else's host and somebody else's loss, installed as packages: neither touches this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import yaml
from conftest import REPOSITORY
from forked import run_forked
from ranks import on_ranks

from mmts_plugins.tables import ClusterTable

THIRD_PARTY = REPOSITORY / "examples" / "third_party"
CAPTIONS = [f"{verb} the {noun}" for verb in ("cut", "fry", "mix") for noun in ("egg", "rice", "rice", "oil", "beans")]
FREQUENCY = {caption: 3.0 + 3.0 * ("rice" in caption) for caption in CAPTIONS}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Both packages in a folder of their own, as pip installs them."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    packages = [str(THIRD_PARTY / name) for name in ("tiny_host", "decoupled_loss")]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(target), *packages], check=True)
    return target


@pytest.fixture
def captions(tmp_path) -> Path:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS * 2) + "\n")
    distinct = list(FREQUENCY)
    ClusterTable.build(distinct, range(len(distinct)), list(FREQUENCY.values())).save(tmp_path / "clusters.parquet")
    return tmp_path / "captions.txt"


def train(installed: Path, captions: Path, *flags: object, name: str = "run", launcher: tuple = ("-m", "tiny_trainer")):
    output = captions.parent / name
    given = ("--captions", captions, "--output", output, *flags)
    done = run_forked(*launcher, *given, PYTHONPATH=os.pathsep.join((str(installed), str(REPOSITORY))))
    losses = output / "losses.json"
    return done, json.loads(losses.read_text()) if losses.exists() else None


def with_changed(tmp_path: Path, installed: Path, module: Path, code: str) -> str:
    """A path on which a module of a package goes before the one that is installed."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / module.name).write_text(code)
    return os.pathsep.join((str(broken), str(installed), str(REPOSITORY)))


def ours(captions: Path, *flags: object) -> tuple:
    return ("--loss", "mmts", "--mmts-clusters", captions.parent / "clusters.parquet", *flags)


LAUNCHER = ("-m", "mmts_plugins", "run", "-m", "tiny_trainer")


def test_a_host_of_somebody_else(installed, captions):
    _, plain = train(installed, captions, name="plain")
    done, scheduled = train(installed, captions, *ours(captions), launcher=LAUNCHER)
    assert done.returncode == 0, done.stdout
    assert "MM-TS: mmts-infonce: alpha 0.04 over 6 steps" in done.stdout
    assert "MM-TS step 5/6: " in done.stdout
    assert len(scheduled) == len(plain) == 6
    assert scheduled != plain
    record = yaml.safe_load((captions.parent / "run" / "mmts.yaml").read_text())
    assert (record["host"], record["total_steps"], record["preset"]) == ("tiny_trainer", 6, "tiny")
    armed, unasked = train(installed, captions, name="armed", launcher=LAUNCHER)
    assert armed.returncode == 0, armed.stdout
    assert unasked == plain, "armed, but not asked for"


def test_its_first_loss_is_the_papers(installed, captions, tmp_path):
    code = (
        "import sys, torch, mmts_plugins; mmts_plugins.install(); import tiny_trainer, tiny_mmts\n"
        "from mmts_plugins.hosts import Session\n"
        "kept, loss = [], Session.loss\n"
        "def keep(*args, **flags):\n"
        "    kept.append([t.detach().double() for t in args[1:]]); return loss(*args, **flags)\n"
        "Session.loss = keep\n"
        f"tiny_trainer.main(sys.argv[1:]); torch.save(kept, {str(tmp_path / 'kept.pt')!r})\n"
    )
    given = ("--captions", captions, "--output", tmp_path / "run", *ours(captions))
    done = run_forked("-c", code, *given, PYTHONPATH=os.pathsep.join((str(installed), str(REPOSITORY))))
    assert done.returncode == 0, done.stdout
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    losses = json.loads((tmp_path / "run" / "losses.json").read_text())
    assert len(kept) == len(losses) == 6
    for step, ((images, texts, temperature), loss) in enumerate(zip(kept, losses)):
        drawn = (CAPTIONS * 2)[step % 3 * 8 :][:8]
        of_rows = [FREQUENCY[caption] for caption in drawn]
        expected = reference.temperature(of_rows, list(FREQUENCY.values()), 0.04, 0.05, 0.10, step, 6 / 5)
        np.testing.assert_allclose(temperature, expected, atol=1e-12)
        assert loss == pytest.approx(float(reference.info_nce(images, texts, torch.from_numpy(expected))), abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "mmst"], "unknown --loss 'mmst'"),
        (["--loss", "mmts", "--mmts-alhpa", "1"], "unknown flag --mmts-alhpa; did you mean --mmts-alpha?"),
        (["--loss", "mmts", "--mmts-key", "id"], "--mmts-key is for VAST, and means nothing here"),
        (["--loss", "mmts"], "--loss mmts needs the cluster table"),
    ],
)
def test_its_errors_are_those_of_every_host(flags, message, installed, captions):
    done, losses = train(installed, captions, *flags, launcher=LAUNCHER)
    assert done.returncode != 0
    assert losses is None
    assert done.stdout.splitlines()[-1].startswith(f"mmts: error: {message}")


def test_the_preview_is_the_run(installed, captions):
    path = os.pathsep.join((str(installed), str(REPOSITORY)))
    flags = ours(captions, "--mmts-no-schedule", "--mmts-missing", "mean")
    shown = run_forked("-m", "mmts_plugins", "schedule", "--host", "tiny", "--total-steps", 6, *flags, PYTHONPATH=path)
    assert shown.returncode == 0, shown.stdout
    train(installed, captions, *flags, launcher=LAUNCHER)
    record = yaml.safe_load((captions.parent / "run" / "mmts.yaml").read_text())
    lines = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines() if line.split()}
    for name in ("loss", "alpha", "shift_min", "shift_max", "preset", "missing"):
        assert lines[name] == [str(record[name])], name
    assert lines["no_schedule"] == ["yes"]
    assert record["table_hash"] in shown.stdout


_FLAGS = "    flags, rest = split_flags"
BYPASSED = {
    "a seam that leaves the flags": (
        _FLAGS,
        f'    return original(["--captions", "c"])\n{_FLAGS}',
        "left --loss and --mmts-* on the command line",
    ),
    "a step without our loss": (
        "    if session is None:\n        return original(images",
        "    if True:\n        return original(images",
        "step 0 went by without the MM-TS loss",
    ),
    "no clock": ("        session.at_step(step)", "        pass", "without its number: no clock"),
}


@pytest.mark.parametrize(("old", "new", "message"), BYPASSED.values(), ids=BYPASSED)
def test_a_seam_that_passes_by_stops(old, new, message, installed, captions, tmp_path):
    module = THIRD_PARTY / "tiny_host" / "tiny_mmts.py"
    assert old in module.read_text()
    path = with_changed(tmp_path, installed, module, module.read_text().replace(old, new))
    given = ("--captions", captions, "--output", tmp_path / "run", *ours(captions))
    done = run_forked(*LAUNCHER, *given, PYTHONPATH=path)
    assert done.returncode != 0
    assert message in done.stdout.splitlines()[-1]


def test_a_library_whose_adapter_takes_no_flags_ends_with_an_error(installed, captions, tmp_path):
    """A trainer that users import in scripts of their own: any script may be one."""
    module = THIRD_PARTY / "tiny_host" / "tiny_mmts.py"
    idle = (
        module.read_text()
        .replace('    start_modules=("tiny_trainer",),\n', "")
        .replace(", parse, takes_flags=True", ", parse")
    )
    idle = idle.replace(
        _FLAGS, f"    return original([word for word in argv or sys.argv[1:] if 'mmts' not in word])\n{_FLAGS}"
    )
    assert idle.count("mmts' not in word") == 1
    script = tmp_path / "mine.py"
    script.write_text("import tiny_trainer\ntiny_trainer.main()\n")
    path = with_changed(tmp_path, installed, module, idle)
    given = ("--captions", captions, "--output", tmp_path / "run", "--mmts-no-shifts", "--loss=mmts")
    done = run_forked("-m", "mmts_plugins", "run", script, *given, PYTHONPATH=path)
    assert done.returncode == 2
    assert "no adapter took --loss: what it trained, it trained without MM-TS" in done.stdout.splitlines()[-1]


def test_a_loss_of_somebody_else_in_a_host_of_somebody_else(installed, captions):
    path = os.pathsep.join((str(installed), str(REPOSITORY)))
    flags = ("--loss", "mmts-decoupled", *ours(captions)[2:])
    done, losses = train(installed, captions, *flags, launcher=LAUNCHER)
    assert done.returncode == 0, done.stdout
    assert "MM-TS: mmts-decoupled: " in done.stdout
    assert len(losses) == 6
    shown = run_forked("-m", "mmts_plugins", "schedule", "--host", "tiny", "--total-steps", 6, *flags, PYTHONPATH=path)
    assert "temperature" in shown.stdout
    assert "mmts-decoupled" in shown.stdout
    doctor = run_forked("-m", "mmts_plugins", "doctor", PYTHONPATH=path)
    assert "mmts-decoupled" in doctor.stdout


def decoupled_on_a_rank(rank: int, world_size: int, folder: str) -> list:
    sys.path.insert(0, folder)
    import mmts_decoupled

    draw = torch.Generator().manual_seed(7)
    images, texts = (torch.nn.functional.normalize(torch.randn(8, 5, generator=draw), dim=1) for _ in range(2))
    tau = torch.linspace(0.05, 0.3, 8)
    rows = slice(8 // world_size * rank, 8 // world_size * (rank + 1))
    leaves = [x[rows].clone().requires_grad_() for x in (images, texts)]
    loss = mmts_decoupled.KIND.module(True, True, rank, world_size)(*leaves, tau[rows])
    loss.backward()
    return [loss.item(), *(leaf.grad.tolist() for leaf in leaves)]


def test_the_decoupled_loss_on_ranks():
    folder = str(THIRD_PARTY / "decoupled_loss")
    draw = torch.Generator().manual_seed(7)
    images, texts = (torch.nn.functional.normalize(torch.randn(8, 5, generator=draw), dim=1) for _ in range(2))
    tau = torch.linspace(0.05, 0.3, 8)
    leaves = [x.clone().double().requires_grad_() for x in (images, texts)]
    scores = leaves[0] @ leaves[1].T / tau[:, None].double()
    back = leaves[1] @ leaves[0].T / tau[:, None].double()
    explicit = []
    for logits in (scores, back):
        for i in range(8):
            others = torch.cat([logits[i, :i], logits[i, i + 1 :]])
            explicit.append(others.exp().sum().log() - logits[i, i])
    expected = torch.stack(explicit).mean()
    expected.backward()
    one = on_ranks(1, decoupled_on_a_rank, folder)
    two = on_ranks(2, decoupled_on_a_rank, folder)
    assert one[0][0] == pytest.approx(expected.item(), abs=1e-5)
    assert np.mean([rank[0] for rank in two]) == pytest.approx(expected.item(), abs=1e-5)
    for place in (1, 2):
        joined = np.concatenate([rank[place] for rank in two]) / 2
        np.testing.assert_allclose(joined, leaves[place - 1].grad, atol=1e-5)


BROKEN = {
    "another name": ('name = "mmts-decoupled"', 'name = "mmts-other"', "its name is 'mmts-other'"),
    "no kind": ("KIND = Decoupled()", "KIND = 1", "it is 1, not a LossKind"),
    "a number": ("number = TEMPERATURE", 'number = "weight"', "its number is 'weight'"),
    "cannot be imported": ("KIND = Decoupled()", "1 / 0", "ZeroDivisionError"),
}


@pytest.mark.parametrize(("old", "new", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_loss_stops_only_who_asks_for_it(old, new, message, installed, captions, tmp_path):
    module = THIRD_PARTY / "decoupled_loss" / "mmts_decoupled.py"
    assert old in module.read_text()
    path = with_changed(tmp_path, installed, module, module.read_text().replace(old, new))
    given = ("schedule", "--host", "openclip", "--total-steps", 6, "--mmts-no-shifts")
    good = run_forked("-m", "mmts_plugins", *given, PYTHONPATH=path)
    assert good.returncode == 0, good.stdout
    bad = run_forked("-m", "mmts_plugins", *given, "--loss", "mmts-decoupled", PYTHONPATH=path)
    assert bad.returncode == 2
    assert bad.stdout.startswith("mmts: error: the loss mmts-decoupled (mmts_decoupled:KIND of mmts-decoupled) cannot")
    assert message in bad.stdout
    assert message in run_forked("-m", "mmts_plugins", "doctor", PYTHONPATH=path).stdout
