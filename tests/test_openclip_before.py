"""OpenCLIP from 2.16 to 3.2, each the real one, from the folders that ``make test`` puts into ``.venv/hosts``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, host_folders, openclip_flags, run_python, write_model
from forked import run_forked

pytest.importorskip("open_clip", reason="needs the extra: pip install 'mmts-plugins[openclip]'")

from test_openclip_main import check_steps

DRIVER = REPOSITORY / "tests" / "recorded_openclip.py"


class OldOpenCLIP:
    """One version, and how it is started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.version = folder, folder.name.rpartition("-")[2]
        self.is_2 = self.version.startswith("2.")
        self.trainer = "training" if (folder / "training").is_dir() else "open_clip_train"

    def model(self, folder: Path) -> str:
        text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        model = write_model(folder / "model", text_cfg=text)  # the length of 2.16's tokenizer
        if not self.is_2:
            return model
        config = json.loads((folder / "model/open_clip_config.json").read_text())["model_cfg"]
        (folder / "tiny.json").write_text(json.dumps(config))
        return "tiny"

    def flags(self, data, logs: Path, **changes: object) -> list[str]:
        given = {"train_data": data.csv, "dataset_type": "csv", "loss": "mmts", "mmts_clusters": data.table, **changes}
        return openclip_flags(self.model(logs), logs, **{"device": None if self.is_2 else "cpu", **given})

    def python(
        self, *command: object, logs: Path, expect: int = 0, ranks: int = 0, fresh: bool = False, **environment: str
    ) -> str:
        path = os.pathsep.join((str(self.folder), str(REPOSITORY / "tests" / "shim")))
        environment = {"TEST_TRAINER": self.trainer, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", **environment}
        if self.is_2:
            environment["TEST_MODEL"] = str(logs / "tiny.json")
        if fresh:
            done = run_python(*command, PYTHONPATH=path, **environment)
        else:
            done = run_forked(*command, ranks=ranks, armed=True, PYTHONPATH=path, **environment)
        assert done.returncode == expect, done.stdout[-3000:]
        return done.stdout

    def recorded(self, data, logs: Path, expect: int = 0, die: str = "", **changes: object) -> dict[str, np.ndarray]:
        command = (DRIVER, logs / "record", *self.flags(data, logs, **changes))
        self.python(*command, logs=logs, expect=expect, TEST_DIE_BEFORE_EPOCH=die)
        return load(logs / "record-0.npz")


def load(path: Path) -> dict[str, np.ndarray]:
    """A record; its tokens without what is padding in every caption."""
    record = dict(np.load(path))
    return {**record, "tokens": record["tokens"][..., :12]}


FOLDERS = host_folders("open_clip_torch")
pytestmark = pytest.mark.skipif(not FOLDERS, reason="no older OpenCLIP in .venv/hosts: make hosts")


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name.rpartition("-")[2])
def old(request) -> OldOpenCLIP:
    return OldOpenCLIP(request.param)


def weights(logs: Path, epoch: int = 2, name: str = "run") -> dict[str, torch.Tensor]:
    checkpoint = torch.load(logs / name / f"checkpoints/epoch_{epoch}.pt", weights_only=False)
    assert len(checkpoint["state_dict"]) > 20
    return checkpoint["state_dict"]


def test_every_step_equals_the_reference_also_resumed(old, data, tmp_path):
    record = old.recorded(data, tmp_path / "whole", accum_freq=2, batch_size=4)
    check_steps([record], data, total=12, accum=2)
    options = {"accum_freq": 2, "batch_size": 4}
    first = old.recorded(data, tmp_path / "cut", expect=9, die="1", **options)
    assert len(first["loss"]) == 12
    checkpoint = tmp_path / "cut/run/checkpoints/epoch_1.pt"
    second = old.recorded(data, tmp_path / "cut", resume=checkpoint, name="again", **options)
    assert [*first["loss"], *second["loss"]] == record["loss"].tolist()
    assert second["step"].tolist() == [step for step in range(6, 12) for _ in range(2)]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut", name="again")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert f"host_version: {old.version}" in (tmp_path / "cut/again/mmts.yaml").read_text()


