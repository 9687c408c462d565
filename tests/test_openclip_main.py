"""OpenCLIP's main branch (4.x), run from the checkout ``$OPEN_CLIP_ROOT``: every step's loss against one apart."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
import torch
from conftest import REPOSITORY, openclip_flags, run_python, write_model
from test_openclip_ranks import on_spheres

open_clip = pytest.importorskip("open_clip", reason="needs the extra: pip install 'mmts-plugins[openclip]'")

ROOT = Path(os.environ.get("OPEN_CLIP_ROOT", "nowhere"))
FACTORY = ROOT / "src" / "open_clip" / "factory.py"
pytestmark = pytest.mark.skipif(
    not FACTORY.exists() or "def create_task" not in FACTORY.read_text(),
    reason="OPEN_CLIP_ROOT does not name a checkout of OpenCLIP 4.x (one with create_task)",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")
DRIVER = REPOSITORY / "tests" / "recorded_openclip.py"


def flags(model, data, logs, **changes) -> list[str]:
    given = {"train_data": data.csv, "dataset_type": "csv", "loss": "mmts", "mmts_clusters": data.table, **changes}
    return openclip_flags(model, logs, **given)


def train(*command: object, expect: int = 0, timeout: float = 150, **environment: str) -> str:
    path = os.pathsep.join((str(ROOT / "src"), str(REPOSITORY / "tests" / "shim")))
    done = run_python(*command, timeout=timeout, PYTHONPATH=path, **environment)
    assert done.returncode == expect, done.stdout[-3000:]
    return done.stdout


def recorded(target: Path, arguments: list[str], expect: int = 0, **environment: str) -> dict[str, np.ndarray]:
    train(DRIVER, target, *arguments, expect=expect, **environment)
    return dict(np.load(f"{target}-0.npz"))


def check_steps(ranks: list[dict[str, np.ndarray]], data, total: int, accum: int = 1, weight: float = 1.0) -> None:
    """The loss of all ranks' rows, from features and token ids as recorded."""
    frequency = pq.read_table(data.table)["frequency"].to_pylist()
    known = {tuple(open_clip.tokenize([text], 12)[0].tolist()): count for text, count in data.frequency.items()}
    steps = ranks[0]["step"].tolist()
    assert steps == [step for step in range(total) for _ in range(accum)]
    for call, step in enumerate(steps):
        group = call // accum
        tokens = np.concatenate([row for rank in ranks for row in rank["tokens"][group * accum : (group + 1) * accum]])
        of_rows = [known[tuple(row)] for row in tokens.tolist()]
        tau = torch.from_numpy(reference.temperature(of_rows, frequency, 0.04, 0.05, 0.10, step, total / 5))
        images, texts = (torch.from_numpy(np.concatenate([r[name][call] for r in ranks])) for name in ("image", "text"))
        expected = weight * float(reference.info_nce(images, texts, tau))
        assert [rank["loss"][call] for rank in ranks] == pytest.approx([expected] * len(ranks), abs=1e-6)


OPTIONS = {
    "plain": {},
    "accumulated": {"accum_freq": 2},
    "skip-scheduler": {"accum_freq": 2, "skip_scheduler": True},
    "bfloat16": {"precision": "amp_bf16"},
    "naflex": {"use_naflex": True},  # nested batches; fills them up to 16 samples
}


@pytest.mark.parametrize(("name", "options"), OPTIONS.items(), ids=OPTIONS)
def test_every_step_equals_the_reference(name, options, small_model, data, tmp_path):
    accum = options.get("accum_freq", 1)
    total = 6 if accum == 2 or name == "naflex" else 12
    record = recorded(tmp_path / "run", flags(small_model, data, tmp_path, **options))
    check_steps([record], data, total, accum)
    if accum > 1:
        whole = {**options, "accum_freq": 1, "batch_size": 16}
        full = recorded(tmp_path / "full", flags(small_model, data, tmp_path / "b", **whole))
        np.testing.assert_allclose(record["loss"], np.repeat(full["loss"], accum), atol=1e-5)


RANKS = {"ddp": (1, {}), "accumulated": (2, {"gather_with_grad": True}), "fsdp": (1, {"fsdp": True})}


