"""Started in tests: a user's script with sentence-transformers, with what goes into each step's loss written down."""

from __future__ import annotations

import os
import sys

import numpy as np
import st_train
import torch

from mmts_plugins.adapters.sentence_transformers import SentenceTransformersSession
from mmts_plugins.adapters.trainer import beginning

target, sys.argv[1:] = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)
records: dict[str, list] = {"anchor": [], "positive": [], "loss": [], "step": [], "noun": []}
forward, temperatures = st_train.SentenceTransformer.forward, SentenceTransformersSession.temperatures
latest: list[np.ndarray] = []


def recording_forward(model, *args, **kwargs):
    out = forward(model, *args, **kwargs)
    latest.append(out["sentence_embedding"].detach().double().numpy())
    return out


def recording_temperatures(session, samples, counted=True):
    latest.clear()
    records["step"].append(session.step)
    records["noun"].append([st_train.NOUNS.index(beginning(sample).rsplit(" ", 1)[1]) for sample in samples])
    return temperatures(session, samples, counted)


def recording_step(trainer, *args, **kwargs):
    value = step(trainer, *args, **kwargs)
    embeddings = np.concatenate(latest)
    rows = len(records["noun"][-1])
    assert len(embeddings) == 2 * rows
    records["anchor"].append(embeddings[:rows])
    records["positive"].append(embeddings[rows:])
    records["loss"].append(float(value) * trainer.args.gradient_accumulation_steps)
    return value


st_train.SentenceTransformer.forward = recording_forward
SentenceTransformersSession.temperatures = recording_temperatures
step, st_train.SentenceTransformerTrainer.training_step = (
    st_train.SentenceTransformerTrainer.training_step,
    recording_step,
)
train = st_train.SentenceTransformerTrainer.train


def recorded(*args, **kwargs):
    result = train(*args, **kwargs)
    np.savez(f"{target}-{os.environ.get('RANK', '0')}.npz", **records)
    return result


st_train.SentenceTransformerTrainer.train = recorded
st_train.main()
