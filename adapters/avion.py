"""AVION's conventions translated to the core: its scripts, classes, batch, schedule, loss signatures and progress line.

Imports without AVION and patches nothing; :mod:`mmts_plugins.patches.avion` calls it at the host's seams.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..data.classes import load_classes
from ..distributed import first_on_node, gather_rows
from ..errors import ConfigError, SeamError, TableError, one_line
from ..fields import TEXT, Field
from ..hits import judge_known
from ..hosts.adapter import Adapter
from ..hosts.logs import HostLog, RunFolder, is_number
from ..hosts.session import Facts, Index, Session
from ..options import Option
from ..presets import Preset
from ..record import FILE_NAME
from ..tables import CAPTION, CLASS, ClusterTable, Table, open_table
from ..tables.index import KeyLookup, TokenLookup
from .ek100 import DISTRIBUTIONS, count_classes, key_of, narrations

SEGMENT, DRAWN = "segment", "caption"

_PAD = 0  # AVION's tokenizer fills up with zeros
_PROBED = 10_000  # captions of a data set that are looked up before training
_EPOCH = re.compile(r"Epoch: \[(\d+)\]")
_AUTHORS_LOSSES = {"mmts_clip": "mmts-infonce", "mmts_max_margin": "mmts-max-margin"}


class Avion(Adapter):
    """Fine-tuning for retrieval on EK-100: ``main_lavila_finetune_mir.py``."""

    name = "avion"
    title = "AVION"
    loss = "mmts-max-margin"
    presets: ClassVar[Mapping[str, Preset]] = {
        "avion-max-margin": Preset("mmts-max-margin", 0.20, 0.17, 0.30),
        "avion-clip": Preset("mmts-infonce", 0.08, 0.05, 0.20),
    }
    options = (
        Option(
            "distribution",
            Field(TEXT, null=True, choices=DISTRIBUTIONS),
            "the class whose count is a sample's frequency (default: noun); without --mmts-clusters it is counted in "
            "--train-metadata",
        ),
        Option(
            "cluster_of",
            Field(TEXT, null=True, choices=(SEGMENT, DRAWN)),
            "whose frequency a sample has: the video's own segment (default in fine-tuning) or the caption drawn for "
            "it (always in pre-training)",
        ),
    )
    # Every sample's class is known before the first step, so an unknown one can stop the run there.
    defaults: ClassVar[Mapping[str, Any]] = {"distribution": "noun", "missing": "error", "cluster_of": SEGMENT}
    counted_in = "--train-metadata"
    log_files = ("log.txt",)

    def open_table(self, path: str) -> Table:
        """Captions or classes; classes also as ``class_id,count`` CSV, as the authors publish them."""
        return load_table(path)

    def fit(self, config: Config, table: Table, flags: Mapping[str, Any]) -> Config:
        if table.kind != CAPTION:
            return config
        if flags.get("mmts_distribution") is not None:
            raise TableError(f"{table.source}: a table of captions has no classes; leave --mmts-distribution out")
        return replace(config, own={**config.own, "distribution": None})

    def counts(self, config: Config) -> bool:
        return config.own["distribution"] is not None

    def count(self, config: Config, table: Optional[Table], path: str) -> Optional[Table]:
        """Classes of EK-100's annotation file; where the drawn caption counts, narrations by their classes."""
        distribution = config.own["distribution"]
        if table is None:
            table = count_classes(path, distribution)
        if table.kind == CLASS and config.own["cluster_of"] == DRAWN:
            if not isinstance(table, ClusterTable):
                raise TableError(f"{table.source}: {len(table):,} classes are more than narrations can be looked up in")
            table = narrations(path, distribution, table)
        return table

    def classes_in(self, path: str, columns: Sequence[str]) -> dict[str, Callable[[], ClusterTable]]:
        if not {"verb_class", "noun_class"} <= set(columns):
            return {}
        return {kind: partial(count_classes, path, kind) for kind in DISTRIBUTIONS}

    def read_log(self, run: RunFolder) -> HostLog:
        """``log.txt``: one line of JSON for each epoch."""
        found = run.objects("log.txt")
        epochs = [line for line in found if is_number(line.get("epoch")) and line["epoch"] >= 0]
        last = max((line["epoch"] for line in epochs), default=0) + 1
        known = [(line["epoch"], line["train_loss"]) for line in epochs if is_number(line.get("train_loss"))]
        losses = [[100 * (epoch + 1) / last, loss] for epoch, loss in known]
        tested = found[-1].items() if found else ()
        scores = [(name, value, "log.txt") for name, value in tested if name.startswith("test_")]
        return HostLog({"loss": np.array(losses, np.float64)} if losses else {}, {}, scores)


