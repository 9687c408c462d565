"""MM-TS in tiny_trainer: its conventions, its seams, and one entry point in pyproject.toml."""

import sys
from pathlib import Path

import torch

from mmts_plugins.hosts import Adapter, Facts, Host, Preset, Seam, Session, hookimpl
from mmts_plugins.options import split_flags
from mmts_plugins.tables.index import KeyLookup


class Tiny(Adapter):
    name, title, loss = "tiny", "tiny_trainer", "mmts-infonce"
    presets = {"tiny": Preset("mmts-infonce", alpha=0.04, shift_min=0.05, shift_max=0.10)}
    default_presets = {"mmts-max-margin": "avion-max-margin"}


ADAPTER = Tiny()
resolved = session = None


def parse(original, argv=None):
    global resolved, session
    flags, rest = split_flags(sys.argv[1:] if argv is None else argv, ADAPTER.options)
    resolved, session = ADAPTER.resolve(flags) if flags else None, None
    return original(rest)


def train(original, args):
    global session
    if resolved is not None:
        batches = len(Path(args.captions).read_text().splitlines()) // args.batch_size
        facts = Facts(total_steps=args.epochs * batches, device=torch.device("cpu"), folder=Path(args.output))
        session = Session(ADAPTER, resolved, facts, KeyLookup)
        session.judge_batches("training captions")
        session.write_record()
    losses = original(args)
    if session is not None:
        session.judge_now()
    return losses


def learning_rate(original, step, total):
    if session is not None:
        session.at_step(step)
    return original(step, total)


def contrastive_loss(original, images, texts, captions):
    if session is None:
        return original(images, texts, captions)
    loss = session.loss(images, texts, session.temperatures(captions))
    session.report()
    return loss


HOST = Host(
    name="tiny_trainer",
    distribution="tiny-host",
    package="tiny_trainer",
    versions="1.0",
    seams=(
        Seam("tiny_trainer", "parse", ("argv",), parse, takes_flags=True),
        Seam("tiny_trainer", "train", ("args",), train),
        Seam("tiny_trainer", "learning_rate", ("step", "total"), learning_rate),
        Seam("tiny_trainer", "contrastive_loss", ("images", "texts", "captions"), contrastive_loss),
    ),
    adapters=lambda: (ADAPTER,),
    start_modules=("tiny_trainer",),
)


@hookimpl
def mmts_host():
    return HOST
