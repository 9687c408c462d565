"""AVION's conventions translated to the core: its scripts, classes, batch, schedule, loss signatures and progress line.

Imports without AVION and patches nothing; :mod:`mmts_plugins.patches.avion` calls it at the host's seams.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clusters import CAPTION, CLASS, ClusterTable
from ..config import FILE_NAME, LOG_NAME, Config, check_resume, record, resolve, write_record
from ..data.classes import counted, read_rows
from ..data.classes import load_classes as load_classes
from ..data.classes import load_table as load_table
from ..distributed import check_ranks_agree, first_on_node, gather_rows
from ..errors import ConfigError, SeamError, TableError, one_line, shown
from ..hits import HitGuard, judge
from ..live import Live, Meter
from ..lookup import TokenLookup
from ..losses import InfoNCELoss, MaxMarginLoss
from ..presets import INFONCE, MAX_MARGIN
from ..runtime import Runtime

FAMILY = MAX_MARGIN
PRETRAINING_FAMILY = INFONCE
DEFAULT_PRESETS = {INFONCE: "avion-clip", MAX_MARGIN: "avion-max-margin"}
# Every sample's class is known before the first step, so an unknown one can stop the run there.
DEFAULTS = {"distribution": "noun", "missing": "error", "cluster_of": "segment"}
PRETRAINING_DEFAULTS = {"cluster_of": "caption", "distribution": None}

_PAD = 0  # AVION's tokenizer fills up with zeros
_PROBED = 10_000  # captions of a data set that are looked up before training
_EPOCH = re.compile(r"Epoch: \[(\d+)\]")
_AUTHORS_LOSSES = {"mmts_clip": INFONCE, "mmts_max_margin": MAX_MARGIN}


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
    distribution = given.get("--use-distribution", DEFAULTS["distribution"])
    path = given.get(f"--mmts-{distribution.replace('_', '-')}-dist-path")
    return rest if path is None else [*rest, "--mmts-clusters", path]


class ToldSchedule(np.ndarray):
    """AVION's array of learning rates. It is indexed by the global iteration before each forward pass: the clock."""

    tell: Optional[Callable[[int], None]] = None

    @classmethod
    def of(cls, schedule: np.ndarray, tell: Callable[[int], None]) -> ToldSchedule:
        told = schedule.view(cls)
        told.tell = tell
        return told

    def __getitem__(self, index: Any) -> Any:
        if self.tell is not None and isinstance(index, (int, np.integer)):
            self.tell(int(index))
        return super().__getitem__(index)


