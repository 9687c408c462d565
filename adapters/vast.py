"""VAST's conventions translated to the core: its batch, its step, its temperature, its loss signature, its log.

Imports without VAST and patches nothing; :mod:`mmts_plugins.patches.vast` calls it at the host's seams.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..clusters import CAPTION, ClusterTable
from ..config import FILE_NAME, LOG_NAME, Config, check_resume, record, resolve, write_record
from ..distributed import check_ranks_agree
from ..errors import ConfigError, SeamError, TableError
from ..functional import rank_info_nce
from ..hits import HitGuard, judge
from ..live import Live, Meter, step_line
from ..lookup import KeyLookup
from ..losses import MaxMarginLoss
from ..presets import INFONCE, MAX_MARGIN
from ..runtime import Runtime

FAMILY = INFONCE
DEFAULT_PRESETS = {INFONCE: "vast-clip", MAX_MARGIN: "vast-max-margin"}
DEFAULTS = {"key": "caption", "itm_temperature": None}  # None: what suits the loss, see _with_negatives
LABEL_SMOOTHING = 0.1
"""As VAST has it, in its own code."""

_TEMPERATURE = "contra_temp"
_LOG_EVERY = 50  # steps; where VAST's loop logs its losses


class Variant(NamedTuple):
    """What differs between VAST and the repositories derived from it.

    Attributes:
        name: as users write it.
        ids, captions: fields of an annotation; the first that is there holds the clip id, or the caption.
        first_caption: of a list of captions the host takes the first. Otherwise a clip can have only one.
        volumes: the loss compares volumes, not similarities of pairs: it can be scaled, but not recomputed.
    """

    name: str
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    first_caption: bool = False
    volumes: bool = False


VAST = Variant("VAST", ("video_id", "image_id", "image", "id"), ("desc", "caption"))
GRAM = Variant("GRAM", ("clip_id", *VAST.ids), (*VAST.captions, "vast_cap"), first_caption=True, volumes=True)


class Run:
    """MM-TS in one VAST training run: made when its flags are taken, used at each seam.

    Args:
        flags: ours, from :func:`mmts_plugins.config.split_flags`.
        variant: whose conventions.
        host_version: for messages and ``mmts.yaml``.

    Raises:
        ConfigError, TableError: before anything is built or written.
    """

    def __init__(self, flags: dict[str, Any], variant: Variant = VAST, host_version: str = "") -> None:
        config = resolve(flags, FAMILY, DEFAULT_PRESETS, DEFAULTS)
        self.config = _with_negatives(config, variant)
        self.variant = variant
        self.host_version = host_version
        self.allow_change = bool(flags.get("mmts_allow_config_change"))
        self.table: Optional[ClusterTable] = None
        self.lookup: Optional[KeyLookup] = None
        if self.config.clusters is not None and not self.config.no_shifts:
            self.table = _load(self.config.clusters, variant)
            self.lookup = KeyLookup(self.table)
        self.runtime: Optional[Runtime] = None
        self.live: Optional[Live] = None

    # -- once, before training --------------------------------------------------------------------------------------

    def prepare(self, model: Any, loaders: Mapping[str, Any], run_cfg: Any, first_step: int, log: Any) -> None:
        """Where VAST's training loop starts: the last checks, the banner, ``mmts.yaml`` beside ``hps.json``.

        Args:
            model: VAST's, perhaps inside DDP.
            loaders: from names ``task--data set`` to loaders.
            run_cfg: VAST's ``run_cfg``, for the number of steps and the output folder.
            first_step: above zero in a resumed run.
            log: VAST's logger; silent on all ranks but the first.

        Raises:
            ConfigError: nothing to schedule, ranks that differ, or a resumed run that differs.
            TableError: annotations whose captions the table does not know, or several captions for one clip.
        """
        total = run_cfg.num_train_steps
        if total < 1:
            raise ConfigError("the run has no optimizer step: lower --train_batch_size or raise --train_epoch")
        many = {name: _retrievals(name) for name in loaders}
        if many and not any(many.values()):
            raise ConfigError(f"no task of this run is retrieval (ret%...): {', '.join(many)}; leave --loss mmts out")
        self._log = log
        rank, world_size = dist.get_rank(), dist.get_world_size()
        device = next(model.parameters()).device
        self._guard: Optional[HitGuard] = None
        for name, loader in loaders.items():
            annotations = getattr(loader.dataset, "annos", None)
            if many[name] and isinstance(annotations, list):
                self._check_annotations(name, annotations)
            elif many[name] and self.table is not None:  # unknown before training: the batches tell
                self._guard = HitGuard(
                    "training samples",
                    self.table.source,
                    self.config.missing,
                    str,
                    self._warn,
                    device,
                    rank,
                    world_size,
                )
        table_hash = self.table.content_hash if self.table else None
        values = record(self.config, total, table_hash, self.variant.name, self.host_version)
        if world_size > 1:
            check_ranks_agree(values, rank, world_size, device)
        path = os.path.join(run_cfg.output_dir, "log", FILE_NAME)
        if first_step > 0:
            check_resume(path, values, self.allow_change, self.table)
        # On the CPU: captions are looked up there, and a step then waits for nothing.
        frequencies = np.ones(1) if self.lookup is None else self.lookup.frequencies
        self.runtime = Runtime(self.config, self.table, frequencies, total, torch.device("cpu"))
        self.runtime.step = first_step
        self._forwards = 0
        self._most_forwards = max(many.values(), default=1)
        self._every_step = all(many.values())
        self._meter = Meter()
        self.live = Live(self.runtime, path=Path(path).parent / LOG_NAME, rank=rank, world_size=world_size)
        self._log.info("MM-TS: %s", self.runtime.describe())
        for warning in self.runtime.warnings():
            self._warn(warning)
        if first_step >= total:
            self._warn(f"{first_step} of {total} steps are done: nothing is trained")
        if self.table is not None:
            self._log.info(
                "MM-TS: %s: %d %ss in %d clusters, %d samples, hash %s",
                self.table.source,
                len(self.table),
                self.config.key,
                len(self.table.sizes),
                self.table.count.sum(),
                self.table.content_hash,
            )
        if rank == 0:
            write_record(path, values)

    def _check_annotations(self, name: str, annotations: Sequence[Mapping[str, Any]]) -> None:
        """Every training annotation is known before the first step, and so is what the table lacks."""
        variant, keys = self.variant, []
        for annotation in annotations:
            clip = str(next((annotation[field] for field in variant.ids if field in annotation), "?"))
            caption = next((annotation[field] for field in variant.captions if field in annotation), "")
            if not isinstance(caption, str):
                caption = self._single(caption, f"{name}: clip {clip}")
            keys.append((caption, clip))
        if self.lookup is None:
            return
        assert self.table is not None
        column = 0 if self.config.key == "caption" else 1
        absent = [pair[column] for pair, index in zip(keys, self._find(keys, column)) if index == self.lookup.missing]
        hint = ""
        if len(absent) == len(keys) and (self._find(keys, 1 - column) != self.lookup.missing).any():
            other = "id" if column == 0 else "caption"
            hint = f" Its keys are {other}s: add --mmts-key {other}."
        what, table = f"{len(keys)} training samples of {name}", self.table.source
        examples, key = list(dict.fromkeys(absent)), self.config.key or "caption"
        warning = judge(len(absent), len(keys), what, table, self.config.missing, examples, key, hint)
        if warning is not None:
            self._warn(warning)

    def _warn(self, warning: str) -> None:
        self._log.warning("MM-TS: %s", warning)

    def _find(self, keys: Iterable[tuple[str, str]], column: int) -> np.ndarray:
        assert self.lookup is not None
        return self.lookup([pair[column] for pair in keys])

    def _single(self, captions: Sequence[str], where: str) -> str:
        if len(captions) == 1 or (captions and self.variant.first_caption):
            return captions[0]
        raise TableError(
            f"{where} has {len(captions)} captions, but {self.variant.name}'s training loss pairs a clip with one; "
            "write an annotation of its own for each caption"
        )

    # -- every step -------------------------------------------------------------------------------------------------

    def set_step(self, step: int) -> None:
        """VAST's global step as it computes the learning rate: after a forward pass, so it is the next one's.

        Raises:
            SeamError: the step that ends was plain training.
        """
        if self.runtime is None:
            raise SeamError(f"{self.variant.name} {self.host_version}: a learning rate before training began")
        if self._every_step and not self._forwards:
            raise SeamError(
                f"{self.variant.name} {self.host_version}: step {step} went by without forward_ret; plain training "
                "would go on unnoticed. See: mmts doctor"
            )
        if step % _LOG_EVERY == 0 or step == 1:
            self._report()
        if step >= self.runtime.total_steps and self._guard is not None:
            self._guard.conclude()
        self.runtime.step = step
        self._forwards = 0

    def forward_ret(self, host: Callable[..., dict[str, Tensor]], model: Any, batch: Any, task: str) -> dict[str, Any]:
        """VAST's training losses of one retrieval task, with a temperature (or margin) for every row.

        Args:
            host: VAST's own ``forward_ret``; it divides both similarity matrices by ``model.contra_temp``, and leaves
                the features in ``batch``.
            batch: its captions and clip ids, of this rank.
            task: ``ret%`` and subtasks, such as ``ret%tvas%tv``.

        Returns:
            The losses under VAST's own names; it sums whatever is there.

        Raises:
            SeamError: the step did not arrive, or the host returns something else.
            TableError: several captions for one clip, or captions that the table does not know.
        """
        if self.runtime is None or self._forwards >= self._most_forwards:
            raise SeamError(f"{self.variant.name} {self.host_version}: a training step without its number: no clock")
        self._forwards += 1
        temperature = self._temperatures(batch)
        losses = self._losses(host, model, batch, task, temperature)
        if not self.variant.volumes:  # of volumes there is no similarity of pairs to show
            assert self.live is not None
            self.live.watch(batch[f"feat_{task.split('%')[1][1:]}"], batch["feat_t"], temperature)
        return losses

    def _losses(
        self, host: Callable[..., dict[str, Tensor]], model: Any, batch: Any, task: str, temperature: Tensor
    ) -> dict[str, Any]:
        if self.config.itm_temperature == "mmts":
            # One temperature per row, for InfoNCE and for the draw of hard negatives alike. In the instance's own
            # dictionary it shadows the parameter, which stays what it is, in checkpoints too.
            device = next(model.parameters()).device
            vars(model)[_TEMPERATURE] = temperature.to(device, non_blocking=True).unsqueeze(1)
            try:
                return host(model, batch, task, compute_loss=True)
            finally:
                del vars(model)[_TEMPERATURE]
        losses = host(model, batch, task, compute_loss=True)
        if "loss_itc" not in losses:
            raise SeamError(f"{self.variant.name} {self.host_version}: no loss_itc among {', '.join(losses)}")
        losses["loss_itc"] = self._contrastive(batch, task, temperature)
        return losses

    def _contrastive(self, batch: Any, task: str, temperature: Tensor) -> Tensor:
        """``loss_itc`` anew, from the features that the host left in the batch: the mean over the subtasks."""
        texts, rank, world_size = batch["feat_t"], dist.get_rank(), dist.get_world_size()
        temperature = temperature.to(texts.device, non_blocking=True)
        losses = []
        for subtask in task.split("%")[1:]:
            clips = batch[f"feat_{subtask[1:]}"]
            if self.config.loss == MAX_MARGIN:
                loss = MaxMarginLoss(gather_with_grad=True, rank=rank, world_size=world_size)(clips, texts, temperature)
            else:  # as VAST has it on any number of ranks: own rows, no gradient through what they are compared with
                loss = rank_info_nce(
                    clips, texts, temperature, rank, world_size, local_loss=True, label_smoothing=LABEL_SMOOTHING
                )
            losses.append(loss)
        return torch.stack(losses).mean()

    def _temperatures(self, batch: Any) -> Tensor:
        """``[n]`` float32 of this rank's samples at the current step, Eq. 8."""
        assert self.runtime is not None
        captions = [c if isinstance(c, str) else self._single(c, "a clip of this batch") for c in batch["raw_captions"]]
        if self.lookup is None:
            index = np.zeros(len(captions), np.int64)
        else:
            keys = captions if self.config.key == "caption" else [str(clip) for clip in batch["ids"]]
            index = self.lookup(keys)
            if self._guard is not None:
                self._guard.see(torch.from_numpy(index == self.lookup.missing), keys)
        shift = self.runtime.shift(torch.from_numpy(index))
        self._meter.update(shift, torch.from_numpy(index == self.runtime.missing))
        return (shift + self.runtime.base).float()

    def _report(self) -> None:
        """A line where VAST logs its losses, and after the first step; on the samples since the last one."""
        runtime = self.runtime
        if runtime is None or not self._meter.samples:
            return
        assert self.live is not None
        values = self._meter.read(runtime)
        self.live.report(values)
        self._log.info("%s", step_line(runtime, values))


