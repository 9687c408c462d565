"""The real OpenCLIP trainer, run in this process: every step's loss against one computed apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import types
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
import torch
from conftest import CAPTIONS, REPOSITORY, SIGLIP, openclip_flags, run_python, write_model

pytest.importorskip("open_clip_train", reason="needs the extra: pip install 'mmts-plugins[openclip]'")

import open_clip
import yaml
from open_clip_train.main import main

from mmts_plugins import cli
from mmts_plugins.adapters.openclip import OpenCLIPSession, ScheduledLoss, _check_resumed, _pad_id, _reads, _text
from mmts_plugins.errors import ConfigError, MMTSError, SeamError, TableError
from mmts_plugins.functional import HAS_OPERATORS
from mmts_plugins.losses.infonce import KIND

ALPHA, LOW, HIGH, OSCILLATIONS = 0.04, 0.05, 0.10, 5  # clip-cc3m, the default


class Recorder:
    """What went into and came out of the loss at every call, with the step and the tokens of the batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self._tokens: list[tuple[int, torch.Tensor]] = []
        forward, temperatures = ScheduledLoss.forward, OpenCLIPSession.of_batch

        def recording_temperatures(run: OpenCLIPSession, tokens: torch.Tensor) -> torch.Tensor:
            result = temperatures(run, tokens)
            if torch.is_grad_enabled():
                self._tokens.append((run.tau.step, tokens))
                self.scale = run._scale
            return result

        def recording_forward(loss: ScheduledLoss, image_features, text_features, logit_scale, **kwargs):
            out = forward(loss, image_features, text_features, logit_scale, **kwargs)
            value = out["contrastive_loss"] if isinstance(out, dict) else out
            self.calls.append(
                {
                    "image": image_features.detach().double(),
                    "text": text_features.detach().double(),
                    "scale": float(logit_scale.detach()),
                    "temperature": kwargs["mmts_temperature"],
                    "loss": float(value.detach()),
                    "out": out,
                    "tokens": self._tokens[-1][1],
                    "step": self._tokens[-1][0],
                }
            )
            return out

        monkeypatch.setattr(OpenCLIPSession, "of_batch", recording_temperatures)
        monkeypatch.setattr(ScheduledLoss, "forward", recording_forward)

    @property
    def losses(self) -> list[float]:
        return [call["loss"] for call in self.calls]

    @property
    def steps(self) -> list[int]:
        return [call["step"] for call in self.calls]


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


def frequencies_of(tokens: torch.Tensor, tokenizer, table: Path) -> list[float]:
    rows = pq.read_table(table).to_pylist()
    by_tokens = {tuple(tokenizer([row["key"]])[0].tolist()): row["frequency"] for row in rows}
    return [by_tokens[tuple(row.tolist())] for row in tokens]


def check_steps(
    recorder: Recorder,
    model: str,
    table: Path,
    total: int,
    tolerance: float = 1e-6,
    weight: float = 1.0,
    steps: Optional[list[int]] = None,
) -> None:
    """Every loss against the reference; ``steps`` of the calls, all of the run's once where they are not given."""
    assert recorder.steps == (list(range(total)) if steps is None else steps)
    tokenizer = open_clip.get_tokenizer(model)
    everything = pq.read_table(table)["frequency"].to_pylist()
    for call in recorder.calls:
        tau = reference.temperature(
            frequencies_of(call["tokens"], tokenizer, table),
            everything,
            ALPHA,
            LOW,
            HIGH,
            call["step"],
            total / OSCILLATIONS,
        )
        np.testing.assert_allclose(call["temperature"], tau, rtol=0, atol=1e-12)
        expected = weight * reference.info_nce(call["image"], call["text"], torch.from_numpy(tau))
        assert call["loss"] == pytest.approx(float(expected), rel=tolerance)


def flags(model, data, logs, **changes) -> list[str]:
    given = {"train_data": data.csv, "dataset_type": "csv", "loss": "mmts", "mmts_clusters": data.table, **changes}
    return openclip_flags(model, logs, **given)


def test_every_step_equals_the_reference(small_model, data, tmp_path, recorder, caplog):
    with caplog.at_level("INFO"):
        main(flags(small_model, data, tmp_path, report_to="tensorboard"))
    check_steps(recorder, small_model, data.table, total=12)
    assert len(set(recorder.losses)) == 12
    text = caplog.text
    assert text.count("MM-TS step ") == 12
    assert "alpha 0.04 over 12 steps, period 2.4" in text
    # OpenCLIP's own line shows the true, calibrated scale.
    frequency = pq.read_table(data.table).to_pandas()
    shift = LOW + (frequency.frequency - frequency.frequency.min()) / np.ptp(frequency.frequency) * (HIGH - LOW)
    mean = np.average(shift, weights=frequency["count"])
    assert f"Logit Scale: {1 / (mean + ALPHA / 2):.3f}" in text
    assert recorder.calls[0]["scale"] == pytest.approx(1 / (mean + ALPHA / 2), rel=1e-6)
    saved = yaml.safe_load((tmp_path / "run/mmts.yaml").read_text())
    assert saved["loss"] == "mmts-infonce"
    assert saved["period"] == 2.4
    assert saved["host_version"] == open_clip.__version__
    checkpoint = torch.load(tmp_path / "run/checkpoints/epoch_2.pt", weights_only=True)
    last_base = ALPHA / 2 * np.cos(2 * np.pi * 11 / 2.4)
    assert checkpoint["state_dict"]["logit_scale"].item() == pytest.approx(-np.log(mean + last_base), abs=1e-5)
    assert "loss: mmts-infonce" in (tmp_path / "run/params.txt").read_text()


