"""What a run shows while it trains: temperatures, hit rate, losses by third, and how the embedding space fares.

Nothing here waits for the device outside the steps that it reports.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import THIRDS
from .distributed import gather_rows
from .errors import cause, one_line
from .functional import full_precision
from .losses import kind
from .temperature import Temperatures

logger = logging.getLogger(__name__)

_BLOCK = 256  # anchors at a time: two blocks of similarities are all the memory that a measurement takes
_UNIFORMITY_ROWS = 1024

Log = Callable[[dict[str, float], int], None]


@torch.no_grad()
def batch_statistics(
    loss: str,
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor,
    third: Tensor,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """How this rank's anchors stand among the whole batch.

    Args:
        loss: its name, such as ``mmts-infonce``.
        image_features, text_features: ``[n, D]`` of this rank, pairs by row, of any length; on every rank ``n`` alike.
        temperature: ``[n]``, or margins.
        third: ``[n]`` 0, 1 or 2: head, middle or tail.
        rank, world_size: the others' features are gathered; every rank must call.

    Returns:
        Scalars on the device: ``loss_head|middle|tail`` (mean loss of such anchors; NaN where there is none),
        ``positive_similarity``, ``negative_similarity`` and their ``similarity_gap``; ``alignment`` (mean squared
        distance of a pair) and ``uniformity`` (log of the mean Gaussian potential within each modality, averaged over
        the two, of at most 1,024 samples) of Wang & Isola, ICML 2020; ``modality_gap`` (distance of the two means;
        Liang et al., NeurIPS 2022); and what the loss itself has to show (:meth:`.losses.LossKind.statistics`).
    """
    images, texts = (F.normalize(full_precision(rows), dim=-1) for rows in (image_features, text_features))
    all_images, all_texts = (rows if world_size == 1 else gather_rows(rows, world_size) for rows in (images, texts))
    n, total = len(images), len(all_images)
    tau = temperature.to(images.dtype)
    positive = (images * texts).sum(1)
    own = torch.arange(n, device=images.device) + rank * n
    measured: list[dict[str, Tensor]] = []
    for start in range(0, n, _BLOCK):
        rows = slice(start, start + _BLOCK)
        column = own[rows, None]
        # Similarities of each anchor to the negatives of either modality; its own pair drops out.
        negatives = [
            (anchors[rows] @ others.T).scatter(1, column, -math.inf)
            for anchors, others in ((images, all_texts), (texts, all_images))
        ]
        measured.append(kind(loss).anchors(positive[rows], negatives, tau[rows]))
    anchors = {name: torch.cat([each[name] for each in measured]) for name in measured[0]}
    per_anchor = anchors["loss"]
    found = {f"loss_{name}": per_anchor[third == number].mean() for number, name in enumerate(THIRDS)}
    # The mean over all pairs is the product of the means: no similarity is formed for it.
    means = all_images.mean(0), all_texts.mean(0)
    pairs = (all_images * all_texts).sum(1).mean()
    negative = (total * (means[0] * means[1]).sum() - pairs) / max(1, total - 1)
    found |= {
        "positive_similarity": pairs,
        "negative_similarity": negative,
        "similarity_gap": pairs - negative,
        "alignment": 2 - 2 * pairs,
        "uniformity": (_uniformity(all_images) + _uniformity(all_texts)) / 2,
        "modality_gap": torch.linalg.vector_norm(means[0] - means[1]),
    }
    return found | kind(loss).statistics(anchors)


def _uniformity(features: Tensor) -> Tensor:
    """``log E exp(-2 |x - y|^2)`` over distinct pairs."""
    features = features[:_UNIFORMITY_ROWS]
    n = len(features)
    exponent = 4 * (features @ features.T) - 4
    exponent.fill_diagonal_(-math.inf)
    return torch.logsumexp(exponent.flatten(), 0) - math.log(max(1, n * (n - 1)))


class Meter:
    """Temperatures' shifts and misses since the last report, summed on the device."""

    def __init__(self) -> None:
        self.samples = 0
        self._stats: list[Tensor] = []

    def update(self, shift: Tensor, missed: Tensor) -> None:
        """``shift`` ``[n]``, ``missed`` ``[n]`` whether the sample is absent from the table."""
        new = [shift.sum(), shift.min(), shift.max(), missed.sum()]
        if self._stats:
            total, low, high, misses = self._stats
            new = [total + new[0], torch.minimum(low, new[1]), torch.maximum(high, new[2]), misses + new[3]]
        self._stats = new
        self.samples += len(shift)

    def read(self, tau: Temperatures) -> dict[str, float]:
        """The values to show; waits for the device, once, then starts anew. Temperatures are those of now."""
        total, low, high, misses = torch.stack([value.to(self._stats[0].dtype) for value in self._stats]).tolist()
        samples, self.samples, self._stats = self.samples, 0, []
        base = tau.base
        values = {
            "tau_base": base,
            "tau_mean": base + total / samples,
            "tau_min": base + low,
            "tau_max": base + high,
            "tau_head": base + tau.head_shift,
            "tau_middle": base + tau.middle_shift,
            "tau_tail": base + tau.tail_shift,
            "hit_rate": 1 - misses / samples,
            "phase": tau.schedule.phase(tau.step),
        }
        if not tau.config.kind.is_margin:
            values["scale_mean"] = 1 / values["tau_mean"]
        return values