def _with_negatives(config: Config, variant: Variant) -> Config:
    """The configuration with its ``itm_temperature`` settled.

    Raises:
        ConfigError: a combination that has no meaning, or that this host cannot do.
    """
    if variant.volumes and config.loss == MAX_MARGIN:
        raise ConfigError(
            f"--loss mmts-max-margin: {variant.name}'s loss is InfoNCE over volumes of three and more vectors, which "
            "has no margin; use --loss mmts-infonce"
        )
    if variant.volumes and config.itm_temperature == "host":
        raise ConfigError(
            f"--mmts-itm-temperature host: {variant.name} draws its negatives from the scaled volumes themselves; "
            "leave the flag out"
        )
    if config.loss == MAX_MARGIN and config.itm_temperature == "mmts":
        raise ConfigError(
            "--mmts-itm-temperature mmts: max-margin has margins, not temperatures; hard negatives are drawn with the "
            "host's. Leave the flag out"
        )
    return replace(config, itm_temperature=config.itm_temperature or ("mmts" if config.loss == INFONCE else "host"))


def _load(path: str, variant: Variant) -> ClusterTable:
    table = ClusterTable.load(path)
    if table.kind != CAPTION:
        raise TableError(
            f"{path}: a table of class ids, but {variant.name}'s samples are found by caption or clip id; for classes "
            "make one with: mmts cluster ANNOTATIONS.json --label-column CLASS --column video_id, and add "
            "--mmts-key id"
        )
    return table


def _retrievals(name: str) -> int:
    """How many retrieval tasks VAST computes for a loader named ``task--data set``, tasks joined by ``_``."""
    return sum(task.startswith("ret") for task in name.split("--")[0].split("_"))