class AvionPretraining(Avion):
    """Pre-training on narrations, which have no classes: ``main_lavila_pretrain.py``."""

    name = "avion-pretraining"
    loss = "mmts-infonce"
    defaults: ClassVar[Mapping[str, Any]] = {"cluster_of": DRAWN, "distribution": None}
    counted_in = ""

    def open_table(self, path: str) -> Table:
        table = load_table(path)
        if table.kind != CAPTION:
            raise TableError(f"{table.source}: a table of classes, but narrations of pre-training have none")
        return table

    def settle(self, config: Config) -> Config:
        if config.own["distribution"] is not None or config.own["cluster_of"] != DRAWN:
            raise ConfigError(
                "pre-training has narrations and no classes: leave out --mmts-distribution and --mmts-cluster-of, and "
                "give a table of the narrations (--mmts-clusters)"
            )
        return config


FINETUNING, PRETRAINING = Avion(), AvionPretraining()


def authors_flags(argv: Sequence[str]) -> list[str]:
    """A command line with the flags of the MM-TS authors' fork of AVION, in our names where they differ.

    ``--loss-type``, ``--use-distribution`` and, for the distribution that is used, ``--mmts-<distribution>-dist-path``.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, has_value, value = word.partition("=")
        if name in ("--loss-type", "--use-distribution") or re.fullmatch(r"--mmts-[a-z-]+-dist-path", name):
            given[name] = value if has_value else next(words, "")
        else:
            rest.append(word)
    if "--loss-type" in given:
        loss = given["--loss-type"]
        if loss not in _AUTHORS_LOSSES:
            raise ConfigError(f"--loss-type {loss}: without our --mmts-* flags AVION trains its own loss; drop them")
        rest += ["--loss", _AUTHORS_LOSSES[loss]]
    if "--use-distribution" in given:
        rest += ["--mmts-distribution", given["--use-distribution"]]
    distribution = given.get("--use-distribution", FINETUNING.defaults["distribution"])
    path = given.get(f"--mmts-{distribution.replace('_', '-')}-dist-path")
    return rest if path is None else [*rest, "--mmts-clusters", path]


class ClockSchedule(np.ndarray):
    """AVION's array of learning rates. It is indexed by the global iteration before each forward pass: the clock."""

    on_step: Optional[Callable[[int], None]] = None

    @classmethod
    def of(cls, schedule: np.ndarray, on_step: Callable[[int], None]) -> ClockSchedule:
        clock = schedule.view(cls)
        clock.on_step = on_step
        return clock

    def __getitem__(self, index: Any) -> Any:
        if self.on_step is not None and isinstance(index, (int, np.integer)):
            self.on_step(int(index))
        return super().__getitem__(index)


@dataclass(frozen=True)
class Samples:
    """How the samples of the training data set are found.

    Attributes:
        index: in the table.
        text: makes an example of a drawn caption's tokens.
    """

    index: Index
    text: Callable[[Any], str] = str


class _Carried:
    """Of samples whose own index was found before the first step, and travels in the batch."""

    def __init__(self, frequencies: np.ndarray) -> None:
        self.frequencies = frequencies

    def __call__(self, samples: Tensor) -> Tensor:
        return samples


