"""One run of a pilot: two linear heads on frozen features; the loss, the clock and the configuration are a host's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import THIRDS
from ..errors import ConfigError
from ..evaluation.retrieval import ranks, recall_at
from ..hosts.adapter import Adapter, Resolved
from ..hosts.session import Facts, Session
from ..options import split_flags
from ..tables import Table
from ..tables.index import KeyLookup
from . import data

_START, _MOST = 1 / 0.07, 100.0  # CLIP's logit scale, where it starts and what it is clamped to


@dataclass(frozen=True)
class Settings:
    """What all runs of a pilot have in common.

    Attributes:
        epochs, batch_size: of training; a last batch that is not full is left out.
        dimensions: of the heads' output.
        learning_rate: of AdamW, at its peak; warmed up for a twentieth of the run, then a cosine to zero.
        weight_decay: of AdamW; none of the logit scale.
        device: such as ``cpu`` or ``cuda:0``.
    """

    epochs: int = 12
    batch_size: int = 512
    dimensions: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    device: str = "cpu"

    def steps(self, samples: int) -> int:
        return samples // self.batch_size * self.epochs


class _Known:
    """Samples by their row: their captions were looked up once."""

    def __init__(self, table: Table, captions: Sequence[str]) -> None:
        lookup = KeyLookup(table)
        self.frequencies = lookup.frequencies
        self._places = torch.from_numpy(lookup(captions))

    def __call__(self, rows: Tensor) -> Tensor:
        return self._places[rows]


class PilotSession(Session):
    """A host's run without the host: its configuration, its clock, its temperatures, its loss."""

    def say(self, level: str, text: str) -> None:
        """Nothing: there are dozens of runs, and what they have in common is said once."""


def resolve(adapter: Adapter, flags: Sequence[str]) -> Optional[Resolved]:
    """Flags as a host would; ``None`` where none is ours, which is the learned temperature.

    Raises:
        ConfigError, TableError: what would stop the host's run.
    """
    ours, rest = split_flags(list(flags), adapter.options)
    if rest:
        raise ConfigError(f"{rest[0]}: a variant of a pilot takes --loss and --mmts-* flags alone")
    return adapter.resolve(ours) if ours else None


class Heads(nn.Module):
    """A linear map for each side, to the unit sphere; and CLIP's logit scale, for runs whose temperature is learned."""

    def __init__(self, texts: int, others: int, dimensions: int) -> None:
        super().__init__()
        self.text = nn.Linear(texts, dimensions, bias=False)
        self.other = nn.Linear(others, dimensions, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(_START)))

    def forward(self, texts: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.text(texts), dim=1), F.normalize(self.other(others), dim=1)


def train(folder: Path, adapter: Adapter, flags: Sequence[str], seed: int, settings: Settings) -> dict[str, Any]:
    """Train and test once. The same on every call with these arguments, on one machine.

    Args:
        folder: of the features, see :func:`.data.store`.
        flags: of the variant; none for a learned temperature.

    Returns:
        ``metrics`` in the form of ``mmts eval``, the ``losses`` of all steps, and what the ``temperature`` was.

    Raises:
        ConfigError, TableError: what would stop a host's run.
    """
    training, test, thirds = data.load(folder)
    total = settings.steps(len(training))
    resolved = resolve(adapter, flags)
    device = torch.device(settings.device)
    session = None
    if resolved is not None:
        session = PilotSession(adapter, resolved, Facts(total, device), lambda table: _Known(table, training.captions))
    torch.manual_seed(seed)
    texts, others = (torch.from_numpy(np.array(each)).to(device) for each in (training.texts, training.others))
    heads = Heads(texts.shape[1], others.shape[1], settings.dimensions).to(device)
    maps = {"params": [heads.text.weight, heads.other.weight], "weight_decay": settings.weight_decay}
    scale = {"params": [heads.logit_scale], "weight_decay": 0.0}  # as CLIP has it
    optimizer = torch.optim.AdamW([maps, scale], lr=settings.learning_rate)
    draw = torch.Generator().manual_seed(seed)
    losses: list[Tensor] = []
    for _ in range(settings.epochs):
        order = torch.randperm(len(training), generator=draw)
        for rows in order.split(settings.batch_size):
            if len(rows) < settings.batch_size:
                continue
            step = len(losses)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate(step, total)
            text, other = heads(texts[rows], others[rows])
            if session is None:
                loss = _learned(text, other, heads.logit_scale)
            else:
                session.at_step(step)
                # As a host has it: images first. Both losses are the same both ways.
                loss = session.loss(other, text, session.temperatures(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                heads.logit_scale.clamp_(0, math.log(_MOST))
            losses.append(loss.detach())
    if not torch.isfinite(losses[-1]):
        raise ConfigError("the loss is no finite number at the end: lower --learning-rate")
    metrics = measure(heads, test, thirds, device)
    learned = float(heads.logit_scale.detach().exp())
    return {
        "metrics": metrics,
        "losses": [float(loss) for loss in losses],
        "temperature": 1 / learned if session is None else session.tau.describe(),
    }


def _rate(step: int, total: int) -> float:
    warm = max(1, total // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _learned(texts: Tensor, others: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale.exp() * others @ texts.T
    own = torch.arange(len(texts), device=texts.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def measure(heads: Heads, test: data.Pairs, thirds: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Recalls both ways, and of the texts' thirds, as ``mmts eval`` writes them."""
    heads.eval()
    with torch.no_grad():
        sides = (torch.from_numpy(np.array(each)).to(device) for each in (test.texts, test.others))
        texts, others = (each.cpu() for each in heads(*sides))
    groups, first = np.unique(test.group, return_index=True)
    labels, things = torch.from_numpy(test.group.copy()), others[first]
    numbers = torch.from_numpy(groups)
    to_other = ranks(texts, things, labels, numbers)
    to_text = ranks(things, texts, numbers, labels)
    parts = {name: torch.from_numpy(thirds == third) for third, name in enumerate(THIRDS)}
    of_parts = {name: recall_at(to_other[inside]) for name, inside in parts.items() if inside.any()}
    found: dict[str, Any] = {}
    for k, recall in recall_at(to_other).items():
        found[f"text_to_other_R@{k}"] = {"value": recall, **{name: {"value": of[k]} for name, of in of_parts.items()}}
    for k, recall in recall_at(to_text).items():
        found[f"other_to_text_R@{k}"] = {"value": recall}
    return found
