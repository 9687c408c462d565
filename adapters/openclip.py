"""OpenCLIP's conventions translated to the core: its flags, batch, step, loss signature, logs.

Imports without OpenCLIP and patches nothing; :mod:`mmts_plugins.patches.openclip` calls it at the host's seams.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor, nn

from .._files import writing
from ..config import Config
from ..data.source import weights_of
from ..distributed import first_on_node
from ..errors import ConfigError, SeamError, cause, one_line, shown
from ..functional import HAS_OPERATORS, compiling, opaque
from ..hosts.adapter import Adapter, Resolved
from ..hosts.logs import HostLog, RunFolder
from ..hosts.session import INFO, Facts, Session
from ..presets import Preset
from ..record import FILE_NAME, LOG_NAME, check_resume
from ..tables import Table
from ..tables.index import TokenLookup
from . import openclip_geometry, openclip_log

logger = logging.getLogger(__name__)

TEMPERATURE_KEY = "mmts_temperature"
_CHECKPOINTS = "checkpoints"  # where OpenCLIP lists files: earlier versions of ours put theirs there
_NOTHING_TRAINED = (
    "nothing that the contrastive loss depends on is trained, so --loss mmts would schedule nothing: --lock-image with "
    "--lock-text locks both towers; leave one out, or unlock its last layers (--lock-image-unlocked-groups, "
    "--lock-text-unlocked-layers)"
)


class OpenCLIP(Adapter):
    """``python -m open_clip_train.main``, 3.x and 4.x."""

    name = "openclip"
    title = "OpenCLIP"
    recorded = "open_clip_torch"
    loss = "mmts-infonce"
    presets: ClassVar[Mapping[str, Preset]] = {"clip-cc3m": Preset("mmts-infonce", 0.04, 0.05, 0.10)}
    options = openclip_geometry.OPTIONS
    loss_hint = "OpenCLIP's own flag is spelt --loss-dist-impl"
    log_files = openclip_log.FILES
    log_folders = (_CHECKPOINTS,)
    default_presets: ClassVar[Mapping[str, str]] = {"mmts-max-margin": "avion-max-margin"}

    def settle(self, config: Config) -> Config:
        openclip_geometry.request_of(config.own)  # a preview says what a run would stop with
        return config

    def read_log(self, run: RunFolder) -> HostLog:
        return openclip_log.read_log(run)


ADAPTER = OpenCLIP()


_watches: list[Callable[[Tensor, Tensor, Tensor], None]] = []


@opaque(
    "(Tensor image_features, Tensor text_features, Tensor temperature, int number) -> Tensor",
    lambda image_features, text_features, temperature, number: torch.empty_like(temperature),
)
def _watched(image_features: Tensor, text_features: Tensor, temperature: Tensor, number: int) -> Tensor:
    """The step's temperatures, seen on their way to a compiled loss, which without them has nothing to compute.

    A CUDA graph replays kernels and calls nothing: there, the steps before it is recorded are all that is seen.
    """
    if not (image_features.is_cuda and torch.cuda.is_current_stream_capturing()):
        _watches[number](image_features, text_features, temperature)
    return temperature.clone()


class ScheduledLoss(nn.Module):
    """What replaces OpenCLIP's ``ClipLoss`` or ``CoCaLoss``: the same call, with a temperature for every sample.

    Args:
        make: makes the scheduled loss from ``local_loss, gather_with_grad, rank, world_size``.
        host_loss: the loss that OpenCLIP made. A CoCa loss still computes its caption loss.
        watch: given features and temperatures of every training step; where the loss is compiled, from torch 2.4 on.
        on_call: called in every forward, so that a training step without us in its path is noticed.
    """

    def __init__(
        self,
        make: Callable[[bool, bool, int, int], nn.Module],
        host_loss: Any,
        watch: Callable[[Tensor, Tensor, Tensor], None],
        on_call: Optional[Callable[[], None]] = None,
    ) -> None:
        super().__init__()
        self.contrastive = make(host_loss.local_loss, host_loss.gather_with_grad, host_loss.rank, host_loss.world_size)
        self.captioning = host_loss if hasattr(host_loss, "caption_loss") else None
        self.weight = 1.0
        if self.captioning is not None:
            self.weight, self.captioning.clip_loss_weight = self.captioning.clip_loss_weight, 0
        self.temperature: Optional[Tensor] = None
        self._watch, self._on_call = watch, on_call
        self._number = len(_watches)
        _watches.append(watch)

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
        if torch.is_grad_enabled():
            if not compiling():
                if not (image_features.requires_grad or text_features.requires_grad):
                    raise ConfigError(_NOTHING_TRAINED)
                self._watch(image_features, text_features, temperature)
            elif HAS_OPERATORS:
                temperature = _watched(image_features.detach(), text_features.detach(), temperature, self._number)
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


class OpenCLIPSession(Session):
    """MM-TS in one OpenCLIP training run: made with the data at hand, used at each seam after that.

    Args:
        resolved: from the flags.
        args: OpenCLIP's own parsed arguments.
        data, tokenizer, first_epoch: as its ``get_data`` makes and takes them.
        host_version: for messages and ``mmts.yaml``.

    Raises:
        ConfigError: no step to train, ranks that differ, or a resumed run that differs.
    """

    def __init__(
        self,
        resolved: Resolved,
        args: Any,
        data: dict[str, Any],
        tokenizer: Any,
        first_epoch: int,
        host_version: str = "",
    ) -> None:
        self._args, self._tokenizer = args, tokenizer
        self._log: Optional[Callable[[dict[str, float], int], None]] = None
        batches = data["train"].dataloader.num_batches
        saves = bool(args.logs) and args.logs.lower() != "none"
        self._own_folder = Path(args.checkpoint_path).parent
        facts = Facts(
            total_steps=batches // args.accum_freq * args.epochs,
            device=torch.device(args.device),
            host_version=host_version,
            folder=self._own_folder if saves else None,
            # An epoch above zero tells a resumed training checkpoint from bare weights to start from.
            resumed=str(args.resume) if first_epoch > 0 and args.resume else None,
            done=f"{first_epoch} of --epochs {args.epochs} are done" if first_epoch >= args.epochs else "",
            longer=f"{batches} batches an epoch with --accum-freq {args.accum_freq}; lower --batch-size",
            rank=args.rank,
            world_size=args.world_size if args.distributed else 1,
            reads=_reads(args),
        )
        super().__init__(ADAPTER, resolved, facts, self._make_index)
        self.judge_batches("training captions", lambda row: _text(row, tokenizer))
        merged = getattr(self.index, "merged", 0)
        if merged and facts.rank == 0:
            self.say(INFO, f"MM-TS: {merged} captions tokenize like another and share its shift")
        self._written = False

    def _make_index(self, table: Table) -> TokenLookup:
        args = self._args
        with first_on_node(args.local_rank, args.distributed):
            return TokenLookup(table, self._tokenizer, _pad_id(self._tokenizer), torch.device(args.device))

    def say(self, level: str, text: str) -> None:
        logger.log(logging.INFO if level == INFO else logging.WARNING, "%s", text)

    def write_values(self, values: dict[str, float], step: int) -> None:
        if self._log is not None:
            self._log({f"train/mmts/{name}": value for name, value in values.items()}, step)

    def check_resumed(self, saved: str, values: dict[str, Any], allow_change: bool) -> None:
        _check_resumed(saved, self._own_folder, values, allow_change, self.table)

    # -- every epoch and step ---------------------------------------------------------------------------------------

    def begin_epoch(self, model: nn.Module, loss: Any, epoch: int, data: dict[str, Any], args: Any, log: Any) -> None:
        """Where OpenCLIP's ``train_one_epoch`` starts. ``log(values, step)`` writes to the host's own loggers.

        Raises:
            SeamError: the loss of this epoch is not ours.
            ConfigError: nothing of the model is trained, or ``mmts.yaml`` cannot be written.
        """
        if not isinstance(loss, ScheduledLoss):
            raise SeamError(
                f"open_clip_torch {self.facts.host_version}: training starts without the MM-TS loss (found "
                f"{type(loss).__name__}); a seam was bypassed. See: mmts doctor"
            )
        if not any(
            weight.requires_grad and name.rpartition(".")[2] not in ("logit_scale", "logit_bias")
            for name, weight in model.named_parameters()
        ):
            raise ConfigError(_NOTHING_TRAINED)
        if not self._written:
            self.write_record()
            if self.facts.folder is not None and self.facts.rank == 0:
                with writing(self.facts.folder / FILE_NAME, "cannot be written", ConfigError):
                    _tidy(self.facts.folder)
            self._written = True
        self._args, self._log = args, log
        self._scale = _logit_scale(model)
        self._steps_per_epoch = data["train"].dataloader.num_batches // args.accum_freq
        self._first_step = self._steps_per_epoch * epoch
        self._batches = 0
        self.at_step(self._first_step)

    def at_step(self, step: int) -> None:
        super().at_step(step)
        if self._scale is not None and not self.config.kind.is_margin:
            # A true scale in OpenCLIP's own log line and in its checkpoints; the loss itself does not read it.
            with torch.no_grad():
                self._scale.fill_(-math.log(self.tau.mean_temperature))

    def batch_starts(self, *_: Any) -> None:
        """Before a forward pass. Under ``--skip-scheduler`` nobody tells us the step, so it is counted."""
        if self._args.skip_scheduler:
            self.at_step(self._first_step + self._batches // self._args.accum_freq)

    def of_batch(self, tokens: Tensor) -> Tensor:
        """``[n, L]`` token ids to ``[n]`` temperatures; accumulation runs every batch twice, and counts it once."""
        return self.temperatures(tokens, counted=torch.is_grad_enabled())

    def batch_done(self) -> None:
        """One batch of the current accumulation group went through: log where the host logs."""
        self._batches += 1
        done, rest = divmod(self._batches, self._args.accum_freq)
        if rest:
            return
        if done == self._steps_per_epoch:
            self.judge_now()
        line_every = self._args.log_every_n_steps
        values_every = max(1, getattr(self._args, "log_metric_every_n_steps", line_every))  # 4.x: more often than lines
        line = (done - 1) % line_every == 0 or done == self._steps_per_epoch
        if line or (done - 1) % values_every == 0:
            self.report(line)

    def tag(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook on the trained model: one temperature per sample joins its output and flows to the loss."""
        tokens = kwargs["text"] if "text" in kwargs else inputs[1]
        if not isinstance(output, dict):
            raise SeamError(f"open_clip_torch {self.facts.host_version}: the model's output is not a dict")
        output[TEMPERATURE_KEY] = self.of_batch(tokens)
        if torch.is_grad_enabled():
            self.batch_done()
        return output


