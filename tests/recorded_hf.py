"""Started in tests: a user's script with transformers' Trainer, with what goes into our loss written down."""

from __future__ import annotations

import os
import sys

import hf_train
import numpy as np
import torch

from mmts_plugins.adapters.transformers import TransformersSession

target, sys.argv[1:] = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)
records: dict[str, list] = {"image": [], "text": [], "tau": [], "loss": [], "step": [], "frequency": [], "scale": []}
of_output, temperatures = TransformersSession._loss_of, TransformersSession.temperatures


def recording_temperatures(session, samples, counted=True):
    index = session.index(samples)
    records["frequency"].append(session.index.frequencies[index.numpy()])
    return temperatures(session, samples, counted)


def recording_loss(session, output, tau):
    loss = of_output(session, output, tau)
    for name in ("image", "text"):
        records[name].append(output[f"{name}_embeds"].detach().double().numpy())
    records["tau"].append(tau.numpy())
    records["loss"].append(float(loss.detach()))
    records["step"].append(session.step)
    records["scale"].append(float(session._scale.detach().exp()))
    return loss


TransformersSession.temperatures, TransformersSession._loss_of = recording_temperatures, recording_loss
train = hf_train.Trainer.train


def recorded(*args, **kwargs):
    try:
        return train(*args, **kwargs)
    finally:
        np.savez(f"{target}-{os.environ.get('RANK', '0')}.npz", **records)


hf_train.Trainer.train = recorded
hf_train.main()