def test_tensorboard_gets_every_value_at_the_hosts_interval(small_model, data, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"report_to": "tensorboard", "log_every_n_steps": 4, "mmts_diagnostics_every": 5}
    main(flags(small_model, data, tmp_path, **options))
    events = event_accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    names = {name.rsplit("/", 1)[1] for name in events.Tags()["scalars"] if name.startswith("train/mmts/")}
    temperatures = {f"tau_{name}" for name in ("base", "mean", "min", "max", "head", "middle", "tail")}
    diagnostics = {
        "loss_head",
        "loss_middle",
        "loss_tail",
        "positive_similarity",
        "negative_similarity",
        "similarity_gap",
    }
    diagnostics |= {"alignment", "uniformity", "equilibrium", "modality_gap"}
    assert names == temperatures | diagnostics | {"scale_mean", "hit_rate", "phase"}
    assert [event.step for event in events.Scalars("train/mmts/uniformity")] == [0, 5, 10]
    lines = [json.loads(line) for line in (tmp_path / "run/mmts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "uniformity" in line] == [0, 5, 10]
    assert [line["step"] for line in lines if "tau_base" in line] == [0, 4, 5, 6, 10, 11]
    ours = [event.step for event in events.Scalars("train/mmts/tau_base")]
    assert ours == [event.step for event in events.Scalars("train/scale")] == [0, 4, 5, 6, 10, 11]
    base = [event.value for event in events.Scalars("train/mmts/tau_base")]
    assert base == pytest.approx([ALPHA / 2 * np.cos(2 * np.pi * step / 2.4) for step in ours], abs=1e-6)
    assert {event.value for event in events.Scalars("train/mmts/hit_rate")} == {1.0}
    for step, mean, low, high in zip(
        ours, *([e.value for e in events.Scalars(f"train/mmts/tau_{name}")] for name in ("mean", "min", "max"))
    ):
        assert low <= mean <= high, step


def test_wandb_rows_hold_ours_and_the_hosts(small_model, data, tmp_path, monkeypatch):
    wandb_run = pytest.importorskip("wandb.sdk.wandb_run")
    rows: dict[int, dict[str, float]] = {}
    log = wandb_run.Run.log

    def recording_log(run, values, step=None, commit=None):
        rows.setdefault(step, {}).update(values)
        return log(run, values, step=step, commit=commit)

    monkeypatch.setattr(wandb_run.Run, "log", recording_log)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    main(flags(small_model, data, tmp_path, report_to="wandb", log_every_n_steps=3))
    assert sorted(rows) == [0, 3, 5, 6, 9, 11]
    assert all("train/mmts/tau_mean" in row and "train/loss" in row for row in rows.values())
    assert list(tmp_path.rglob("*.wandb"))


OPTIONS = {
    "const": {"lr_scheduler": "const"},
    "const-cooldown": {"lr_scheduler": "const-cooldown", "epochs_cooldown": 1},
    "skip-scheduler": {"skip_scheduler": True},
    "grad-checkpointing": {"grad_checkpointing": True},
    "lock-image": {"lock_image": True},
    "timm-optimizer": {"opt": "timm/adamw", "eps": 1e-8},
    "workers": {"workers": 2},
    "grad-clip": {"grad_clip_norm": 1.0},
    "context-length": {"force_context_length": 10},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_host_options(options, small_model, data, tmp_path, recorder):
    main(flags(small_model, data, tmp_path, **options))
    assert recorder.steps == list(range(12))
    if "force_context_length" not in options:
        check_steps(recorder, small_model, data.table, total=12)


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16", "pure_bf16"])
def test_half_precision_features_full_precision_loss(precision, small_model, data, tmp_path, recorder):
    main(flags(small_model, data, tmp_path, precision=precision, epochs=1))
    check_steps(recorder, small_model, data.table, total=6, tolerance=2e-6)


def test_torch_compile(small_model, data, tmp_path, recorder):
    main(flags(small_model, data, tmp_path, torchcompile=True))
    check_steps(recorder, small_model, data.table, total=12)


@pytest.mark.skipif(not HAS_OPERATORS, reason="a compiled loss is watched from torch 2.4 on")
def test_a_compiled_loss_is_watched_without_a_graph_break():
    seen, found = [], []
    loss = ScheduledLoss(KIND.module, open_clip.ClipLoss(), lambda *each: seen.append([x.clone() for x in each]))
    torch._dynamo.reset()
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        for number in range(2):
            draw = torch.Generator().manual_seed(number)
            leaves = [torch.randn(6, 4, generator=draw).requires_grad_() for _ in range(2)]
            features = [torch.nn.functional.normalize(leaf, dim=1) for leaf in leaves]
            loss.temperature = torch.rand(6, generator=draw) + 0.1
            value = function(*features, logit_scale=torch.ones(()))
            value.backward()
            found.append([value.detach(), *(leaf.grad for leaf in leaves), *features, loss.temperature])
    assert len(seen) == 4
    for one, other in zip(found[:2], found[2:]):
        torch.testing.assert_close(one, other)
    for each, (*_, images, texts, temperature) in zip(seen, found):
        torch.testing.assert_close(each, [images.detach(), texts.detach(), temperature])
    with torch.no_grad():
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*features, logit_scale=torch.ones(()))
    assert len(seen) == 4, "an evaluation was watched"


@pytest.mark.parametrize("scheduler", [{}, {"skip_scheduler": True}], ids=["scheduler", "skip-scheduler"])
def test_accumulation_equals_the_full_batch(scheduler, small_model, data, tmp_path, recorder):
    main(flags(small_model, data, tmp_path, name="full", batch_size=16, **scheduler))
    full = list(recorder.calls)
    recorder.calls.clear()
    main(flags(small_model, data, tmp_path, name="accumulated", accum_freq=2, **scheduler))
    assert [call["step"] for call in full] == [0, 1, 2, 3, 4, 5]
    assert recorder.steps == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for number, call in enumerate(recorder.calls):
        assert call["loss"] == pytest.approx(full[number // 2]["loss"], abs=2e-4 if number > 1 else 1e-6)


def test_accumulation_that_does_not_divide_an_epoch(small_model, data, tmp_path, recorder):
    """OpenCLIP drops the last two of an epoch's six batches."""
    main(flags(small_model, data, tmp_path, accum_freq=4, warmup=1))
    assert recorder.steps == [0, 0, 0, 0, 1, 1, 1, 1]
    record = yaml.safe_load((tmp_path / "run/mmts.yaml").read_text())
    assert (record["total_steps"], record["period"]) == (2, 0.4)


def test_synthetic_data(small_model, data, tmp_path, recorder):
    from mmts_plugins.tables import ClusterTable

    table = tmp_path / "dummy.parquet"
    ClusterTable.build(["Dummy caption", "never seen"], [0, 1], [7, 3], [7, 3]).save(table)
    main(
        flags(
            small_model,
            data,
            tmp_path,
            dataset_type="synthetic",
            train_data=None,
            train_num_samples=64,
            mmts_clusters=table,
        )
    )
    # One image and one caption: every loss is ln 8, from logits of which float32 has neighbours 2e-6 apart.
    check_steps(recorder, small_model, table, total=16, tolerance=4e-6)


def test_webdataset(small_model, data, tmp_path, recorder):
    with tarfile.open(tmp_path / "shard-0000.tar", "w") as tar:
        for number, line in enumerate(data.csv.read_text().splitlines()[1:]):
            image, caption = line.split("\t")
            tar.add(image, f"{number:04}.png")
            text = tmp_path / "caption"
            text.write_text(caption)
            tar.add(text, f"{number:04}.txt")
    shards = str(tmp_path / "shard-0000.tar")
    main(flags(small_model, data, tmp_path, dataset_type="webdataset", train_data=shards, train_num_samples=48))
    check_steps(recorder, small_model, data.table, total=12)


MODELS: dict[str, dict[str, Any]] = {
    "resnet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
    "timm": {
        "vision_cfg": {
            "timm_model_name": "resnet10t",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "image_size": 32,
        }
    },
    "logit-bias": {"init_logit_bias": -1.0},
    "siglip": SIGLIP,
    "nonscalar-scale": {"nonscalar_logit_scale": True},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_models(changes, data, tmp_path, recorder):
    model = write_model(tmp_path / "model", **changes)
    main(flags(model, data, tmp_path, epochs=1))
    check_steps(recorder, model, data.table, total=6)


def test_hugging_face_text_tower_with_its_own_tokenizer(data, tmp_path, recorder):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    tower = tmp_path / "bert"
    words = sorted({word.lower() for caption in CAPTIONS for word in caption.replace("!", " ! ").split()})
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}  # it is 3
    pieces = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate([*special.values(), *words])})
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special)
    fast.save_pretrained(tmp_path / "model")
    config = transformers.BertConfig(
        vocab_size=4 + len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tower)
    text = {
        "hf_model_name": str(tower),
        "hf_tokenizer_name": str(tower),
        "hf_model_pretrained": False,
        "context_length": 12,
    }
    model = write_model(tmp_path / "model", text_cfg={**text, "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"})
    main(flags(model, data, tmp_path, epochs=1))
    check_steps(recorder, model, data.table, total=6)


def test_the_token_that_a_tokenizer_pads_with():
    wrapped = types.SimpleNamespace(pad_token_id=7)
    assert _pad_id(types.SimpleNamespace(pad_token_id=5, tokenizer=wrapped)) == 5  # 4.x says it itself
    assert _pad_id(types.SimpleNamespace(tokenizer=wrapped)) == 7
    assert _pad_id(types.SimpleNamespace(pad_token_id=None, tokenizer=wrapped)) == 7
    assert _pad_id(open_clip.get_tokenizer("ViT-B-32")) == 0
    assert _pad_id(types.SimpleNamespace(tokenizer=types.SimpleNamespace(pad_token_id=None))) == 0


def test_examples_of_any_tokenizer():
    clip = open_clip.get_tokenizer("ViT-B-32")
    assert _text(clip(["Two dogs, running"])[0], clip) == "two dogs , running"
    assert _text(torch.tensor([3, 4]), types.SimpleNamespace()) == "tokens [3, 4]"


def test_coca_keeps_its_caption_loss(data, tmp_path, recorder):
    multimodal = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "mlp_ratio": 2}
    text = {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "embed_cls": True,
        "output_tokens": True,
    }
    vision = {
        "image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8,
        "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True,
    }  # fmt: skip
    model = write_model(
        tmp_path / "coca", multimodal_cfg=multimodal, text_cfg=text, vision_cfg=vision, custom_text=True
    )
    main(flags(model, data, tmp_path, epochs=1, coca_contrastive_loss_weight=0.5))
    check_steps(recorder, model, data.table, total=6, weight=0.5)
    caption = [float(call["out"]["caption_loss"]) for call in recorder.calls]
    assert min(caption) > 1