class Run:
    """MM-TS in one AVION training run: made when its flags are taken, used at each seam.

    Args:
        flags: ours, from :func:`mmts_plugins.config.split_flags`.
        host_version: for messages and ``mmts.yaml``.
        pretraining: in ``main_lavila_pretrain.py``: InfoNCE on narrations, which have no classes.

    Raises:
        ConfigError, TableError: before anything is built or written.
    """

    def __init__(self, flags: dict[str, Any], host_version: str = "", pretraining: bool = False) -> None:
        family, defaults = (PRETRAINING_FAMILY, PRETRAINING_DEFAULTS) if pretraining else (FAMILY, DEFAULTS)
        self.config: Config = resolve(flags, family, DEFAULT_PRESETS, defaults)
        self.allow_change = bool(flags.get("mmts_allow_config_change"))
        self.host_version = host_version
        self.table: Optional[ClusterTable] = None
        if pretraining and (self.config.distribution is not None or self.config.cluster_of != "caption"):
            raise ConfigError(
                "pre-training has narrations and no classes: leave out --mmts-distribution and --mmts-cluster-of, and "
                "give a table of the narrations (--mmts-clusters)"
            )
        if self.config.clusters is not None and not self.config.no_shifts:
            self.table = load_table(self.config.clusters)
            if self.table.kind == CAPTION:
                if "mmts_distribution" in flags:
                    raise TableError(
                        f"{self.table.source}: a table of captions has no classes; leave --mmts-distribution out"
                    )
                self.config = replace(self.config, distribution=None)
            elif pretraining:
                raise TableError(f"{self.table.source}: a table of classes, but narrations of pre-training have none")
        self.lookup: Optional[TokenLookup] = None
        self.runtime: Optional[Runtime] = None
        self._args: Any = None
        self._losses: Optional[nn.Module] = None
        self.live: Optional[Live] = None
        self._meter = Meter()
        self._guard: Optional[HitGuard] = None
        self._shown: dict[str, float] = {}
        self._tokens: Optional[Tensor] = None
        # Without a learning rate schedule (--fix-lr) nobody tells the step, and forward passes are counted.
        self._counted_from: Optional[int] = None
        self._steps_per_epoch = 1
        self._step_told = False

    # -- once, before training --------------------------------------------------------------------------------------

    def begin(self, args: Any) -> None:
        """With AVION's parsed arguments, once its process group is up.

        Raises:
            ConfigError, TableError: an unsupported argument, or a metadata file whose classes cannot be counted.
        """
        self._args = args
        if getattr(args, "evaluate", False) and args.rank == 0:
            self._warn("--loss mmts changes nothing here: --evaluate trains nothing")
        if args.update_freq > 1:
            raise ConfigError(
                f"--update-freq {args.update_freq}: gradient accumulation is broken in AVION itself (its loop uses "
                "images before it has any); train with --update-freq 1 and a larger --batch-size or more GPUs"
            )
        if not self.config.no_shifts:
            if self.table is None:
                assert self.config.distribution is not None
                self.table = count_classes(args.train_metadata, self.config.distribution)
            if self.table.kind == CLASS and self.config.cluster_of == "caption":
                assert self.config.distribution is not None
                self.table = narrations(args.train_metadata, self.config.distribution, self.table)
        self.config.publish(args)

    def find(self, dataset: Any) -> Optional[np.ndarray]:
        """For each sample of a training data set (``samples``, ``tokenizer``, ``metadata``) the row of its own segment
        in the table, ``[n]`` int64; ``None`` where the drawn captions count, whose tokens :meth:`see` gets.

        Raises:
            TableError: too many samples that are not in the table.
        """
        if self.table is None:
            return None if self.config.cluster_of == "caption" else np.zeros(len(dataset.samples), dtype=np.int64)
        if self.config.cluster_of == "caption":
            self._look_up(dataset)
            return None
        if self.table.kind == CAPTION:
            what, keys = "caption", [str(sample[4]) for sample in dataset.samples]
        else:
            assert self.config.distribution is not None
            what = f"{self.config.distribution} class"
            keys = [_key(self.config.distribution, *sample[-2:]) for sample in dataset.samples]
        rows = self.table.rows_of(keys)
        self._judge(
            [keys[i] for i in np.flatnonzero(rows < 0)], len(keys), f"training samples of {dataset.metadata}", what
        )
        return np.where(rows < 0, len(self.table), rows)

    def _look_up(self, dataset: Any) -> None:
        """Index the table by the host's tokens, once, and try captions of this data set."""
        assert self.table is not None
        args = self._args
        if self.lookup is None:
            with first_on_node(args.gpu or 0, args.world_size > 1):
                self.lookup = TokenLookup(self.table, dataset.tokenizer, _PAD, _device(args))
            # Only some of many narrations are tried here; the batches tell of the others.
            self._guard = HitGuard(
                "drawn captions",
                self.table.source,
                self.config.missing,
                lambda row: _text(row, dataset.tokenizer),
                self._warn,
                _device(args),
                args.rank,
                args.world_size,
            )
        spread = np.unique(np.linspace(0, len(dataset.samples) - 1, _PROBED).astype(int))
        drawn = getattr(dataset, "metadata_sentence", None)
        captions = (
            [caption for i in spread for caption in _narrations_of(dataset.samples[i])]
            if drawn is None
            else [str(caption) for caption in drawn.iloc[:, 1]]
        )
        index = self.lookup(dataset.tokenizer(captions).to(_device(args)))
        absent = [captions[i] for i in torch.nonzero(index == self.lookup.missing).flatten().tolist()]
        self._judge(absent, len(captions), f"captions of {dataset.metadata}", "caption")

    def _judge(self, absent: Sequence[str], total: int, what: str, found_by: str) -> None:
        """Samples known before training, on every rank alike."""
        assert self.table is not None
        hint = "" if found_by == "caption" else " Or of another distribution (--mmts-distribution noun|verb|verb_noun)?"
        examples = sorted(set(absent))
        source, missing = self.table.source, self.config.missing
        warning = judge(len(absent), total, f"{total} {what}", source, missing, examples, found_by, hint)
        if warning is not None and self._args.rank == 0:
            self._warn(warning)

    @staticmethod
    def _warn(warning: str) -> None:
        print(f"MM-TS: warning: {one_line(warning)}", flush=True)

    def prepare(self, total_steps: int) -> None:
        """When the length of the run is known, before its first step: the last checks, the banner, ``mmts.yaml``.

        Raises:
            ConfigError: no step to train, ranks that differ, or a resumed run that differs.
            SeamError: AVION's arguments were never seen.
        """
        args = self._args
        if args is None:
            raise SeamError(f"AVION {self.host_version}: training starts without init_distributed_mode(args)")
        if total_steps < 1:
            raise ConfigError("the run has no optimizer step: lower --batch-size or raise --epochs")
        device = _device(args)
        values = record(
            self.config, total_steps, self.table.content_hash if self.table else None, "AVION", self.host_version
        )
        if args.world_size > 1:
            check_ranks_agree(values, args.rank, args.world_size, device)
        checkpoint = args.resume or os.path.join(args.output_dir, "checkpoint.pt")
        if os.path.isfile(checkpoint):
            check_resume(Path(checkpoint).parent / FILE_NAME, values, self.allow_change, self.table)
        frequencies = np.ones(1) if self.table is None else self.table.frequency
        if self.lookup is not None:
            frequencies = self.lookup.frequencies
        self.runtime = Runtime(self.config, self.table, frequencies, total_steps, device)
        path = Path(args.output_dir) / LOG_NAME
        self.live = Live(self.runtime, path=path, rank=args.rank, world_size=args.world_size)
        if args.rank != 0:
            return
        print(f"MM-TS: {self.runtime.describe()}")
        for warning in self.runtime.warnings():
            self._warn(warning)
        if getattr(args, "start_epoch", 0) >= args.epochs:
            self._warn(f"{args.start_epoch} of --epochs {args.epochs} are done: nothing is trained")
        if self.table is not None:
            what = f"{self.config.distribution} classes" if self.config.distribution else "clusters"
            keys = "classes" if self.table.kind == CLASS else "captions"
            print(
                f"MM-TS: {what} of {self.table.source}, by the {self.config.cluster_of}: {len(self.table)} {keys}, "
                f"frequency {self.table.frequency.min():g} to {self.table.frequency.max():g}, "
                f"hash {self.table.content_hash}",
                flush=True,
            )
        write_record(path.parent / FILE_NAME, values)

    # -- every epoch and step ---------------------------------------------------------------------------------------

    def meters(self, steps: int, meters: Sequence[Any], prefix: str) -> list[Any]:
        """Where AVION sets up its progress line: ours joins those of a training epoch of ``steps`` iterations."""
        epoch = _EPOCH.match(prefix)
        if epoch is None:
            return list(meters)
        if self.runtime is None or self._counted_from is not None:
            self._counted_from = steps * int(epoch[1])
            if self.runtime is None:
                self.prepare(steps * self._args.epochs)
        self._steps_per_epoch = steps
        return [*meters, _Meter(self)]

    def set_step(self, step: int) -> None:
        """AVION's global iteration, before its forward pass; it asks once for each parameter group."""
        assert self.runtime is not None
        self.runtime.step = step
        self._step_told = True

    def see(self, tokens: Tensor) -> None:
        """``[n, L]`` token ids of the captions that the model is given in a training step."""
        self._tokens = tokens

    def loss(
        self, host_loss: Any, image_features: Tensor, text_features: Tensor, rows: Optional[Tensor] = None
    ) -> Tensor:
        """The training loss.

        Args:
            host_loss: AVION's ``MaxMarginRankingLoss`` or ``ClipLoss``, for its distributed flags.
            image_features, text_features: ``[n, D]`` of this rank.
            rows: ``[n]`` int64 of :meth:`find`, carried by the batch; unused where the drawn captions count.

        Raises:
            SeamError: the step or the samples' rows did not arrive; plain training would go on unnoticed.
        """
        if self._counted_from is not None:
            self.set_step(self._counted_from)
            self._counted_from += 1
        if self.runtime is None or not self._step_told:
            raise SeamError(f"AVION {self.host_version}: a training step without its learning rate: no clock")
        self._step_told = False
        if self._losses is None:
            family = InfoNCELoss if self.config.loss == INFONCE else MaxMarginLoss
            self._losses = family(
                host_loss.local_loss, host_loss.gather_with_grad, host_loss.rank, host_loss.world_size
            )
        index = self._index(rows)
        shift = self.runtime.shift(index)
        temperature = self.runtime.base + shift
        # In float32 whatever AMP makes of them: InfoNCE expects normalised features.
        images, texts = (F.normalize(features.float(), dim=-1) for features in (image_features, text_features))
        self._show(images, texts, shift, index == self.runtime.missing)
        loss: Tensor = self._losses(images, texts, temperature)
        return loss

    def _show(self, images: Tensor, texts: Tensor, shift: Tensor, missed: Tensor) -> None:
        assert self.runtime is not None
        assert self.live is not None
        self.live.watch(images, texts, self.runtime.base + shift)
        if self._args.rank != 0:
            return
        self._meter.update(shift, missed)
        if self.runtime.step % self._steps_per_epoch % self._args.print_freq == 0:  # as AVION decides to print
            self._shown = self._meter.read(self.runtime)
            self.live.report(self._shown)

    def _index(self, rows: Optional[Tensor]) -> Tensor:
        """Of a batch's samples into the runtime's frequencies."""
        if self.config.cluster_of == "segment":
            if rows is None or rows.dtype != torch.int64:
                raise SeamError(f"AVION {self.host_version}: the batch does not carry the samples' classes")
            return rows
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            raise SeamError(f"AVION {self.host_version}: a training step whose captions the model was not given")
        if self.lookup is None:
            return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        index = self.lookup(tokens)
        assert self._guard is not None
        assert self.runtime is not None
        self._guard.see(index == self.lookup.missing, tokens)
        if (self.runtime.step + 1) % self._steps_per_epoch == 0:
            self._guard.conclude()
        return index

    def progress(self) -> str:
        """Ours of AVION's progress line: of the samples since the last one."""
        if self.runtime is None or not self._shown:
            return ""
        shown, name = self._shown, "margin" if self.config.loss == MAX_MARGIN else "tau"
        return (
            f"MM-TS {self.runtime.step}/{self.runtime.total_steps} {name} {shown['tau_mean']:.4f} "
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

    def __init__(self, run: Run) -> None:
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


# -- class distributions -----------------------------------------------------------------------------------------------


def _key(distribution: str, verb: int, noun: int) -> str:
    """As the authors name classes."""
    return {"verb": f"{verb}", "noun": f"{noun}", "verb_noun": f"{verb}_{noun}"}[distribution]


def _class(metadata: str, line: int, distribution: str, verb: str, noun: str) -> str:
    try:
        return _key(distribution, int(verb), int(noun))
    except ValueError as error:
        raise TableError(
            f"{metadata}, line {line}: verb_class {shown(verb)}, noun_class {shown(noun)}: not whole numbers"
        ) from error


def count_classes(metadata: str, distribution: str) -> ClusterTable:
    """The classes of an annotation file in EK-100's form, counted.

    Raises:
        TableError: it cannot be read, has no column ``verb_class`` or ``noun_class``, or one holds no whole number.
    """
    counts: Counter[str] = Counter()
    for line, *pair in read_rows(metadata, ("verb_class", "noun_class"), "an EK-100 annotation file"):
        counts[_class(metadata, line, distribution, *pair)] += 1
    return counted(counts, metadata)


def narrations(metadata: str, distribution: str, classes: ClusterTable) -> ClusterTable:
    """A table of the narrations of an annotation file: each as frequent as its class in ``classes``.

    A narration whose segments are of several classes counts as the commonest of its own.

    Raises:
        TableError: see :func:`count_classes`; or no narration's class is in ``classes``.
    """
    columns = ("narration", "verb_class", "noun_class")
    of: dict[str, Counter[str]] = {}
    for line, narration, *pair in read_rows(metadata, columns, "an EK-100 annotation file"):
        of.setdefault(narration, Counter())[_class(metadata, line, distribution, *pair)] += 1
    rows = classes.rows_of([seen.most_common(1)[0][0] for seen in of.values()])
    known = sorted((narration, row) for narration, row in zip(of, rows.tolist()) if row >= 0)
    if not known:
        raise TableError(f"{classes.source}: knows none of the {distribution} classes of {metadata}")
    keys, cluster = [narration for narration, _ in known], [row for _, row in known]
    count = [sum(of[key].values()) for key in keys]
    table = ClusterTable.build(keys, cluster, classes.frequency[cluster], count, CAPTION)
    return replace(table, source=classes.source)


def _narrations_of(sample: Sequence[Any]) -> list[str]:
    """Ego4D's samples hold one narration, or several to draw from."""
    return [str(text) for text in sample[3]] if isinstance(sample[3], list) else [str(sample[3])]
