"""What the hosts on Hugging Face's Trainer share: captions at the collator, the facts of a run, values in its log.

Imports without transformers and patches nothing; :mod:`mmts_plugins.patches.trainer` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Optional

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..errors import ConfigError, SeamError, shown
from ..fields import TEXT, Field
from ..hosts.adapter import Adapter, Resolved
from ..hosts.session import Facts, Index, Session
from ..options import Option
from ..record import FILE_NAME
from ..tables import Table
from ..tables.index import KeyLookup

SAMPLES = "mmts_samples"
"""Of a batch ``[n, 1 + 80]`` int32: each sample's place in the table, and in UTF-8 how its caption begins."""
_BEGINNING = 80
_LABELS = ("label", "labels", "score", "scores", "dataset_name")


class TrainerAdapter(Adapter):
    """A script or a notebook with a Trainer of transformers', or a class made of it."""

    loss = "mmts-infonce"
    default_presets: ClassVar[Mapping[str, str]] = {"mmts-infonce": "clip-cc3m", "mmts-max-margin": "avion-max-margin"}
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "column",
            Field(TEXT, null=True),
            "the data set's column whose texts are the table's captions (default: sentence-transformers its first "
            "column of text; transformers the batch's token ids)",
            "NAME",
        ),
    )

    def settle(self, config: Config) -> Config:
        if config.kind.is_margin:
            raise ConfigError(f"--loss {config.loss}: {self.title} scales similarities by row; use --loss mmts-infonce")
        return config

    # -- fill in ------------------------------------------------------------------------------------------------------

    def owns(self, trainer: Any) -> bool:
        """Whether a trainer is of this host."""
        raise NotImplementedError

    def check(self, trainer: Any) -> None:
        """See that a trainer can be scheduled, as far as can be told before it trains.

        Raises:
            ConfigError: it cannot.
        """
        if trainer.args.n_gpu > 1:
            raise ConfigError(
                "one process with several GPUs (DataParallel) splits a batch behind our back: launch with torchrun or "
                "accelerate, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )

    def by_text(self, config: Config) -> bool:
        """Whether captions are looked up as raw strings, where a batch is put together."""
        return True

    def session(self, start: Start, batch: Mapping[str, Any]) -> TrainerSession:
        """The run, made at its first step, with that step's batch at hand."""
        raise NotImplementedError


@dataclass(frozen=True)
class Start:
    """One call of ``train()``.

    Attributes:
        resolved: from the flags, or from :func:`mmts_plugins.enable`.
        trainer: the host's.
        resumed: the checkpoint's folder, where the run goes on from one.
        host_version: for messages and ``mmts.yaml``.
        lookup: of the table, where captions are raw strings.
        data_set: one of several with a table each; empty: the trainer's only table.
    """

    resolved: Resolved
    trainer: Any
    resumed: Optional[str]
    host_version: str
    lookup: Optional[KeyLookup]
    data_set: str = ""


class Places:
    """Samples that were looked up where their batch was put together."""

    def __init__(self, lookup: KeyLookup) -> None:
        self.frequencies: np.ndarray = lookup.frequencies

    def __call__(self, samples: Tensor) -> Tensor:
        return samples[:, 0].long()


class Collator:
    """The host's own data collator, which sees the raw strings; and beside what it makes, each sample's place.

    Without a table there is nothing to find: samples are counted.

    Args:
        lookups: of the table; or several, by the data set that a batch is of.
    """

    def __init__(
        self, collator: Callable[[Any], Any], lookups: Mapping[str, Optional[KeyLookup]], column: Optional[str]
    ) -> None:
        self.collator, self.lookups, self.column = collator, lookups, column

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        samples = np.zeros((len(features), 1 + _BEGINNING), np.int32)
        lookup = self.lookups[data_set_of(features[0], self.lookups)]
        if lookup is not None:
            texts = captions(features, self.column)
            samples[:, 0] = lookup(texts)
            for sample, text in zip(samples, texts):
                start = text.encode("utf-8", "replace")[:_BEGINNING]
                sample[1 : 1 + len(start)] = np.frombuffer(start, np.uint8)
        batch = self.collator(features)
        batch[SAMPLES] = torch.from_numpy(samples)
        return batch


def data_set_of(batch: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Which of several data sets a batch, or a row of one, is of; empty where there is one table for all.

    Raises:
        ConfigError: one that has no table.
    """
    if "" in known:
        return ""
    name = batch.get("dataset_name")
    if name not in known:
        raise ConfigError(
            f"a batch of the data set {shown(name)}, for which there is no table; tables were given for "
            f"{', '.join(known)}"
        )
    return str(name)


def captions(features: Sequence[Mapping[str, Any]], column: Optional[str]) -> list[str]:
    """The texts of a column of a batch, by default the first that holds text.

    Raises:
        ConfigError: there is none.
    """
    first = features[0]
    if column is None:
        column = next((name for name, value in first.items() if isinstance(value, str) and name not in _LABELS), None)
    if column is None or column not in first or not all(isinstance(each[column], str) for each in features):
        what = "no column of the data set holds text" if column is None else f"column {shown(column)} holds no text"
        raise ConfigError(
            f"--mmts-column: {what} (its columns: {', '.join(map(str, first))}; a Trainer drops those that its model "
            "does not take, but for remove_unused_columns=False)"
        )
    return [each[column] for each in features]


class TrainerSession(Session):
    """MM-TS in one call of ``train()``: made at its first step, when the host knows how many there are.

    Raises:
        ConfigError: as :class:`.Session`.
    """

    def __init__(self, adapter: TrainerAdapter, start: Start, index: Callable[[Table], Index]) -> None:
        args, state = start.trainer.args, start.trainer.state
        folder = Path(args.output_dir) if args.output_dir else None
        saved = Path(start.resumed).parent if start.resumed and state.global_step > 0 else None
        if start.data_set:
            folder, saved = (path and path / f"mmts-{start.data_set}" for path in (folder, saved))
        facts = Facts(
            total_steps=int(state.max_steps),
            device=torch.device(args.device),
            host_version=start.host_version,
            folder=folder,
            resumed=None if saved is None else str(saved / FILE_NAME),
            rank=args.process_index,
            # Ranks are at different data sets in one step: each judges and measures its own batches.
            world_size=1 if start.data_set else args.world_size,
        )
        super().__init__(adapter, start.resolved, facts, index)
        if facts.folder is not None and facts.rank == 0:
            facts.folder.mkdir(parents=True, exist_ok=True)
        self.write_record()

    def step_of(self, trainer: Any, model: Any, batch: dict[str, Any]) -> AbstractContextManager[None]:
        """Around the host's own step; what we put into the batch is taken out."""
        raise NotImplementedError

    def step_done(self, value: Tensor) -> None:
        """What the host's own step returned."""

    def samples_of(self, batch: dict[str, Any]) -> Tensor:
        """What :class:`Collator` put into a batch.

        Raises:
            SeamError: nothing.
        """
        samples = batch.pop(SAMPLES, None)
        if samples is None:
            raise SeamError(
                f"{self.adapter.title} {self.facts.host_version}: a batch came by another way than the trainer's own "
                "data loader, so its texts are not known"
            )
        return torch.as_tensor(samples)


def beginning(sample: Tensor) -> str:
    """How the caption of a sample begins, of :data:`SAMPLES`."""
    return bytes(sample[1:].tolist()).rstrip(b"\0").decode(errors="ignore")
