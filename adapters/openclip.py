"""OpenCLIP's conventions translated to the core: its flags, its batch, its loss signature, its logs.

Imports without OpenCLIP and patches nothing; :mod:`mmts_plugins.patches.openclip` calls it at the host's seams.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor, nn

from ..clusters import CAPTION, ClusterTable
from ..config import FILE_NAME, LOG_NAME, Config, check_resume, record, resolve, write_record
from ..distributed import check_ranks_agree, first_on_node
from ..errors import ConfigError, SeamError, TableError
from ..functional import compiling
from ..large import LargeTable, open_table
from ..live import Live, Meter, step_line
from ..lookup import TokenLookup
from ..losses import InfoNCELoss, MaxMarginLoss
from ..presets import INFONCE, MAX_MARGIN
from ..runtime import Runtime

logger = logging.getLogger(__name__)

FAMILY = INFONCE
DEFAULT_PRESETS = {INFONCE: "clip-cc3m", MAX_MARGIN: "avion-max-margin"}
TEMPERATURE_KEY = "mmts_temperature"
_WATCHED_BATCHES = 8
_ENOUGH_SAMPLES = 64


class ScheduledLoss(nn.Module):
    """What replaces OpenCLIP's ``ClipLoss`` or ``CoCaLoss``: the same call, with a temperature for every sample.

    Args:
        kind: ``mmts-infonce`` or ``mmts-max-margin``.
        host_loss: the loss that OpenCLIP made. A CoCa loss still computes its caption loss.
        watch: given features and temperatures of every training step that is not compiled.
        on_call: called in every forward, so that a training step without us in its path is noticed.
    """

    def __init__(
        self,
        kind: str,
        host_loss: Any,
        watch: Callable[[Tensor, Tensor, Tensor], None],
        on_call: Optional[Callable[[], None]] = None,
    ) -> None:
        super().__init__()
        family = InfoNCELoss if kind == INFONCE else MaxMarginLoss
        self.contrastive = family(
            host_loss.local_loss, host_loss.gather_with_grad, host_loss.rank, host_loss.world_size
        )
        self.captioning = host_loss if hasattr(host_loss, "caption_loss") else None
        self.weight = 1.0
        if self.captioning is not None:
            self.weight, self.captioning.clip_loss_weight = self.captioning.clip_loss_weight, 0
        self.temperature: Optional[Tensor] = None
        self._watch, self._on_call = watch, on_call

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Optional[Tensor] = None,
        mmts_temperature: Optional[Tensor] = None,
        output_dict: bool = False,
        **captioning: Tensor,
    ) -> Any:
        """Features ``[n, D]``; ``mmts_temperature`` ``[n]``, or :attr:`temperature` where the host passes none on."""
        temperature = self.temperature if mmts_temperature is None else mmts_temperature
        if temperature is None:
            raise SeamError("OpenCLIP called the MM-TS loss without temperatures: the model's output was not tagged")
        if self._on_call is not None:
            self._on_call()
        if torch.is_grad_enabled() and not compiling():
            self._watch(image_features, text_features, temperature)
        loss = self.weight * self.contrastive(image_features, text_features, temperature)
        # DDP expects a gradient for every parameter: the unused scale and bias stay in the graph, with zero.
        for unused in (logit_scale, logit_bias):
            if unused is not None:
                loss = loss + 0.0 * unused.sum()
        if self.captioning is None:
            return {"contrastive_loss": loss} if output_dict else loss
        losses = self.captioning(image_features, text_features, logit_scale=logit_scale, output_dict=True, **captioning)
        losses["contrastive_loss"] = loss
        return losses if output_dict else (loss, losses["caption_loss"])


class Run:
    """MM-TS in one OpenCLIP training run: made when its arguments are parsed, used at each seam.

    Args:
        flags: ours, from :func:`mmts_plugins.config.split_flags`.
        args: OpenCLIP's own parsed arguments; gets our settings as plain values, for ``params.txt`` and W&B.

    Raises:
        ConfigError, TableError: before anything is built or written.
    """

    def __init__(self, flags: dict[str, Any], args: Any) -> None:
        self.config: Config = resolve(flags, FAMILY, DEFAULT_PRESETS)
        self.allow_change = bool(flags.get("mmts_allow_config_change"))
        _refuse_unsupported(args)
        self.table: Union[ClusterTable, LargeTable, None] = None
        if self.config.clusters is not None:
            self.table = open_table(self.config.clusters)
            if self.table.kind != CAPTION:
                raise TableError(
                    f"{self.table.source}: a table of class ids, but OpenCLIP's samples are found by caption; make one "
                    "of captions (mmts cluster CAPTIONS --column title, with --label-column for class labels)"
                )
        self.config.publish(args)
        self.runtime: Optional[Runtime] = None
        self.live: Optional[Live] = None
        self.lookup: Optional[TokenLookup] = None
        self.tokenizer: Any = None
        self.host_version = ""
        self._meter = Meter()
        self._watched = 0
        self._awaiting_loss = False

    # -- once, before training --------------------------------------------------------------------------------------

    def prepare(self, args: Any, data: dict[str, Any], tokenizer: Any, first_epoch: int) -> None:
        """With the data at hand: the run's length, the caption index, checks across ranks and against a resumed run.

        Raises:
            ConfigError: no step to train, ranks that differ, or a resumed run that differs.
        """
        steps = data["train"].dataloader.num_batches // args.accum_freq * args.epochs
        if steps < 1:
            raise ConfigError(
                f"the run has no optimizer step: {data['train'].dataloader.num_batches} batches an epoch with "
                f"--accum-freq {args.accum_freq}; lower --batch-size"
            )
        device = torch.device(args.device)
        values = record(
            self.config, steps, self.table.content_hash if self.table else None, "open_clip_torch", self.host_version
        )
        if args.distributed:
            check_ranks_agree(values, args.rank, args.world_size, device)
        master = args.rank == 0
        # An epoch above zero tells a resumed training checkpoint from bare weights to start from.
        if first_epoch > 0 and args.resume:
            if "://" in args.resume:
                logger.warning("MM-TS: %s is remote; mmts.yaml beside it is not compared", args.resume)
            else:
                check_resume(Path(args.resume).parent / FILE_NAME, values, self.allow_change, self.table)
        frequencies = np.ones(1)
        self.tokenizer = tokenizer
        if self.table is not None and not self.config.no_shifts:
            with first_on_node(args.local_rank, args.distributed):
                self.lookup = TokenLookup(self.table, tokenizer, _pad_id(tokenizer), device)
            frequencies = self.lookup.frequencies
        self.runtime = Runtime(self.config, self.table, frequencies, steps, device)
        folder = args.checkpoint_path if args.logs and args.logs.lower() != "none" else None
        self.live = Live(
            self.runtime,
            lambda values, step: self._log({f"train/mmts/{name}": value for name, value in values.items()}, step),
            None if folder is None else Path(folder) / LOG_NAME,
            args.rank,
            args.world_size,
        )
        if not master:
            return
        logger.info("MM-TS: %s", self.runtime.describe())
        if self.table is not None:
            logger.info(
                "MM-TS: %s: %d captions in %d clusters, %d samples, hash %s",
                self.table.source,
                len(self.table),
                self.table.clusters,
                self.table.samples,
                self.table.content_hash,
            )
        if self.lookup is not None and self.lookup.merged:
            logger.info("MM-TS: %d captions tokenize like another and share its shift", self.lookup.merged)
        if folder is not None:
            write_record(os.path.join(folder, FILE_NAME), values)

    def wrap_loss(self, host_loss: Any, watched: bool = True) -> ScheduledLoss:
        """OpenCLIP's loss replaced by ours. ``watched`` notes each call; a loss that is compiled must stay pure.

        Raises:
            SeamError: it is neither ``ClipLoss`` nor ``CoCaLoss``.
        """
        name = "no loss module" if host_loss is None else type(host_loss).__name__
        if name not in ("ClipLoss", "CoCaLoss"):
            raise SeamError(
                f"open_clip_torch {self.host_version}: --loss mmts replaces ClipLoss or CoCaLoss; this run has {name}"
            )
        return ScheduledLoss(self.config.loss, host_loss, self._show, self._loss_called if watched else None)

    # -- every epoch and step ---------------------------------------------------------------------------------------

    def begin_epoch(self, model: nn.Module, loss: Any, epoch: int, data: dict[str, Any], args: Any, log: Any) -> None:
        """Where OpenCLIP's ``train_one_epoch`` starts. ``log(values, step)`` writes to the host's own loggers.

        Raises:
            SeamError: the loss of this epoch is not ours.
        """
        if self.runtime is None or not isinstance(loss, ScheduledLoss):
            raise SeamError(
                f"open_clip_torch {self.host_version}: training starts without the MM-TS loss (found "
                f"{type(loss).__name__}); a seam was bypassed. See: mmts doctor"
            )
        self._args, self._log = args, log
        self._scale = _logit_scale(model)
        self._steps_per_epoch = data["train"].dataloader.num_batches // args.accum_freq
        self._first_step = self._steps_per_epoch * epoch
        self._batches = 0
        self.set_step(self._first_step)

    def set_step(self, step: int) -> None:
        """The host's optimizer step, before its forward pass."""
        assert self.runtime is not None
        self.runtime.step = step
        if self._scale is not None and self.config.loss == INFONCE:
            # A true scale in OpenCLIP's own log line and in its checkpoints; the loss itself does not read it.
            with torch.no_grad():
                self._scale.fill_(-math.log(self.runtime.mean_temperature))

    def temperatures(self, tokens: Tensor) -> Tensor:
        """``[n, L]`` token ids of a training batch to ``[n]`` temperatures at the current step."""
        assert self.runtime is not None
        if self.lookup is None:
            index = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        else:
            index = self.lookup(tokens)
        shift = self.runtime.shift(index)
        if torch.is_grad_enabled():  # accumulation runs every batch twice; count it once
            missed = index == self.runtime.missing
            self._meter.update(shift, missed)
            if self._watched < _WATCHED_BATCHES and self.lookup is not None:
                self._watch(tokens, missed)
        return shift + self.runtime.base

    def batch_starts(self, *_: Any) -> None:
        """Before a forward pass. Under ``--skip-scheduler`` nobody tells us the step, so it is counted."""
        if self._args.skip_scheduler:
            self.set_step(self._first_step + self._batches // self._args.accum_freq)

    def batch_done(self) -> None:
        """One batch of the current accumulation group went through: log where the host logs."""
        self._batches += 1
        done, rest = divmod(self._batches, self._args.accum_freq)
        if rest or self._args.rank != 0:
            return
        line_every = self._args.log_every_n_steps
        values_every = max(1, getattr(self._args, "log_metric_every_n_steps", line_every))  # 4.x: more often than lines
        line = (done - 1) % line_every == 0 or done == self._steps_per_epoch
        if line or (done - 1) % values_every == 0:
            self._report(line)

    def tag(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook on the trained model: one temperature per sample joins its output and flows to the loss."""
        tokens = kwargs["text"] if "text" in kwargs else inputs[1]
        if not isinstance(output, dict):
            raise SeamError(f"open_clip_torch {self.host_version}: the model's output is not a dict")
        training_step = torch.is_grad_enabled()
        if training_step and self._awaiting_loss:
            raise SeamError(
                f"open_clip_torch {self.host_version}: a training step went by without the MM-TS loss; plain training "
                "would go on unnoticed"
            )
        output[TEMPERATURE_KEY] = self.temperatures(tokens)
        if training_step:
            self._awaiting_loss = True
            self.batch_done()
        return output

    def _loss_called(self) -> None:
        self._awaiting_loss = False

    # -- what the user sees -----------------------------------------------------------------------------------------

    def _show(self, image_features: Tensor, text_features: Tensor, temperature: Tensor) -> None:
        assert self.live is not None  # made after 4.x makes its loss, before it trains
        self.live.watch(image_features, text_features, temperature)

    def _watch(self, tokens: Tensor, missed: Tensor) -> None:
        """The first batches: warn below 99% of captions found, stop below 50%. Waits for the device."""
        assert self.runtime is not None
        assert self.table is not None
        self._watched += 1
        samples, misses = self._meter.samples, self._meter.misses()
        if not misses:
            return
        rate = 1 - misses / samples
        examples = "; ".join(repr(_text(row, self.tokenizer)) for row in tokens[missed][:3])
        message = (
            f"{misses} of the first {samples} training captions are not in {self.table.source} ({rate:.0%} found)"
            + (f", for example {examples}" if examples else "")
        )
        last = self._watched == min(_WATCHED_BATCHES, self.runtime.total_steps * self._args.accum_freq)
        if rate == 0 or (rate < 0.5 and (last or samples >= _ENOUGH_SAMPLES)):
            raise TableError(f"{message}. Was the table made from other captions, or another column?")
        if self.config.missing == "error":
            raise TableError(f"{message} (--mmts-missing error)")
        if rate < 0.99 and last:
            logger.warning("MM-TS: %s; they get the %s shift (--mmts-missing)", message, self.config.missing)

    def _report(self, line: bool) -> None:
        """To the host's loggers, and as a ``line`` of its log."""
        assert self.runtime is not None
        assert self.live is not None
        values = self._meter.read(self.runtime)
        if self.config.missing == "error" and values["hit_rate"] < 1:
            raise TableError(f"training captions are not in {self.config.clusters} (--mmts-missing error)")
        self.live.report(values)
        if line:
            logger.info("%s", step_line(self.runtime, values))


def _refuse_unsupported(args: Any) -> None:
    if getattr(args, "siglip", False):
        raise ConfigError(
            "--siglip has no temperature per row: --loss mmts replaces the softmax loss; drop one of them"
        )
    if getattr(args, "distill_model", None) or getattr(args, "distill_pretrained", None):
        raise ConfigError(
            "--distill-model is not supported with --loss mmts: the teacher's logits have one temperature"
        )
    if getattr(args, "genlip", False) or getattr(args, "genlap", False):
        raise ConfigError(f"--model {args.model} is generative: it has no contrastive loss for --loss mmts to replace")
    if getattr(args, "torchscript", False):
        raise ConfigError("--torchscript is not supported with --loss mmts: it takes no hooks; use --torchcompile")
    if getattr(args, "horovod", False):
        raise ConfigError("--horovod is not supported with --loss mmts; launch with torchrun")


def _logit_scale(model: Any) -> Optional[Tensor]:
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return getattr(model, "logit_scale", None)


def _pad_id(tokenizer: Any) -> int:
    """4.x: the tokenizer says. 3.x: the one it wraps, if any; OpenCLIP's own pads with 0."""
    pad_id = getattr(tokenizer, "pad_token_id", None)
    if pad_id is None:
        pad_id = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None)
    return int(pad_id or 0)


def _text(row: Tensor, tokenizer: Any) -> str:
    """A row of token ids as a caption again, as far as the tokenizer can tell."""
    ids = row.tolist()
    if hasattr(tokenizer, "tokenizer"):
        return str(tokenizer.tokenizer.decode(ids, skip_special_tokens=True))
    end = ids.index(tokenizer.eot_token_id) if tokenizer.eot_token_id in ids else len(ids)
    return str(tokenizer.decode(ids[1:end])).strip()
