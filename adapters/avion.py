"""AVION's conventions translated to the core: its classes, its batch, its schedule, its loss signature, its log.

Imports without AVION and patches nothing; :mod:`mmts_plugins.patches.avion` calls it at the host's seams.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clusters import CLASS, ClusterTable
from ..config import FILE_NAME, Config, check_resume, record, resolve, write_record
from ..distributed import check_ranks_agree
from ..errors import ConfigError, SeamError, TableError
from ..losses import InfoNCELoss, MaxMarginLoss
from ..presets import INFONCE, MAX_MARGIN
from ..runtime import Runtime

FAMILY = MAX_MARGIN
DEFAULT_PRESETS = {INFONCE: "avion-clip", MAX_MARGIN: "avion-max-margin"}
# Every sample's class is known before the first step, so an unknown one can stop the run there.
DEFAULTS = {"distribution": "noun", "missing": "error"}


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

    Raises:
        ConfigError, TableError: before anything is built or written.
    """

    def __init__(self, flags: dict[str, Any], host_version: str = "") -> None:
        self.config: Config = resolve(flags, FAMILY, DEFAULT_PRESETS, DEFAULTS)
        self.allow_change = bool(flags.get("mmts_allow_config_change"))
        self.host_version = host_version
        self.table: Optional[ClusterTable] = None
        if self.config.clusters is not None and not self.config.no_shifts:
            self.table = load_classes(self.config.clusters)
        self.runtime: Optional[Runtime] = None
        self._args: Any = None
        self._loss: Optional[nn.Module] = None
        self._step_told = False

    # -- once, before training --------------------------------------------------------------------------------------

    def begin(self, args: Any) -> None:
        """With AVION's parsed arguments, once its process group is up.

        Raises:
            ConfigError, TableError: an unsupported argument, or a metadata file whose classes cannot be counted.
        """
        self._args = args
        if args.update_freq > 1:
            raise ConfigError(
                f"--update-freq {args.update_freq}: gradient accumulation is broken in AVION itself (its loop uses "
                "images before it has any); train with --update-freq 1 and a larger --batch-size or more GPUs"
            )
        if self.table is None and not self.config.no_shifts:
            assert self.config.distribution is not None
            self.table = count_classes(args.train_metadata, self.config.distribution)
        self.config.publish(args)

    def tags(self, samples: Sequence[Any]) -> list[int]:
        """For each of AVION's training samples the index of its own segment's class in the table.

        Raises:
            TableError: classes that are not in the table, unless ``--mmts-missing`` says what they get.
        """
        if self.table is None:
            return [0] * len(samples)
        assert self.config.distribution is not None
        row = {key: index for index, key in enumerate(self.table.keys.to_pylist())}
        keys = [_key(self.config.distribution, *sample[-2:]) for sample in samples]
        absent = Counter(key for key in keys if key not in row)
        if absent and self.config.missing == "error":
            examples = ", ".join(sorted(absent)[:5])
            raise TableError(
                f"{sum(absent.values())} of {len(keys)} training samples are of {len(absent)} "
                f"{self.config.distribution} classes that {self.table.source} does not know, for example {examples}. "
                "Choose the table's own kind with --mmts-distribution noun|verb|verb_noun, or what an unknown class "
                "gets with --mmts-missing tail|mean"
            )
        return [row.get(key, len(row)) for key in keys]

    def prepare(self, total_steps: int) -> None:
        """When AVION makes its schedule, right before the first epoch: the last checks, the banner, ``mmts.yaml``.

        Raises:
            ConfigError: no step to train, ranks that differ, or a resumed run that differs.
            SeamError: AVION's arguments were never seen.
        """
        args = self._args
        if args is None:
            raise SeamError(f"AVION {self.host_version}: training starts without init_distributed_mode(args)")
        if total_steps < 1:
            raise ConfigError("the run has no optimizer step: lower --batch-size or raise --epochs")
        device = torch.device("cuda", args.gpu or 0) if torch.cuda.is_available() else torch.device("cpu")
        values = record(
            self.config, total_steps, self.table.content_hash if self.table else None, "AVION", self.host_version
        )
        if args.world_size > 1:
            check_ranks_agree(values, args.rank, args.world_size, device)
        checkpoint = args.resume or os.path.join(args.output_dir, "checkpoint.pt")
        if os.path.isfile(checkpoint):
            check_resume(Path(checkpoint).parent / FILE_NAME, values, self.allow_change)
        frequencies = np.ones(1) if self.table is None else self.table.frequency
        self.runtime = Runtime(self.config, self.table, frequencies, total_steps, device)
        if args.rank != 0:
            return
        print(f"MM-TS: {self.runtime.describe()}")
        if self.table is not None:
            print(
                f"MM-TS: {self.config.distribution} classes of {self.table.source}: {len(self.table)} classes of "
                f"{self.table.frequency.min():g} to {self.table.frequency.max():g} samples, "
                f"hash {self.table.content_hash}",
                flush=True,
            )
        write_record(os.path.join(args.output_dir, FILE_NAME), values)

    # -- every step -------------------------------------------------------------------------------------------------

    def set_step(self, step: int) -> None:
        """AVION's global iteration, before its forward pass; it asks once for each parameter group."""
        assert self.runtime is not None
        self.runtime.step = step
        self._step_told = True

    def loss(self, host_loss: Any, image_features: Tensor, text_features: Tensor, tags: Tensor) -> dict[str, Tensor]:
        """The training loss, under the names that AVION's meters expect.

        Args:
            host_loss: AVION's ``MaxMarginRankingLoss``, for its distributed flags.
            image_features, text_features: ``[n, D]`` of this rank.
            tags: ``[n]`` int64 from :meth:`tags`, carried by the batch in the place of the relevancies.

        Raises:
            SeamError: the step or the tags did not arrive; plain training would go on unnoticed.
        """
        if self.runtime is None or not self._step_told:
            raise SeamError(f"AVION {self.host_version}: a training step without its learning rate: no clock")
        if tags is None or tags.dtype != torch.int64:
            raise SeamError(f"AVION {self.host_version}: the batch does not carry the samples' classes")
        self._step_told = False
        if self._loss is None:
            family = InfoNCELoss if self.config.loss == INFONCE else MaxMarginLoss
            self._loss = family(host_loss.local_loss, host_loss.gather_with_grad, host_loss.rank, host_loss.world_size)
        margin = self.runtime.base + self.runtime.shift(tags)
        # In float32 whatever AMP makes of the features: InfoNCE expects them normalised.
        images, texts = (F.normalize(features.float(), dim=-1) for features in (image_features, text_features))
        loss = self._loss(images, texts, margin)
        self._report(margin)
        return {"loss": loss, "max_margin_loss": loss.detach()}

    def _report(self, margin: Tensor) -> None:
        """A line where AVION prints its own."""
        assert self.runtime is not None
        args, runtime = self._args, self.runtime
        steps_per_epoch = max(1, runtime.total_steps // args.epochs)
        if args.rank != 0 or runtime.step % steps_per_epoch % args.print_freq != 0:
            return
        mean, low, high = torch.stack([margin.mean(), margin.min(), margin.max()]).tolist()
        print(
            f"MM-TS step {runtime.step}/{runtime.total_steps}: base {runtime.base:+.4f}, mean {mean:.4f} "
            f"[{low:.4f}, {high:.4f}], head {runtime.base + runtime.head_shift:.4f}, "
            f"tail {runtime.base + runtime.tail_shift:.4f}, phase {runtime.schedule.phase(runtime.step):.2f}"
        )


# -- class distributions -----------------------------------------------------------------------------------------------


def _key(distribution: str, verb: int, noun: int) -> str:
    """As the authors name classes."""
    return {"verb": f"{verb}", "noun": f"{noun}", "verb_noun": f"{verb}_{noun}"}[distribution]


def count_classes(metadata: str, distribution: str) -> ClusterTable:
    """The classes of an annotation file in EK-100's form, counted.

    Raises:
        TableError: it cannot be read, has no column ``verb_class`` or ``noun_class``, or one holds no whole number.
    """
    counts: Counter[str] = Counter()
    for line, verb, noun in _read(metadata, ("verb_class", "noun_class"), "an EK-100 annotation file"):
        try:
            counts[_key(distribution, int(verb), int(noun))] += 1
        except ValueError as error:
            raise TableError(f"{metadata}, line {line}: verb_class {verb!r}, noun_class {noun!r}: {error}") from error
    return _table(counts, metadata)


def load_classes(path: str) -> ClusterTable:
    """A cluster table of classes, or ``class_id,count`` CSV as the authors publish.

    Raises:
        TableError: it cannot be read, or is a table of captions.
    """
    if not path.endswith(".csv"):
        table = ClusterTable.load(path)
        if table.kind != CLASS:
            raise TableError(
                f"{path}: a table of {table.kind}s, but AVION's samples are found by class; leave --mmts-clusters out "
                "to count the classes of --train-metadata, or give a class_id,count CSV"
            )
        return table
    counts: dict[str, float] = {}
    for line, key, count in _read(path, ("class_id", "count"), "a distribution of classes"):
        if key in counts:
            raise TableError(f"{path}, line {line}: class {key} occurs twice")
        try:
            counts[key] = int(count)
        except ValueError as error:
            raise TableError(f"{path}, line {line}: the count of class {key} is {count!r}") from error
    return _table(counts, path)


def _table(counts: dict[str, Any], source: str) -> ClusterTable:
    keys = sorted(counts)  # so that the same counts have the same hash, wherever they come from
    sizes = [counts[key] for key in keys]
    if not keys:
        raise TableError(f"{source}: no rows")
    if min(sizes) < 1:
        raise TableError(f"{source}: class {keys[int(np.argmin(sizes))]} has the count {min(sizes)}")
    return replace(ClusterTable.build(keys, range(len(keys)), sizes, sizes, CLASS), source=source)


def _read(path: str, columns: tuple[str, str], what: str) -> Iterator[tuple[int, str, str]]:
    """Line number and the two columns of every row."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows: Iterable[dict[str, Any]] = csv.DictReader(file)
            names = rows.fieldnames or []  # type: ignore[attr-defined]
            lacking = [column for column in columns if column not in names]
            if lacking:
                raise TableError(
                    f"{path}: not {what}: column {lacking[0]!r} is missing (found: {', '.join(names[:8])})"
                )
            for row in rows:
                yield rows.line_num, row[columns[0]] or "", row[columns[1]] or ""  # type: ignore[attr-defined]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"{path}: cannot be read as {what}: {error}") from error