def wrap_loss(
    resolved: Resolved,
    host_loss: Any,
    watch: Callable[[Tensor, Tensor, Tensor], None],
    on_call: Optional[Callable[[], None]],
    host_version: str = "",
) -> ScheduledLoss:
    """OpenCLIP's loss replaced by ours. ``on_call`` notes each call; a loss that is compiled must stay pure.

    Raises:
        SeamError: it is neither ``ClipLoss`` nor ``CoCaLoss``.
    """
    name = "no loss module" if host_loss is None else type(host_loss).__name__
    if name not in ("ClipLoss", "CoCaLoss"):
        raise SeamError(
            f"open_clip_torch {host_version}: --loss mmts replaces ClipLoss or CoCaLoss; this run has {name}"
        )
    return ScheduledLoss(resolved.config.kind.module, host_loss, watch, on_call)


def refuse_unsupported(args: Any) -> None:
    """Raise :class:`ConfigError` where OpenCLIP's own arguments leave nothing to schedule, or nothing that we can."""
    if getattr(args, "siglip", False):
        raise ConfigError(
            "--siglip has no temperature per row: --loss mmts replaces the softmax loss; drop one of them"
        )
    if getattr(args, "distill_model", None) or getattr(args, "distill_pretrained", None):
        raise ConfigError(
            "--distill-model is not supported with --loss mmts: the teacher's logits have one temperature"
        )
    if getattr(args, "genlip", False) or getattr(args, "genlap", False):
        raise ConfigError(
            f"--model {shown(args.model)} is generative: it has no contrastive loss for --loss mmts to replace"
        )
    if getattr(args, "torchscript", False):
        raise ConfigError("--torchscript is not supported with --loss mmts: it takes no hooks; use --torchcompile")
    if getattr(args, "horovod", False):
        raise ConfigError("--horovod is not supported with --loss mmts; launch with torchrun")
    if "coca" in str(args.model).lower() and getattr(args, "coca_contrastive_loss_weight", 1) == 0:
        raise ConfigError(
            "--coca-contrastive-loss-weight 0 leaves no contrastive loss for --loss mmts to schedule; drop one of them"
        )
    if args.accum_freq < 1:
        raise ConfigError(f"--accum-freq {args.accum_freq}: it must be one or above")
    if not (args.train_data or str(args.dataset_type).startswith("synthetic")):
        logger.warning("MM-TS: --loss mmts changes nothing here: without --train-data this run only evaluates")