def test_max_margin(small_model, data, tmp_path, recorder):
    main(flags(small_model, data, tmp_path, loss="mmts-max-margin", epochs=1))
    assert recorder.steps == list(range(6))
    tokenizer = open_clip.get_tokenizer(small_model)
    everything = pq.read_table(data.table)["frequency"].to_pylist()
    for call in recorder.calls:
        frequency = frequencies_of(call["tokens"], tokenizer, data.table)
        margin = reference.temperature(frequency, everything, 0.20, 0.17, 0.30, call["step"], 6 / 5)
        expected = reference.max_margin(call["image"], call["text"], torch.from_numpy(margin))
        assert call["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_ablations(small_model, data, tmp_path, recorder):
    main(flags(small_model, data, tmp_path, mmts_no_shifts=True, mmts_no_schedule=True, mmts_clusters=None, epochs=1))
    assert recorder.steps == list(range(6))
    for call in recorder.calls:
        tau = torch.full((8,), (LOW + HIGH) / 2, dtype=torch.float64)
        assert call["loss"] == pytest.approx(float(reference.info_nce(call["image"], call["text"], tau)), abs=1e-6)


def interrupt_before(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = OpenCLIPSession.begin_epoch

    def interrupted(run, model, loss, number, *rest):
        if number == epoch:
            raise KeyboardInterrupt
        return begin(run, model, loss, number, *rest)

    monkeypatch.setattr(OpenCLIPSession, "begin_epoch", interrupted)


def test_resume_goes_on_with_the_schedule(small_model, data, tmp_path, recorder, monkeypatch):
    arguments = flags(small_model, data, tmp_path, save_most_recent=True)
    with monkeypatch.context() as patch:
        interrupt_before(1, patch)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    main([*arguments, "--resume", "latest"])
    check_steps(recorder, small_model, data.table, total=12)


def test_resume_with_other_settings_is_refused(small_model, data, tmp_path, caplog):
    main(flags(small_model, data, tmp_path, epochs=1))
    again = {"resume": "latest", "epochs": 2}
    with pytest.raises(ConfigError, match=r"period was 1\.2 and is 2\.4.*--mmts-allow-config-change"):
        main(flags(small_model, data, tmp_path, **again))
    fixed = {**again, "mmts_period": 1.2}
    with pytest.raises(ConfigError, match=r"alpha was 0\.04 and is 0\.06"):
        main(flags(small_model, data, tmp_path, mmts_alpha=0.06, **fixed))
    main(flags(small_model, data, tmp_path, mmts_alpha=0.06, mmts_allow_config_change=True, **fixed))
    assert yaml.safe_load((tmp_path / "run/mmts.yaml").read_text())["alpha"] == 0.06


def test_resuming_a_plain_run_is_refused(small_model, data, tmp_path):
    main(flags(small_model, data, tmp_path, epochs=1, loss=None, mmts_clusters=None))
    with pytest.raises(ConfigError, match=r"mmts\.yaml does not exist: the checkpoint was not trained with MM-TS"):
        main(flags(small_model, data, tmp_path, resume="latest"))


AWS = """#!/bin/sh
echo "$@" >> "$0.log"
case "$1 $2" in
  "s3 ls") ls -l "$3" | tail -n +2 ;;
  "s3 sync") mkdir -p "$4" && cp -r "$3/." "$4" ;;
esac
"""


def test_resume_of_a_run_that_is_synced_elsewhere(small_model, data, tmp_path, recorder, monkeypatch):
    """``--resume latest --remote-sync`` takes the last name among the checkpoints for one (open_clip 319)."""
    aws = tmp_path / "bin" / "aws"
    aws.parent.mkdir()
    aws.write_text(AWS)
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", f"{aws.parent}{os.pathsep}{os.environ['PATH']}")
    # OpenCLIP's own process for it outlives an interrupted run, for ever.
    monkeypatch.setattr("open_clip_train.main.start_sync_process", lambda *_: mock.Mock())
    arguments = flags(small_model, data, tmp_path / "here", remote_sync=tmp_path / "there", epochs=3)
    with monkeypatch.context() as patch:
        interrupt_before(2, patch)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    subprocess.run([aws, "s3", "sync", tmp_path / "here" / "run", tmp_path / "there" / "run"], check=True)
    assert sorted(path.name for path in (tmp_path / "there/run/checkpoints").iterdir()) == ["epoch_1.pt", "epoch_2.pt"]
    assert (tmp_path / "there/run/mmts.yaml").is_file()
    shutil.rmtree(tmp_path / "here")  # another machine
    again = flags(small_model, data, tmp_path / "here", remote_sync=tmp_path / "there", epochs=3, resume="latest")
    with pytest.raises(
        ConfigError, match=r"there/run/mmts\.yaml: the resumed run differs: alpha was 0\.04 and is 0\.05"
    ):
        main([*again, "--mmts-alpha", "0.05"])
    main(again)
    assert "s3 ls" in (aws.parent / "aws.log").read_text()
    check_steps(recorder, small_model, data.table, total=18)


def test_a_remote_checkpoints_record_is_compared(small_model, data, tmp_path, recorder, monkeypatch):
    main(flags(small_model, data, tmp_path, name="first", epochs=1, mmts_period=1.2))
    there = f"file://{tmp_path}/first"
    again = {"epochs": 2, "mmts_period": 1.2, "resume": f"{there}/checkpoints/epoch_1.pt"}
    with pytest.raises(
        ConfigError, match=rf"{there}/mmts\.yaml: the resumed run differs: alpha was 0\.04 and is 0\.05"
    ):
        main(flags(small_model, data, tmp_path, name="second", mmts_alpha=0.05, **again))
    main(flags(small_model, data, tmp_path, name="third", **again))
    assert recorder.steps == list(range(12))
    (tmp_path / "first/mmts.yaml").unlink()
    with pytest.raises(
        ConfigError, match=rf"{there}/mmts\.yaml does not exist: the checkpoint was not trained with MM-TS"
    ):
        main(flags(small_model, data, tmp_path, name="fourth", **again))


def resumed(checkpoint: str, own: Path, **values: object) -> None:
    _check_resumed(checkpoint, own, {"alpha": 0.04, **values}, allow_change=False, table=None)


def test_where_a_checkpoints_record_is_looked_for(tmp_path, caplog, monkeypatch):
    run = tmp_path / "run"
    old, new = run / "checkpoints" / "mmts.yaml", run / "mmts.yaml"
    old.parent.mkdir(parents=True)
    old.write_text("alpha: 0.01")
    for checkpoint in (run / "checkpoints" / "epoch_1.pt", run / "checkpoints" / "epoch_1"):  # a folder under FSDP
        with pytest.raises(ConfigError, match=r"run/checkpoints/mmts\.yaml: .* alpha was 0\.01 and is 0\.04"):
            resumed(str(checkpoint), tmp_path)
    new.write_text("alpha: 0.02")
    with pytest.raises(ConfigError, match=r"run/mmts\.yaml: .* alpha was 0\.02 and is 0\.04"):
        resumed(str(run / "checkpoints" / "epoch_1.pt"), tmp_path)
    monkeypatch.chdir(old.parent)
    with pytest.raises(ConfigError, match=r"run/mmts\.yaml: .* alpha was 0\.02"):
        resumed("epoch_1.pt", tmp_path)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "mmts.yaml").write_text("alpha: 0.03")
    with pytest.raises(ConfigError, match=r"moved/mmts\.yaml: .* alpha was 0\.03"):
        resumed(str(moved / "epoch_1.pt"), tmp_path)
    # Remote and out of reach: the local folder of the same run tells, but no other run's.
    unreachable = "nosuch://bucket/{}/checkpoints/epoch_1.pt"
    with pytest.raises(ConfigError, match=r"run/mmts\.yaml: .* alpha was 0\.02"):
        resumed(unreachable.format("run"), run)
    new.unlink()
    with pytest.raises(ConfigError, match=r"run/checkpoints/mmts\.yaml: .* alpha was 0\.01"):
        resumed(unreachable.format("run"), run)
    assert not caplog.messages
    resumed(unreachable.format("other"), run)
    (warning,) = caplog.messages
    assert warning.startswith("MM-TS: nosuch://bucket/other/mmts.yaml cannot be read (")
    assert warning.endswith("whether the resumed run had the same settings is not checked")


def test_what_earlier_versions_left_among_the_checkpoints(small_model, data, tmp_path, recorder, monkeypatch):
    arguments = flags(small_model, data, tmp_path)
    with monkeypatch.context() as patch:
        interrupt_before(1, patch)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    run = tmp_path / "run"
    for name in ("mmts.yaml", "mmts.jsonl"):
        (run / name).rename(run / "checkpoints" / name)
    with pytest.raises(ConfigError, match=r"run/checkpoints/mmts\.yaml: the resumed run differs: alpha was 0\.04"):
        main([*arguments, "--resume", "latest", "--mmts-alpha", "0.05"])
    main([*arguments, "--resume", "latest"])
    check_steps(recorder, small_model, data.table, total=12)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch_1.pt", "epoch_2.pt"]
    lines = [json.loads(line) for line in (run / "mmts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "tau_base" in line] == list(range(12))


def test_a_record_that_cannot_be_written_is_one_error(small_model, data, tmp_path):
    (tmp_path / "run/mmts.yaml/inside").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run/mmts\.yaml: cannot be written: Is a directory"):
        main(flags(small_model, data, tmp_path))


def test_saved_config_reproduces_the_run(small_model, data, tmp_path, recorder):
    main(flags(small_model, data, tmp_path, name="one", mmts_preset="vast-clip", mmts_num_oscillations=2))
    first, recorder.calls = recorder.calls, []
    saved = tmp_path / "one/mmts.yaml"
    main(flags(small_model, data, tmp_path, name="two", loss=None, mmts_clusters=None, mmts_config=saved))
    assert recorder.steps == list(range(12))
    assert recorder.losses == [call["loss"] for call in first]


REFUSED = {
    "coca without contrast": (
        {"model": "coca_ViT-B-32", "coca_contrastive_loss_weight": 0},
        "--coca-contrastive-loss-weight 0 leaves no contrastive loss for --loss mmts",
    ),
    "horovod": ({"horovod": True}, "--horovod is not supported with --loss mmts"),
    "no accumulation": ({"accum_freq": 0}, "--accum-freq 0: it must be one or above"),
    "siglip": ({"siglip": True}, "--siglip"),
    "torchscript": ({"torchscript": True}, "--torchscript"),
    "distill": ({"distill_model": "RN50", "distill_pretrained": "openai"}, "--distill-model"),
    "typo": ({"mmts_alhpa": 0.1}, r"unknown flag --mmts-alhpa; did you mean --mmts-alpha\?"),
    "unknown loss": ({"loss": "mmst"}, "unknown --loss 'mmst'"),
    "no table": ({"mmts_clusters": None}, "--mmts-clusters FILE"),
    "missing table": ({"mmts_clusters": "nowhere.parquet"}, r"nowhere\.parquet: no such cluster table"),
    "preset": ({"mmts_preset": "clip-cc12m"}, "unknown --mmts-preset 'clip-cc12m'"),
    "temperature": ({"mmts_alpha": 0.1}, "must stay above zero"),
    "order": ({"mmts_shift_min": 0.3}, "is above --mmts-shift-max"),
    "both periods": ({"mmts_period": 3, "mmts_num_oscillations": 2}, "not both"),
    "not a number": ({"mmts_alpha": "high"}, "--mmts-alpha: invalid float value: 'high'"),
    "only our flags": ({"loss": None}, "not --loss"),
    "no step": ({"batch_size": 64}, "no optimizer step"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_error_before_training(changes, message, small_model, data, tmp_path):
    model = changes.get("model", small_model)
    with pytest.raises(MMTSError, match=message):
        main(flags(model, data, tmp_path, **{name: value for name, value in changes.items() if name != "model"}))
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("mmts.yaml"))


LOCK = {"lock_image": True, "lock_text": True, "lock_text_freeze_layer_norm": True}
LOCKED = {
    "whole": {},
    "compiled": {"torchcompile": True},
    "accumulated": {"accum_freq": 2},
}


@pytest.mark.parametrize("options", LOCKED.values(), ids=LOCKED)
def test_two_locked_towers_are_refused(options, small_model, data, tmp_path):
    with pytest.raises(ConfigError, match=r"would schedule nothing: --lock-image with --lock-text locks both towers"):
        main(flags(small_model, data, tmp_path, **LOCK, **options))
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("mmts.yaml"))


def test_locked_towers_with_something_unlocked_train(small_model, data, tmp_path, recorder):
    main(flags(small_model, data, tmp_path, **LOCK, lock_text_unlocked_layers=1))
    check_steps(recorder, small_model, data.table, total=12)


def test_a_contrastive_loss_without_gradient_is_refused(small_model, data, tmp_path, monkeypatch):
    """As of a CoCa whose towers are locked, and whose decoder is trained."""
    for name in ("encode_image", "encode_text"):
        encode = getattr(open_clip.CLIP, name)
        monkeypatch.setattr(open_clip.CLIP, name, lambda *given, f=encode, **more: f(*given, **more).detach())
    with pytest.raises(ConfigError, match=r"nothing that the contrastive loss depends on is trained"):
        main(flags(small_model, data, tmp_path))


def test_runs_that_train_nothing_say_so(small_model, data, tmp_path, caplog):
    main(flags(small_model, data, tmp_path, train_data=None, val_data=data.csv))
    assert "MM-TS: --loss mmts changes nothing here: without --train-data this run only evaluates" in caplog.text
    main(flags(small_model, data, tmp_path, name="again", epochs=1))
    main(flags(small_model, data, tmp_path, name="again", epochs=1, resume="latest"))
    assert caplog.messages.count("MM-TS: 1 of --epochs 1 are done: nothing is trained") == 1


def test_abbreviation_is_refused(small_model, data, tmp_path):
    with pytest.raises(ConfigError, match="write --loss"):
        main([*openclip_flags(small_model, tmp_path, train_data=data.csv), "--los", "mmts"])


def test_tables_that_do_not_fit(small_model, data, tmp_path):
    from mmts_plugins.tables import ClusterTable

    truncated = tmp_path / "truncated.parquet"
    truncated.write_bytes(data.table.read_bytes()[:-20])
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pq.read_table(data.table).rename_columns(["caption", "cluster", "frequency", "count"]), foreign)
    classes = tmp_path / "classes.parquet"
    ClusterTable.build(["3", "5"], [0, 1], [10, 20], [10, 20], kind="class").save(classes)
    others = tmp_path / "others.parquet"
    ClusterTable.build(["nothing", "of this"], [0, 1], [10, 20]).save(others)
    for table, message in (
        (truncated, "truncated.parquet: not a readable Parquet file"),
        (foreign, "foreign.parquet: not a cluster table: column 'key' is missing"),
        (classes, "classes.parquet: a table of class ids"),
        (
            others,
            r"48 of the first 48 training captions are not in .*others.parquet \(0% found\), for example 'a photo of",
        ),
    ):
        with pytest.raises(TableError, match=message):
            main(flags(small_model, data, tmp_path / table.stem, mmts_clusters=table))


def partial_table(tmp_path: Path, without: int) -> Path:
    from mmts_plugins.tables import ClusterTable

    kept = [i for i in range(len(CAPTIONS)) if i not in range(without)]
    tmp_path.mkdir(exist_ok=True)
    table = tmp_path / "partial.parquet"
    ClusterTable.build([CAPTIONS[i] for i in kept], range(len(kept)), [5 * i + 1 for i in kept]).save(table)
    return table


def test_missing_captions_get_the_chosen_shift_and_a_warning(small_model, data, tmp_path, recorder, caplog):
    table = partial_table(tmp_path, without=1)  # 14 of 48 samples
    main(flags(small_model, data, tmp_path, mmts_clusters=table, mmts_no_schedule=True))
    assert "training captions are not in" in caplog.text
    assert "they get the tail shift" in caplog.text
    tokenizer = open_clip.get_tokenizer(small_model)
    unknown = tokenizer([CAPTIONS[0]])[0]
    rows = pq.read_table(table).to_pylist()
    known = {tuple(tokenizer([row["key"]])[0].tolist()): row["frequency"] for row in rows}
    for call in recorder.calls:
        # An unknown caption gets the shift of the rarest cluster, whose frequency is the least.
        least = min(known.values())
        frequency = [known.get(tuple(row.tolist()), least) for row in call["tokens"]]
        tau = reference.temperature(frequency, known.values(), 0, LOW, HIGH, 0, 1)
        assert call["loss"] == pytest.approx(
            float(reference.info_nce(call["image"], call["text"], torch.from_numpy(tau))), abs=1e-6
        )
    assert sum(bool((row == unknown).all()) for call in recorder.calls for row in call["tokens"]) == 28
    with pytest.raises(TableError, match="--mmts-missing error"):
        main(flags(small_model, data, tmp_path, name="e", mmts_clusters=table, mmts_missing="error"))


# An epoch of 48 samples is judged as a whole: then what is said is the same to the letter.
LOADINGS = {
    "one by one": {"batch_size": 2, "log_every_n_steps": 1},
    "rarely logged": {"batch_size": 2, "log_every_n_steps": 100, "seed": 5},
    "large batches": {"batch_size": 16, "log_every_n_steps": 1, "seed": 1},
    "large, rarely logged": {"batch_size": 16, "log_every_n_steps": 100, "seed": 2},
    "accumulated": {"batch_size": 8, "accum_freq": 3, "log_every_n_steps": 1, "seed": 3},
}


@pytest.mark.parametrize("loading", LOADINGS.values(), ids=LOADINGS)
def test_the_same_hit_rate_is_judged_alike(loading, small_model, data, tmp_path, caplog):
    few, most = (partial_table(tmp_path / name, without=many) for name, many in (("few", 3), ("most", 1)))
    with pytest.raises(TableError, match=r"^33 of the first 48 training captions are not in .* \(31% found\), for"):
        main(flags(small_model, data, tmp_path, mmts_clusters=few, name="few", epochs=1, **loading))
    main(flags(small_model, data, tmp_path, mmts_clusters=most, name="most", epochs=2, **loading))
    said = [message for message in caplog.messages if "training captions are not in" in message]
    assert len(said) == 1  # once for both epochs
    assert said[0].startswith(f"MM-TS: 14 of the first 48 training captions are not in {most} (70% found), for example")
    assert said[0].count("'a photo of a dog'") == 3
    with pytest.raises(
        TableError, match=r"^\d+ of the first \d+ training captions .*\(--mmts-missing error; tail or mean"
    ):
        main(flags(small_model, data, tmp_path, mmts_clusters=most, name="e", mmts_missing="error", **loading))


def test_a_step_without_our_loss_stops(small_model, data, tmp_path, monkeypatch):
    import open_clip_train.main

    monkeypatch.setattr(open_clip_train.main, "create_loss", open_clip_train.main.create_loss.__wrapped__)
    with pytest.raises(
        SeamError, match=r"open_clip_torch 3\..*training starts without the MM-TS loss \(found ClipLoss\)"
    ):
        main(flags(small_model, data, tmp_path))


def test_a_table_of_another_column_stops_before_the_first_batch(small_model, data, tmp_path):
    table = tmp_path / "t.parquet"
    assert cli.main(["cluster", str(data.csv), "-k", "2", "--encoder", "hashing", "-o", str(table)]) == 0
    other = tmp_path / "other.tsv"
    other.write_text(data.csv.read_text().replace("filepath\ttitle", "filepath\ttext"))
    flags = openclip_flags(small_model, tmp_path / "logs", train_data=other, dataset_type="csv", epochs=1)
    done = run_python("-m", "open_clip_train.main", *flags, "--csv-caption-key", "text", "--loss", "mmts",
                      "--mmts-clusters", table, PYTHONPATH=str(REPOSITORY))  # fmt: skip
    assert done.returncode != 0
    (error,) = [line for line in done.stdout.splitlines() if line.startswith("mmts: error: ")]
    assert "was made of column 'title', but this run trains on column 'text' (--csv-caption-key)" in error
    assert "Train Epoch" not in done.stdout


@pytest.mark.parametrize(("factors", "weights"), [("1::10", "1::10"), ("0.5::1", "1::2"), ("0.33333::1", "0.33333::1")])
def test_any_upsampling_factors_of_the_host_train(factors, weights):
    args = types.SimpleNamespace(dataset_type="webdataset", train_data="a.tar::b.tar",
                                 train_data_upsampling_factors=factors)  # fmt: skip
    assert _reads(args)["weights"] == (weights, "--train-data-upsampling-factors")


def test_without_our_flag_nothing_changes(small_model, data, tmp_path):
    """Patched but not asked: parameters, optimizer state and losses to the bit. Installed or not: see test_startup."""
    import open_clip_train.main as host

    arguments = {"loss": None, "mmts_clusters": None}
    main(flags(small_model, data, tmp_path, name="patched", **arguments))
    originals = {}
    for name in ("create_loss", "parse_args", "get_data", "train_one_epoch"):
        originals[name] = getattr(host, name)
        setattr(host, name, originals[name].__wrapped__)
        assert hasattr(originals[name], "_mmts_seam")
        assert not hasattr(getattr(host, name), "_mmts_seam")
    try:
        main(flags(small_model, data, tmp_path, name="original", **arguments))
    finally:
        for name, value in originals.items():
            setattr(host, name, value)
    a, b = (
        torch.load(tmp_path / name / "checkpoints/epoch_2.pt", weights_only=True) for name in ("patched", "original")
    )
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    states = a["optimizer"]["state"], b["optimizer"]["state"]
    assert len(states[0]) == len(states[1]) == len(a["state_dict"]) > 20
    assert all(torch.equal(one, states[1][i][name]) for i, state in states[0].items() for name, one in state.items())


def test_abbreviated_loss_dist_impl_still_means_the_hosts(tmp_path):
    from open_clip_train.params import parse_args

    assert parse_args(["--siglip", "--loss", "reduce"]).loss_dist_impl == "reduce"


def test_help_lists_our_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--accum-freq" in text
    assert "--mmts-num-oscillations" in text
