"""Started by torchrun in tests: OpenCLIP's own main, with what goes into and comes out of our loss written down."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "shim"))
import numpy as np
import sitecustomize
import torch
from open_clip_train.main import main

from mmts_plugins.adapters.openclip import Run, ScheduledLoss

assert "shim" in sitecustomize.__file__ or hasattr(sitecustomize, "_without_device_ids")

rank = os.environ.get("RANK", "0")
target, arguments = sys.argv[1], sys.argv[2:]
records: dict[str, list] = {"image": [], "text": [], "temperature": [], "loss": [], "step": [], "tokens": []}
forward, temperatures = ScheduledLoss.forward, Run.of_batch
step = [0]


def recording_temperatures(run, tokens):
    step[0] = run.runtime.step
    records["tokens"].append(tokens.numpy())
    return temperatures(run, tokens)


def recording_forward(loss, image_features, text_features, logit_scale, mmts_temperature=None, **kwargs):
    out = forward(loss, image_features, text_features, logit_scale, mmts_temperature=mmts_temperature, **kwargs)
    records["image"].append(image_features.detach().double().numpy())
    records["text"].append(text_features.detach().double().numpy())
    records["temperature"].append((loss.temperature if mmts_temperature is None else mmts_temperature).numpy())
    records["loss"].append(float(out["contrastive_loss"].detach()))
    records["step"].append(step[0])
    return out


ScheduledLoss.forward, Run.of_batch = recording_forward, recording_temperatures
begin_epoch = Run.begin_epoch


def dying(run, model, loss, epoch, *rest):
    if os.environ.get("TEST_DIE_BEFORE_EPOCH") == str(epoch):
        np.savez(f"{target}-{rank}.npz", **records)
        os._exit(9)
    begin_epoch(run, model, loss, epoch, *rest)


Run.begin_epoch = dying
torch.set_num_threads(1)
main(arguments)
np.savez(f"{target}-{rank}.npz", **records)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order, even without a group