def _reads(args: Any) -> dict[str, tuple[Any, str]]:
    """How this run reads its captions, as tables record it."""
    kind, ending = args.dataset_type, str(args.train_data).rsplit(".", 1)[-1]
    found: dict[str, tuple[Any, str]] = {}
    if kind == "csv" or (kind == "auto" and ending in ("csv", "tsv")):
        found["column"] = (args.csv_caption_key, "--csv-caption-key")
        found["separator"] = (args.csv_separator, "--csv-separator")
    elif kind in ("webdataset", "auto"):
        found["suffix"] = ("txt", "OpenCLIP's own")
    factors = getattr(args, "train_data_upsampling_factors", None)
    if factors:
        with suppress(ConfigError):  # too fine to be a table's; OpenCLIP takes any
            factors = "::".join(map(str, weights_of(factors)))
        found["weights"] = (factors, "--train-data-upsampling-factors")
    return found


def _beside(checkpoint: str) -> list[str]:
    """Where the record of a checkpoint's run may lie: as written now, then as earlier versions wrote it."""
    folder = checkpoint.rstrip("/").rpartition("/")[0]
    above, _, name = folder.rpartition("/")
    return [f"{place}/{FILE_NAME}" for place in ((above, folder) if name == _CHECKPOINTS else (folder,))]