class Job:
    """A job of AVION from its flags until training starts: AVION tells what a run is piece by piece.

    Args:
        adapter: fine-tuning or pre-training.
        flags: ours.
        host_version: for messages and ``mmts.yaml``.

    Raises:
        ConfigError, TableError: before anything is built or written.
    """

    def __init__(self, adapter: Adapter, flags: Mapping[str, Any], host_version: str = "") -> None:
        self.adapter, self.host_version = adapter, host_version
        self.resolved = adapter.resolve(flags)
        self.args: Any = None
        self.samples: Optional[Samples] = None
        self.run: Optional[AVIONSession] = None

    def begin(self, args: Any) -> None:
        """With AVION's parsed arguments, once its process group is up.

        Raises:
            ConfigError, TableError: an unsupported argument, or a metadata file whose classes cannot be counted.
        """
        self.args = args
        if getattr(args, "evaluate", False):
            self._warn("--loss mmts changes nothing here: --evaluate trains nothing")
        if args.update_freq > 1:
            raise ConfigError(
                f"--update-freq {args.update_freq}: gradient accumulation is broken in AVION itself (its loop uses "
                "images before it has any); train with --update-freq 1 and a larger --batch-size or more GPUs"
            )
        config = self.resolved.config
        if self.adapter.counted_in and config.reads_table:
            table = self.adapter.count(config, self.resolved.table, args.train_metadata)
            self.resolved = replace(self.resolved, table=table)
        config.publish(args)

    def find(self, dataset: Any) -> Optional[np.ndarray]:
        """For each sample of a training data set (``samples``, ``tokenizer``, ``metadata``) the index of its own
        segment, ``[n]`` int64; ``None`` where the drawn captions count.

        Raises:
            TableError: too many samples that are not in the table.
        """
        config, table = self.resolved.config, self.resolved.shifted
        segment = config.own["cluster_of"] == SEGMENT
        if table is None:
            return np.zeros(len(dataset.samples), dtype=np.int64) if segment else None
        if not segment:
            self._try_captions(dataset, table)
            return None
        distribution = config.own["distribution"]
        if table.kind == CAPTION:
            what, keys = "caption", [str(sample[4]) for sample in dataset.samples]
        else:
            what, keys = f"{distribution} class", [key_of(distribution, *sample[-2:]) for sample in dataset.samples]
        lookup = KeyLookup(table)
        rows = lookup(keys)
        absent = [keys[i] for i in np.flatnonzero(rows == lookup.missing)]
        self._judge(table, absent, len(keys), f"training samples of {dataset.metadata}", what)
        self.samples = Samples(_Carried(lookup.frequencies))
        return rows

    def _try_captions(self, dataset: Any, table: Table) -> None:
        """Index the table by the host's tokens, once, and try captions of this data set."""
        args = self.args
        if self.samples is None:
            with first_on_node(args.gpu or 0, args.world_size > 1):
                made = TokenLookup(table, dataset.tokenizer, _PAD, _device(args))
            self.samples = Samples(made, lambda row: _text(row, dataset.tokenizer))
        lookup = self.samples.index
        # Only some of many narrations are tried here; the batches tell of the others.
        spread = np.unique(np.linspace(0, len(dataset.samples) - 1, _PROBED).astype(int))
        drawn = getattr(dataset, "metadata_sentence", None)
        captions = (
            [caption for i in spread for caption in _narrations_of(dataset.samples[i])]
            if drawn is None
            else [str(caption) for caption in drawn.iloc[:, 1]]
        )
        index = torch.as_tensor(lookup(dataset.tokenizer(captions).to(_device(args))))
        absent = [captions[i] for i in torch.nonzero(index == len(lookup.frequencies)).flatten().tolist()]
        self._judge(table, absent, len(captions), f"captions of {dataset.metadata}", "caption")

    def _judge(self, table: Table, absent: Sequence[str], total: int, what: str, found_by: str) -> None:
        """Samples known before training, on every rank alike."""
        hint = "" if found_by == "caption" else " Or of another distribution (--mmts-distribution noun|verb|verb_noun)?"
        missing = self.resolved.config.missing
        warning = judge_known(sorted(absent), total, what, table.source, missing, found_by, hint)
        if warning is not None:
            self._warn(warning)

    def _warn(self, warning: str) -> None:
        if self.args.rank == 0:
            print(f"MM-TS: warning: {one_line(warning)}", flush=True)

    def start(self, total_steps: int) -> AVIONSession:
        """When the length of the run is known, before its first step.

        Raises:
            ConfigError: no step to train, ranks that differ, or a resumed run that differs.
            SeamError: AVION's arguments were never seen.
        """
        if self.args is None:
            raise SeamError(f"AVION {self.host_version}: training starts without init_distributed_mode(args)")
        self.run = AVIONSession(self, total_steps)
        return self.run

    def meters(self, steps: int, meters: Sequence[Any], prefix: str) -> list[Any]:
        """Where AVION sets up its progress line: ours joins those of a training epoch of ``steps`` iterations."""
        epoch = _EPOCH.match(prefix)
        if epoch is None:
            return list(meters)
        counted = self.run is None or self.run.is_counted
        run = self.run or self.start(steps * self.args.epochs)
        run.begin_epoch(int(epoch[1]), steps, counted)
        return [*meters, _Meter(run)]