@pytest.mark.parametrize(("accum", "options"), RANKS.values(), ids=RANKS)
def test_two_ranks_equal_the_reference(accum, options, small_model, data, tmp_path):
    arguments = flags(small_model, data, tmp_path / "logs", batch_size=6, accum_freq=accum, **options)
    out = train(*TORCHRUN, DRIVER, tmp_path / "run", *arguments)
    check_steps([dict(np.load(tmp_path / f"run-{rank}.npz")) for rank in range(2)], data, 8 // accum, accum)
    assert out.count("MM-TS step ") == 8 // accum


@pytest.mark.parametrize("options", [{}, {"fsdp": True}], ids=["ddp", "fsdp"])
def test_class_tokens_on_two_ranks(options, small_model, data, tmp_path):
    """With MM-TS equal to the reference; without, clamped where the flag says; resumed without a flag."""
    ours = {"mmts_product_sphere": "4,4", "mmts_class_tokens": True, "batch_size": 6, **options}
    train(*TORCHRUN, DRIVER, tmp_path / "run", *flags(small_model, data, tmp_path / "logs", **ours))
    ranks = [dict(np.load(tmp_path / f"run-{rank}.npz")) for rank in range(2)]
    check_steps(ranks, data, total=8)
    on_spheres(ranks, 4)
    plain = {**ours, "loss": None, "mmts_clusters": None}
    scaled = {"mmts_logit_scale": 2, "mmts_max_logit_scale": 2, "lr": 0.3}
    out = train(*TORCHRUN, DRIVER, tmp_path / "b", *flags(small_model, data, tmp_path / "b", **plain, **scaled))
    assert out.count("MM-TS: features on Multi(4, 4)") == 1
    scales = [float(scale) for scale in re.findall(r"Train Epoch.* Logit Scale: ([\d.]+)", out)]
    assert len(scales) == 8
    assert max(scales) <= 8.0001
    checkpoint = tmp_path / "b" / "run" / "checkpoints" / "epoch_2.pt"
    assert torch.load(checkpoint, weights_only=True)["state_dict"]["mmts_product_sphere"].tolist() == [4, 4, 0]
    again = {"batch_size": 6, **options, "loss": None, "mmts_clusters": None, "epochs": 3, "resume": checkpoint}
    out = train(*TORCHRUN, DRIVER, tmp_path / "c", *flags(small_model, data, tmp_path / "c", **again))
    assert out.count("MM-TS: features on Multi(4, 4), as the checkpoint says") == 1


def test_product_sphere_on_this_openclip():
    """The tests of models, checkpoints and the trainer, with this OpenCLIP in the place of the installed one."""
    suite = REPOSITORY / "tests" / "test_product_sphere.py"
    out = train("-m", "pytest", "-q", "-p", "no:cacheprovider", suite, timeout=600)
    assert int(re.search(r"(\d+) passed", out)[1]) >= 80


def test_coca_keeps_its_caption_loss(data, tmp_path):
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "output_tokens": True}
    model = write_model(
        tmp_path / "coca",
        multimodal_cfg={**text, "mlp_ratio": 2},
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        vision_cfg={**vision, "attentional_pool": True, "attn_pooler_heads": 2},
        custom_text=True,
    )
    record = recorded(tmp_path / "run", flags(model, data, tmp_path, epochs=1, coca_contrastive_loss_weight=0.5))
    check_steps([record], data, total=6, weight=0.5)
    log = (tmp_path / "run" / "out.log").read_text()
    assert min(float(value) for value in re.findall(r"Caption_loss: ([\d.]+)", log)) > 1


@pytest.mark.parametrize("strategy", ["model", "task", "step"])
def test_compiled_equals_eager_and_compiles_once(strategy, small_model, data, tmp_path):
    eager = recorded(tmp_path / "eager", flags(small_model, data, tmp_path))
    arguments = flags(small_model, data, tmp_path / "logs", torchcompile=True, torchcompile_strategy=strategy)
    out = train("-m", "open_clip_train.main", *arguments, TORCH_LOGS="recompiles")
    logged = [float(value) for value in re.findall(r"Train Epoch.* Contrastive_loss: ([\d.]+)", out)]
    assert logged == pytest.approx(eager["loss"].tolist(), abs=1e-4)
    assert "Recompiling function" not in out