def _check_resumed(
    checkpoint: str, own: Path, values: dict[str, Any], allow_change: bool, table: Optional[Table]
) -> None:
    """Compare with the record of the checkpoint's run; a remote one's also with that in the local folder ``own``.

    Raises:
        ConfigError: they differ, or the checkpoint was not trained with MM-TS.
    """
    remote = "://" in checkpoint
    places = _beside(checkpoint if remote else os.path.abspath(checkpoint))
    problem = None
    if remote:
        try:
            found = _fetch(places)
        except Exception as error:  # each kind of storage has its own
            found, problem = None, cause(error)
        if found is not None:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / FILE_NAME
                copy.write_bytes(found[1])
                check_resume(copy, values, allow_change, table, source=found[0])
            return
        if os.path.basename(os.path.dirname(places[0])) == own.name:
            places += _beside(str(own.absolute() / _CHECKPOINTS / "any"))
    existing = next((place for place in places if os.path.isfile(place)), None)
    if existing is None and problem is not None:
        logger.warning(
            "MM-TS: %s",
            one_line(
                f"{places[0]} cannot be read ({problem}): whether the resumed run had the same settings is not checked"
            ),
        )
        return
    check_resume(existing or places[0], values, allow_change, table)


def _fetch(places: list[str]) -> Optional[tuple[str, bytes]]:
    """The first of these URLs that is there, and what it holds."""
    import fsspec  # OpenCLIP reads the checkpoint itself with it

    for place in places:
        try:
            with fsspec.open(place, "rb") as file:
                return place, file.read(1 << 20)
        except FileNotFoundError:
            continue
    return None


def _tidy(folder: Path) -> None:
    """Out of the folder of checkpoints, which OpenCLIP lists, with what earlier versions wrote there."""
    old = folder / _CHECKPOINTS
    (old / FILE_NAME).unlink(missing_ok=True)
    if (old / LOG_NAME).is_file() and not (folder / LOG_NAME).exists():
        os.replace(old / LOG_NAME, folder / LOG_NAME)


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
    try:
        if hasattr(tokenizer, "tokenizer"):
            return str(tokenizer.tokenizer.decode(ids, skip_special_tokens=True))
        end = ids.index(tokenizer.eot_token_id) if tokenizer.eot_token_id in ids else len(ids)
        return str(tokenizer.decode(ids[1:end])).strip()
    except Exception:  # somebody's own tokenizer: the message must not fail over its example
        return f"tokens {ids}"