class AVIONSession(Session):
    """MM-TS in one AVION training run."""

    losses_per_step = 1

    def __init__(self, job: Job, total_steps: int) -> None:
        args, samples = job.args, job.samples
        checkpoint = args.resume or os.path.join(args.output_dir, "checkpoint.pt")
        start_epoch = getattr(args, "start_epoch", 0)
        facts = Facts(
            total_steps=total_steps,
            device=_device(args),
            host_version=job.host_version,
            folder=Path(args.output_dir),
            resumed=str(Path(checkpoint).parent / FILE_NAME) if os.path.isfile(checkpoint) else None,
            done=f"{start_epoch} of --epochs {args.epochs} are done" if start_epoch >= args.epochs else "",
            longer="lower --batch-size or raise --epochs",
            rank=args.rank,
            world_size=args.world_size,
        )

        def seen(table: Table) -> Index:
            if samples is None:
                raise SeamError(
                    f"AVION {job.host_version}: training starts, but its training data were never seen by us"
                )
            return samples.index

        super().__init__(job.adapter, job.resolved, facts, seen)
        self._args = args
        self._segment = self.config.own["cluster_of"] == SEGMENT
        if samples is not None and not self._segment:
            self.judge_batches("drawn captions", samples.text)
        self._tokens: Optional[Tensor] = None
        self._shown: dict[str, float] = {}
        # Without a learning rate schedule (--fix-lr) nobody tells the step, and forward passes are counted.
        self._counted_from: Optional[int] = None
        self._steps_per_epoch = 1
        self.write_record()

    def describe_table(self, table: Table) -> str:
        distribution = self.config.own["distribution"]
        what = f"{distribution} classes" if distribution else "clusters"
        keys = "classes" if table.kind == CLASS else "captions"
        return (
            f"{what} of {table.source}, by the {self.config.own['cluster_of']}: {len(table)} {keys}, frequency "
            f"{table.summary.low:g} to {table.summary.high:g}, hash {table.content_hash}"
        )

    # -- every epoch and step ---------------------------------------------------------------------------------------

    @property
    def is_counted(self) -> bool:
        """Whether steps are counted here, for want of a schedule that tells them."""
        return self._counted_from is not None

    def begin_epoch(self, epoch: int, steps: int, counted: bool) -> None:
        """An epoch of ``steps`` iterations; under ``counted`` nobody will tell them."""
        self._steps_per_epoch = steps
        if counted:
            self._counted_from = steps * epoch

    def take_tokens(self, tokens: Tensor) -> None:
        """``[n, L]`` token ids of the captions that the model is given in a training step."""
        self._tokens = tokens

    def loss_of_batch(
        self, host_loss: Any, image_features: Tensor, text_features: Tensor, rows: Optional[Tensor] = None
    ) -> Tensor:
        """The training loss.

        Args:
            host_loss: AVION's ``MaxMarginRankingLoss`` or ``ClipLoss``, for its distributed flags.
            image_features, text_features: ``[n, D]`` of this rank.
            rows: ``[n]`` int64 of :meth:`Job.find`, carried by the batch; unused where the drawn captions count.

        Raises:
            SeamError: the step or the samples' rows did not arrive; plain training would go on unnoticed.
        """
        if self._counted_from is not None:
            self.at_step(self._counted_from)
            self._counted_from += 1
        temperature = self.temperatures(self._samples(rows))
        if (self.step + 1) % self._steps_per_epoch == 0:
            self.judge_now()
        # In float32 whatever AMP makes of them: InfoNCE expects normalised features.
        images, texts = (F.normalize(features.float(), dim=-1) for features in (image_features, text_features))
        flags = {"local_loss": host_loss.local_loss, "gather_with_grad": host_loss.gather_with_grad}
        loss = self.loss(images, texts, temperature, **flags)
        if self.facts.rank == 0 and self.step % self._steps_per_epoch % self._args.print_freq == 0:  # as AVION prints
            self._shown = self.report(line=False)
        return loss

    def _samples(self, rows: Optional[Tensor]) -> Tensor:
        if self._segment:
            if rows is None or rows.dtype != torch.int64:
                raise SeamError(f"AVION {self.facts.host_version}: the batch does not carry the samples' classes")
            return rows
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            raise SeamError(f"AVION {self.facts.host_version}: a training step whose captions the model was not given")
        return tokens

    def progress(self) -> str:
        """Ours of AVION's progress line: of the samples since the last one."""
        if not self._shown:
            return ""
        shown, name = self._shown, "margin" if self.config.kind.is_margin else "tau"
        return (
            f"MM-TS {self.step}/{self.facts.total_steps} {name} {shown['tau_mean']:.4f} "
            f"[{shown['tau_min']:.4f}, {shown['tau_max']:.4f}] base {shown['tau_base']:+.4f} "
            f"head {shown['tau_head']:.4f} tail {shown['tau_tail']:.4f}"
        )


