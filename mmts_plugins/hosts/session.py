"""One training run: what every host does at its start, at each step and in its reports, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol, Union

import numpy as np
import torch
from torch import Tensor, nn

from ..diagnostics import Diagnostics, Meter, step_line
from ..distributed import check_ranks_agree
from ..errors import ConfigError, SeamError, one_line, shown
from ..hits import HitGuard, judge_known
from ..record import FILE_NAME, LOG_NAME, check_resume, record, write_record
from ..tables import Table
from ..tables.index import KeyLookup
from ..temperature import Temperatures
from .adapter import Adapter, Resolved

WARNING, INFO = "warning", "info"


class Index(Protocol):
    """How the samples of a batch are found in a table.

    Attributes:
        frequencies: ``[U]`` distinct frequencies that an index may mean; index ``U`` is a sample not in the table.
    """

    frequencies: np.ndarray

    def __call__(self, samples: Any, /) -> Union[Tensor, np.ndarray]:
        """``n`` samples to ``[n]`` int64 indices into :attr:`frequencies`."""


@dataclass(frozen=True)
class Facts:
    """What a host knows of a run when it is about to train.

    Attributes:
        total_steps: optimizer steps of the whole run, from its very first.
        device: where temperatures are looked up.
        exchange: the device on which ranks tell one another; default: the same.
        host_version: for messages and ``mmts.yaml``.
        folder: of ``mmts.yaml`` and ``mmts.jsonl``, none that the host lists; ``None`` where it saves nothing.
        resumed: the ``mmts.yaml`` of the run that is resumed, or what :meth:`Session.check_resumed` finds it by;
            ``None`` where none is.
        reads: how it reads its captions, where that decides which they are: by the name under which a table records
            it (``column``, ``separator``, ``suffix``, ``weights``), the value and the host's flag.
        done: why nothing is left to train, such as ``"3 of --epochs 3 are done"``; empty where something is.
        longer: how the user gets a run with a step at all.
        rank, world_size: of this process.
    """

    total_steps: int
    device: torch.device
    host_version: str = ""
    folder: Optional[Path] = None
    resumed: Optional[str] = None
    done: str = ""
    longer: str = "lower the batch size or raise the number of epochs"
    rank: int = 0
    world_size: int = 1
    exchange: Optional[torch.device] = None
    reads: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


class Session:
    """A run whose configuration, table and length are known. Every rank makes one, before its first step.

    Subclass it where a host has more to say; override :meth:`say`, :meth:`write_values` and :meth:`check_resumed`.

    Args:
        adapter: of the host.
        resolved: from :meth:`.Adapter.resolve`.
        facts: of the run.
        index: makes the index of the table, once the cheaper checks are passed; not called where every sample gets the
            middle shift.

    Raises:
        ConfigError: no step to train, ranks that differ, or a resumed run that differs.
    """

    expects_loss: bool = True
    """Whether an optimizer step without :meth:`loss_taken` is an error. Not where a loss is compiled and tells nobody,
    nor where some steps have no contrastive loss."""
    losses_per_step: Optional[int] = None
    """How many :meth:`loss_taken` an optimizer step can have, where that is known."""

    def __init__(
        self, adapter: Adapter, resolved: Resolved, facts: Facts, index: Callable[[Table], Index] = KeyLookup
    ) -> None:
        if facts.total_steps < 1:
            raise ConfigError(f"the run has no optimizer step: {facts.longer}")
        self.adapter, self.facts = adapter, facts
        self.config, self.table = resolved.config, resolved.table
        self._source = "no table" if self.table is None else self.table.source
        self._values = record(
            self.config,
            facts.total_steps,
            None if self.table is None else self.table.content_hash,
            adapter.recorded or adapter.title,
            facts.host_version,
        )
        if facts.world_size > 1:
            check_ranks_agree(self._values, facts.rank, facts.world_size, facts.exchange or facts.device)
        if facts.resumed is not None:
            self.check_resumed(facts.resumed, self._values, resolved.allow_change)
        if resolved.shifted is not None:
            self._check_reading(resolved.shifted, resolved.allow_change)
        self.index = None if resolved.shifted is None else index(resolved.shifted)
        frequencies = np.ones(1) if self.index is None else self.index.frequencies
        self.tau = Temperatures(self.config, resolved.described, frequencies, facts.total_steps, facts.device)
        self._meter = Meter()
        path = None if facts.folder is None else facts.folder / LOG_NAME
        self._diagnostics = Diagnostics(self.tau, self.write_values, path, facts.rank, facts.world_size)
        self._guard: Optional[HitGuard] = None
        self._opened, self._taken = False, 0
        self._modules: dict[tuple[tuple[str, bool], ...], nn.Module] = {}
        if facts.rank == 0:
            self._banner()

    # -- fill in, where the host needs it -----------------------------------------------------------------------------

    def say(self, level: str, text: str) -> None:
        """Show ``MM-TS: ...`` where the host shows its lines; ``level`` is ``"info"`` or ``"warning"``. On rank 0."""
        print(text if level == INFO else text.replace("MM-TS: ", "MM-TS: warning: ", 1), flush=True)

    def write_values(self, values: dict[str, float], step: int) -> None:
        """Write values of a step to the host's own loggers, if it has any. Called on rank 0."""

    def check_resumed(self, saved: str, values: dict[str, Any], allow_change: bool) -> None:
        """Compare with the record of the run that is resumed.

        Raises:
            ConfigError: they differ.
        """
        check_resume(saved, values, allow_change, self.table)

    def describe_table(self, table: Table) -> str:
        """The banner's second line."""
        return (
            f"{table.source}: {len(table)} {table.kind}{'es' if table.kind == 'class' else 's'} in {table.clusters} "
            f"clusters, {table.samples} samples, hash {table.content_hash}"
        )

    def _check_reading(self, table: Table, allow_change: bool) -> None:
        """A table made of one column of a file knows little of a run on another."""
        made = table.info.get("read")
        made = made if isinstance(made, dict) else {}
        for name, (value, flag) in self.facts.reads.items():
            if name == "weights":
                if made.get(name, "") != value:
                    self._tell(
                        WARNING,
                        f"{flag}: the run draws its sources as {value}, and {table.source} counts them "
                        f"{'as ' + str(made[name]) if name in made else 'alike'}; make it with: mmts cluster --weights",
                    )
            elif made.get(name, value) not in (value, None):
                problem = (
                    f"{table.source} was made of {name} {shown(made[name])}, but this run trains on {name} "
                    f"{shown(value)} ({flag}); make the table of what is trained on"
                )
                if not allow_change:
                    raise ConfigError(f"{problem}, or go on anyway with --mmts-allow-config-change")
                self._tell(WARNING, f"{problem} (allowed by --mmts-allow-config-change)")

    # -- given --------------------------------------------------------------------------------------------------------

    def _banner(self) -> None:
        self._tell(INFO, self.tau.describe())
        for warning in self.tau.warnings():
            self._tell(WARNING, warning)
        if self.facts.done:
            self._tell(WARNING, f"{self.facts.done}: nothing is trained")
        if self.table is not None:
            self._tell(INFO, self.describe_table(self.table))

    def _tell(self, level: str, text: str) -> None:
        if self.facts.rank == 0:
            self.say(level, one_line(f"MM-TS: {text}"))

    def write_record(self) -> None:
        """Write ``mmts.yaml``, on rank 0: once the host has made its folder and nothing else can stop the run.

        Raises:
            ConfigError: it cannot be written.
        """
        if self.facts.rank == 0 and self.facts.folder is not None:
            write_record(self.facts.folder / FILE_NAME, self._values)

    def judge_before(self, absent: Sequence[str], total: int, what: str, found_by: str = "", hint: str = "") -> None:
        """Judge samples that are all known before training, on every rank alike; see :func:`.hits.judge_known`.

        Args:
            absent: keys of those of ``total`` samples that the table lacks.
            what: the samples, such as ``"training samples of train.csv"``.

        Raises:
            TableError: too many.
        """
        warning = judge_known(absent, total, what, self._source, self.config.missing, found_by, hint)
        if warning is not None:
            self._tell(WARNING, warning)

    def judge_batches(self, what: str, text: Callable[[Any], str] = str) -> None:
        """Have the first batches judged, where they are looked up; see :class:`.hits.HitGuard`.

        Args:
            what: the samples, such as ``"training captions"``.
            text: makes an example of a sample as :meth:`temperatures` is given it.
        """
        facts = self.facts
        if self.index is None:
            return
        self._guard = HitGuard(
            what,
            self._source,
            self.config.missing,
            text,
            lambda warning: self._tell(WARNING, warning),
            facts.exchange or facts.device,
            facts.rank,
            facts.world_size,
        )

    def judge_now(self) -> None:
        """Judge what the batches so far have shown: the epoch or the run ends here. Every rank must call.

        Raises:
            TableError: see :func:`.hits.judge`.
        """
        if self._guard is not None:
            self._guard.conclude()

    @property
    def values(self) -> Mapping[str, Any]:
        """What ``mmts.yaml`` has of this run, for a host that keeps it in its checkpoints."""
        return self._values

    @property
    def step(self) -> int:
        return self.tau.step

    def at_step(self, step: int) -> None:
        """The host's optimizer step, before its forward pass; as often as the host likes to say it.

        Raises:
            SeamError: the step before went by without a loss of ours.
        """
        if self._opened and step == self.step:
            return
        if self._opened and self.expects_loss and not self._taken:
            raise SeamError(
                f"{self.adapter.title} {self.facts.host_version}: step {self.step} went by without the MM-TS loss; "
                "plain training would go on unnoticed. See: mmts doctor"
            )
        self._opened, self._taken = True, 0
        self.tau.step = step

    def temperatures(self, samples: Any, counted: bool = True) -> Tensor:
        """``n`` samples, as the index takes them, to ``[n]`` temperatures (or margins) at the current step, Eq. 8.

        Args:
            samples: of this rank.
            counted: whether they are trained on now; not where a host runs a batch twice.

        Raises:
            TableError: the table does not know enough of them.
        """
        facts = self.facts
        if self.index is None:
            index = torch.zeros(len(samples), dtype=torch.long, device=facts.device)
        else:
            index = torch.as_tensor(self.index(samples))
        shift = self.tau.shift(index)
        if counted:
            missed = index == self.tau.missing
            self._meter.update(shift, missed)
            if self._guard is not None:
                self._guard.add(missed, samples)
        return shift + self.tau.base

    def module(
        self, local_loss: bool = False, gather_with_grad: bool = False, label_smoothing: float = 0.0
    ) -> nn.Module:
        """The loss of this run; the flags as in OpenCLIP's ``ClipLoss``."""
        facts = self.facts
        return self.config.kind.module(local_loss, gather_with_grad, facts.rank, facts.world_size, label_smoothing)

    def loss(self, image_features: Tensor, text_features: Tensor, temperature: Tensor, **flags: bool) -> Tensor:
        """The loss of a training step, counted and watched.

        Args:
            image_features, text_features: ``[n, D]`` of this rank, L2-normalised.
            temperature: ``[n]`` from :meth:`temperatures`.
            flags: of :meth:`module`.

        Raises:
            SeamError: nobody has said that another step began.
        """
        self.loss_taken()
        self.watch(image_features, text_features, temperature)
        key = tuple(sorted(flags.items()))
        if key not in self._modules:
            self._modules[key] = self.module(**flags)
        value: Tensor = self._modules[key](image_features, text_features, temperature)
        return value

    def watch(self, image_features: Tensor, text_features: Tensor, temperature: Tensor) -> None:
        """Where the loss is: measure the batch, where it is due; see :meth:`.diagnostics.Diagnostics.watch`."""
        self._diagnostics.watch(image_features, text_features, temperature)

    def loss_taken(self) -> None:
        """A loss of this step is ours.

        Raises:
            SeamError: nobody has said that another step began.
        """
        self._taken += 1
        if not self._opened or (self.losses_per_step is not None and self._taken > self.losses_per_step):
            raise SeamError(
                f"{self.adapter.title} {self.facts.host_version}: a training step without its number: no clock"
            )

    def report(self, line: bool = True) -> dict[str, float]:
        """Values of the samples since the last report: to the host's loggers, and as a ``line``. On rank 0."""
        if self.facts.rank != 0 or not self._meter.samples:
            return {}
        values = self._meter.read(self.tau)
        self._diagnostics.report(values)
        if line:
            self.say(INFO, one_line(step_line(self.tau, values)))
        return values