@pytest.mark.parametrize("strategy", ["model", "task", "step"])
def test_compiled_on_two_ranks_equals_eager(strategy, small_model, data, tmp_path):
    """In one graph: the loss on several ranks is one operator, its collectives included."""
    given = {"batch_size": 6, "gather_with_grad": True, "local_loss": True, "mmts_diagnostics_every": 4}
    compiled = {"torchcompile": True, "torchcompile_strategy": strategy}
    script = tmp_path / "train.py"  # leaves at once: gloo's threads now and then abort an interpreter that shuts down
    script.write_text(
        "import os, sys\nfrom open_clip_train.main import main\nmain(sys.argv[1:])\n"
        "sys.stdout.flush()\nsys.stderr.flush()\nos._exit(0)\n"
    )
    losses, reports = [], []
    for name, options in (("eager", {}), ("compiled", compiled)):
        arguments = flags(small_model, data, tmp_path / name, **given, **options)
        out = train(*TORCHRUN, script, *arguments, TORCH_LOGS="recompiles,graph_breaks")
        losses.append([float(value) for value in re.findall(r"Train Epoch.* Contrastive_loss: ([\d.]+)", out)])
        lines = (tmp_path / name / "run" / "mmts.jsonl").read_text().splitlines()
        reports.append([line for line in map(json.loads, lines) if "uniformity" in line])
    assert [len(each) for each in losses] == [8, 8]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert [line["step"] for line in reports[0]] == [line["step"] for line in reports[1]] == [0, 4]
    for eager, compiled in zip(*reports):
        assert compiled == pytest.approx(eager, abs=1e-4)
    assert "Recompiling function" not in out
    breaks = re.findall(r"Graph break in user code at (\S+)", out)
    assert not [place for place in breaks if "/mmts_plugins/" in place or "/adapters/" in place]


def test_resumed_run_logs_where_the_host_does(small_model, data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    often = {"log_every_n_steps": 4, "log_metric_every_n_steps": 2}
    arguments = flags(small_model, data, tmp_path, report_to="tensorboard", **often)
    first = recorded(tmp_path / "first", arguments, expect=9, TEST_DIE_BEFORE_EPOCH="1")
    second = recorded(tmp_path / "second", [*arguments, "--resume", "latest"])
    check_steps([{name: np.concatenate([first[name], second[name]]) for name in first}], data, total=12)
    log = (tmp_path / "run" / "out.log").read_text()
    assert re.findall(r"MM-TS step (\d+)/12", log) == ["0", "4", "5", "6", "10", "11"]
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("train/mmts/tau_base")]
    assert steps == [event.step for event in events.Scalars("train/logit_scale")] == [0, 2, 4, 5, 6, 8, 10, 11]
    # OpenCLIP's own line and scalar show the scale of an average sample.
    frequency = [data.frequency[line.split("\t")[1]] for line in data.csv.read_text().splitlines()[1:]]
    scale = 1 / reference.temperature(frequency, frequency, 0.04, 0.05, 0.10, 0, 1).mean()
    assert events.Scalars("train/logit_scale")[0].value == pytest.approx(scale, rel=1e-5)
    assert f"Logit Scale: {scale:.3f} " in log
    assert "host_version: 4." in (tmp_path / "run/mmts.yaml").read_text()


def test_trackio_gets_our_values(small_model, data, tmp_path):
    pytest.importorskip("trackio", reason="install trackio")
    arguments = flags(small_model, data, tmp_path, report_to="trackio", log_every_n_steps=3, mmts_diagnostics_every=6)
    train("-m", "open_clip_train.main", *arguments, TRACKIO_DIR=str(tmp_path / "trackio"))
    (store,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(store)) as database:
        rows = [(step, json.loads(row)) for step, row in database.execute("SELECT step, metrics FROM metrics")]
    assert {step for step, row in rows if "train/mmts/tau_mean" in row} == {0, 3, 5, 6, 9, 11}
    assert {step for step, row in rows if "train/mmts/uniformity" in row} == {0, 6}


REFUSED = {
    "siglip": (["--siglip"], "--siglip has no temperature per row"),
    "distill": (["--distill-model", "RN50", "--distill-pretrained", "openai"], "--distill-model is not supported"),
    "genlip": (["--model", "naflexgenlip_test"], "--model 'naflexgenlip_test' is generative"),
    "genlap": (["--model", "naflexgenlap_test_1d"], "--model 'naflexgenlap_test_1d' is generative"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(changes, message, small_model, data, tmp_path):
    out = train("-m", "open_clip_train.main", *flags(small_model, data, tmp_path), *changes, expect=1)
    assert out.splitlines()[-1].startswith(f"mmts: error: {message}")
    assert not list(tmp_path.iterdir())