def _append(path: Path, line: str) -> None:
    """On a line of its own, even where a killed run or a full disk left half a line at the end."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode() + b"\n")


def step_line(tau: Temperatures, values: dict[str, float]) -> str:
    """What :meth:`Meter.read` found, as a line of a host's log."""
    shown = {name: f"{value:.4f}" for name, value in values.items()}
    return (
        f"MM-TS step {tau.step}/{tau.total_steps}: base {values['tau_base']:+.4f}, mean {shown['tau_mean']} "
        f"[{shown['tau_min']}, {shown['tau_max']}], head {shown['tau_head']}, tail {shown['tau_tail']}, "
        f"hits {values['hit_rate']:.1%}, phase {values['phase']:.2f}"
    )


class Diagnostics:
    """Reports of one run, to the host's own loggers and to ``mmts.jsonl``.

    Args:
        tau: of the run.
        log: ``log(values, step)`` writes to the host's loggers; called on the first rank only.
        path: of ``mmts.jsonl``, one JSON object per line; ``None`` writes none. A resumed run goes on in it: what it
            says of a step again counts. Where it cannot be written (disk full), training goes on after one warning.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        tau: Temperatures,
        log: Optional[Log] = None,
        path: Optional[Path] = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._tau, self._log, self._path = tau, log, path
        self._rank, self._world_size = rank, world_size
        self._measured = -1
        self._lost = 0

    def report(self, values: dict[str, float]) -> None:
        """Show values of the current step. Numbers that are not finite are left out of the file."""
        if self._rank != 0:
            return
        step = self._tau.step
        if self._log is not None:
            self._log(values, step)
        if self._path is not None:
            known = {name: round(value, 8) for name, value in values.items() if math.isfinite(value)}
            line = json.dumps({"step": step, "total_steps": self._tau.total_steps, **known})
            try:
                _append(self._path, line)
            except OSError as error:
                self._lost += 1
                if self._lost == 1:
                    logger.warning("%s", one_line(
                        f"MM-TS: {self._path}: cannot be written: {cause(error)}. Training goes on; the values from "
                        f"step {step} on are missing there until it can"
                    ))  # fmt: skip
            else:
                if self._lost:
                    logger.warning("MM-TS: %s: written again; %d lines are missing", self._path, self._lost)
                self._lost = 0

    def watch(self, image_features: Tensor, text_features: Tensor, temperature: Tensor) -> None:
        """Where the loss is: every ``diagnostics_every`` steps, measure the batch. Then every rank must call.

        Args:
            image_features, text_features: ``[n, D]`` of this rank.
            temperature: ``[n]``, on any device: it is moved only where it is needed.
        """
        tau = self._tau
        every, step = tau.config.diagnostics_every, tau.step
        if not every or step % every or step == self._measured:
            return
        self._measured = step  # once, however often accumulation calls the loss
        temperature = temperature.to(image_features.device)
        third = tau.third(temperature - tau.base)
        config, ranks = tau.config, (self._rank, self._world_size)
        found = batch_statistics(
            config.loss, image_features.detach(), text_features.detach(), temperature, third, *ranks
        )
        if self._rank == 0:
            self.report(dict(zip(found, torch.stack([value.float() for value in found.values()]).tolist())))