def _text(row: Tensor, tokenizer: Any) -> str:
    """A row of token ids as a caption again: AVION's ``tokenize`` keeps its words in its own module."""
    ids = [number for number in row.tolist() if number != _PAD]
    words: Any = getattr(getattr(tokenizer, "func", tokenizer), "__globals__", {}).get("_tokenizer")
    try:
        return str(words.decode(ids[1:-1])).strip()
    except Exception:  # another tokenizer: the message must not fail over its example
        return f"tokens {ids}"


def _device(args: Any) -> torch.device:
    return torch.device("cuda", args.gpu or 0) if torch.cuda.is_available() else torch.device("cpu")


class _Meter:
    """What AVION's ``ProgressMeter`` asks of a meter."""

    def __init__(self, run: AVIONSession) -> None:
        self._run = run

    def __str__(self) -> str:
        return self._run.progress()

    def synchronize(self) -> None:
        """Nothing to average: every rank is at the same step."""


@torch.no_grad()
def batch_accuracy(image_features: Tensor, text_features: Tensor, rank: int, world_size: int) -> Tensor:
    """AVION's ``clip_acc`` in percent: how many of this rank's images ``[n, D]`` have their own text nearest of all
    ``N = n * world_size``. One temperature per row moves no maximum. Memory ``O(n D + block N)``."""
    texts = text_features if world_size == 1 else gather_rows(text_features, world_size)
    nearest = torch.cat([(block @ texts.T).argmax(1) for block in image_features.split(256)])
    own = torch.arange(len(nearest), device=nearest.device) + rank * len(nearest)
    return 100 * (nearest == own).float().mean()


def _narrations_of(sample: Sequence[Any]) -> list[str]:
    """Ego4D's samples hold one narration, or several to draw from."""
    return [str(text) for text in sample[3]] if isinstance(sample[3], list) else [str(sample[3])]


def load_table(path: str) -> Table:
    """A cluster table, or classes as ``class_id,count`` CSV, as the authors publish them.

    Raises:
        TableError: it cannot be read.
    """
    return load_classes(path) if path.endswith(".csv") else open_table(path)