def test_two_ranks_in_bfloat16_equal_the_reference(old, data, tmp_path):
    options = {"batch_size": 6, "precision": "amp_bf16", "local_loss": True, "gather_with_grad": True,
               "dist_backend": "gloo"}  # fmt: skip
    out = old.python(DRIVER, tmp_path / "run", *old.flags(data, tmp_path, **options), logs=tmp_path, ranks=2)
    ranks = [load(tmp_path / f"run-{rank}.npz") for rank in range(2)]
    assert [len(rank["loss"]) for rank in ranks] == [8, 8]
    # Each rank's own rows: their mean is the loss of all.
    ranks = [{**rank, "loss": (ranks[0]["loss"] + ranks[1]["loss"]) / 2} for rank in ranks]
    check_steps(ranks, data, total=8)
    assert out.count("MM-TS step ") == 8


def test_armed_and_not_asked_for_changes_nothing(old, data, tmp_path):
    start = (
        "import sys, os, importlib\n"
        "model = os.environ.get('TEST_MODEL')\n"
        "if model: importlib.import_module('open_clip').add_model_config(model)\n"
        "importlib.import_module(os.environ['TEST_TRAINER'] + '.main').main(sys.argv[1:])\n"
        "print('PATCHED', hasattr(importlib.import_module('open_clip.factory').create_loss, '_mmts_seam'))"
    )
    found = []
    for armed in "01":
        logs = tmp_path / armed
        arguments = old.flags(data, logs, loss=None, mmts_clusters=None, epochs=1)
        out = old.python("-c", start, *arguments, logs=logs, MMTS=armed)
        assert f"PATCHED {armed == '1'}" in out
        found.append(weights(logs, epoch=1))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_launcher_and_the_doctor_know_it(old, data, tmp_path):
    alone = "import sys; sys.modules['open_clip_train'] = None; " if old.trainer == "training" else "import sys; "
    doctor = "from mmts_plugins.cli import main; sys.exit(main(['doctor']))"
    out = old.python("-c", alone + doctor, logs=tmp_path)
    name = "OpenCLIP (training)" if old.trainer == "training" else "OpenCLIP"
    block = out.split(f"host {name} (open_clip_torch {old.version};")[1].split("\nhost ")[0]
    assert block.count("  ok ") >= 3
    assert "PROBLEM" not in block
    wrong = old.flags(data, tmp_path, loss="mmts", mmts_clusters=tmp_path / "nowhere.parquet")
    launcher = ("-m", "mmts_plugins", "run", "-m", f"{old.trainer}.main")
    out = old.python(*launcher, *wrong, logs=tmp_path, expect=2, fresh=True)
    assert out.strip().splitlines()[-1].startswith("mmts: error:")
    assert "nowhere.parquet" in out


OTHER_LOOP = """
import inspect
def train_one_epoch(model, data, epoch, optimizer, scaler, scheduler, args, tb_writer=None):
    print("trained plain")
"""


def test_a_fork_with_another_loop_is_refused(tmp_path):
    """Where its trainer is called training at import, as EVA-CLIP's; else before its first epoch."""
    package = tmp_path / "training"
    package.mkdir()
    for name in ("__init__", "params", "data", "zero_shot", "scheduler"):
        (package / f"{name}.py").write_text("def parse_args(args): pass\ndef get_data(args, epoch, tokenizer): pass\n")
    (package / "train.py").write_text(OTHER_LOOP)
    done = run_python("-c", "import training.train", "--loss", "mmts", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    message = "train_one_epoch has changed: no parameter 'loss' in (model, data, epoch, optimizer"
    assert f"OpenCLIP (training) checkout: training.train.{message}" in done.stdout
    code = f"""
{OTHER_LOOP}
from mmts_plugins.patches import openclip
openclip._resolved = openclip._run = object()
openclip._former = True
try: openclip._train_one_epoch(train_one_epoch, 0, {{}}, 0, 0, 0, 0, 0)
except openclip.SeamError as error: print(error)
"""
    out = run_python("-c", code, PYTHONPATH=str(tmp_path)).stdout
    assert f"open_clip_torch checkout: __main__.{message}" in out, out
    assert "trained plain" not in out


def test_the_product_sphere_needs_a_newer_trainer(old, data, tmp_path):
    flag = {"mmts_product_sphere": "4,4"}
    if old.version.startswith("3.2"):
        old.recorded(data, tmp_path, epochs=1, **flag)
        assert weights(tmp_path, epoch=1)["mmts_product_sphere"].tolist() == [4, 4, 0]
        return
    arguments = old.flags(data, tmp_path, loss=None, mmts_clusters=None, **flag)
    out = old.python(DRIVER, tmp_path / "x", *arguments, logs=tmp_path, expect=1)
    assert f"--mmts-product-sphere: needs OpenCLIP 3.2 or newer, and this is {old.version}" in out
