"""A linear probe: how well a linear classifier tells classes apart by an image tower's output before its projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LBFGS, SGD = "lbfgs", "sgd"


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        train, test: accuracies in ``[0, 1]``.
        loss: of the training set at the end.
    """

    train: float
    test: float
    loss: float


@contextmanager
def without_projection(model: Any) -> Iterator[None]:
    """The image tower gives what its projection is given; with class tokens, all of theirs, one behind the other."""
    tower = model.visual
    projection = getattr(tower, "proj", None)
    if not isinstance(projection, Tensor):  # of another kind of tower: its last layer stays
        yield
        return
    tower.proj = None
    try:
        yield
    finally:
        tower.proj = projection


def probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    solver: str = LBFGS,
    epochs: int = 100,
    decay: float = 1e-4,
    batch_size: int = 1024,
    rate: float = 1.0,
    seed: int = 0,
    watch: Callable[[], object] = lambda: None,
) -> Probe:
    """Train on frozen features and test.

    Args:
        train, test: features ``[N, D]`` and classes ``[N]`` in ``[0, classes)``.
        solver: ``lbfgs``, on all features at once, with weight ``decay``; or ``sgd`` as in App. A of Sun & Li: no
            momentum, no decay, a cosine from ``rate`` to 0 after 5 epochs of warm-up. Images are not augmented.
        epochs: of ``sgd``; rounds of ``lbfgs``.
        watch: called after each.
    """
    mean, spread = train[0].mean(0), train[0].std(0).clamp_min(1e-6)
    (x, y), (x_test, y_test) = (((features - mean) / spread, labels) for features, labels in (train, test))
    layer = nn.Linear(x.shape[1], classes).to(x)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    (_lbfgs if solver == LBFGS else _sgd)(layer, x, y, epochs, decay, batch_size, rate, seed, watch)
    with torch.no_grad():
        of_train, of_test = (float((layer(a).argmax(1) == b).double().mean()) for a, b in ((x, y), (x_test, y_test)))
        return Probe(of_train, of_test, float(F.cross_entropy(layer(x), y)))


def _lbfgs(layer: nn.Linear, x: Tensor, y: Tensor, epochs: int, decay: float, *rest: Any) -> None:
    watch = rest[-1]
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + decay / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    for _ in range(max(1, epochs // 10)):
        optimizer.step(closure)
        watch()


def _sgd(
    layer: nn.Linear, x: Tensor, y: Tensor, epochs: int, decay: float, batch_size: int, rate: float, seed: int,
    watch: Callable[[], object],
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    per_epoch = -(-len(x) // batch_size)
    warm, total = min(5, epochs) * per_epoch, epochs * per_epoch
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=draw)
        for number, rows in enumerate(order.split(batch_size)):
            step = epoch * per_epoch + number
            share = (step - warm) / max(1, total - warm)
            now = rate * (step + 1) / warm if step < warm else rate * (1 + math.cos(math.pi * share)) / 2
            optimizer.param_groups[0]["lr"] = now
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
        watch()
