"""Started in tests: OpenCLIP's own main, with what goes into and comes out of our loss written down."""

from __future__ import annotations

import importlib
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "shim"))
import numpy as np
import sitecustomize
import torch

from mmts_plugins.adapters.openclip import OpenCLIPSession, ScheduledLoss

assert "shim" in sitecustomize.__file__ or hasattr(sitecustomize, "_without_device_ids")

main = importlib.import_module(os.environ.get("TEST_TRAINER", "open_clip_train") + ".main").main
if "TEST_MODEL" in os.environ:  # until 3.0 a model of one's own is known by its name, in this process only
    importlib.import_module("open_clip").add_model_config(os.environ["TEST_MODEL"])

rank = os.environ.get("RANK", "0")
target, arguments = sys.argv[1], sys.argv[2:]
records: dict[str, list] = {"image": [], "text": [], "temperature": [], "loss": [], "step": [], "tokens": []}
forward, temperatures = ScheduledLoss.forward, OpenCLIPSession.of_batch
step = [0]


def recording_temperatures(run, tokens):
    step[0] = run.tau.step
    if torch.is_grad_enabled():  # accumulation runs every batch once without
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


ScheduledLoss.forward, OpenCLIPSession.of_batch = recording_forward, recording_temperatures
begin_epoch = OpenCLIPSession.begin_epoch


def dying(run, model, loss, epoch, *rest):
    if os.environ.get("TEST_DIE_BEFORE_EPOCH") == str(epoch):
        np.savez(f"{target}-{rank}.npz", **records)
        os._exit(9)
    torch.manual_seed(epoch)  # OpenCLIP does not save the generator, which draws a single process's order
    begin_epoch(run, model, loss, epoch, *rest)


OpenCLIPSession.begin_epoch = dying
torch.set_num_threads(1)
main(arguments)
np.savez(f"{target}-{rank}.npz", **records)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order, even without a group
