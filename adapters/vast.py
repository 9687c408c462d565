"""VAST's conventions translated to the core: its batch, its step, its temperature, its loss signature, its log.

Imports without VAST and patches nothing; :mod:`mmts_plugins.patches.vast` calls it at the host's seams.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config
from ..errors import ConfigError, SeamError, TableError
from ..fields import TEXT, Field
from ..hosts.adapter import Adapter, Resolved
from ..hosts.session import INFO, Facts, Session
from ..options import Option
from ..presets import Preset
from ..record import FILE_NAME
from ..tables import CAPTION, Table, open_table

LABEL_SMOOTHING = 0.1
"""As VAST has it, in its own code."""
OWN, HOSTS = "mmts", "host"

_TEMPERATURE = "contra_temp"
_LOG_EVERY = 50  # steps; where VAST's loop logs its losses


class Vast(Adapter):
    """``run.py``: InfoNCE between a clip's modalities and its one caption.

    Attributes:
        ids, captions: fields of an annotation; the first that is there holds the clip id, or the caption.
        first_caption: of a list of captions the host takes the first. Otherwise a clip can have only one.
        volumes: the loss compares volumes, not similarities of pairs: it can be scaled, but not recomputed.
    """

    name = "vast"
    title = "VAST"
    loss = "mmts-infonce"
    presets: ClassVar[Mapping[str, Preset]] = {
        "vast-clip": Preset("mmts-infonce", 0.06, 0.06, 0.09),
        "vast-max-margin": Preset("mmts-max-margin", 0.20, 0.10, 0.30),
    }
    options = (
        Option(
            "key",
            Field(TEXT, null=True, choices=("caption", "id")),
            "what the keys of --mmts-clusters are, captions (default) or clip ids (for classes or visual features of "
            "each clip)",
        ),
        Option(
            "itm_temperature",
            Field(TEXT, null=True, choices=(OWN, HOSTS)),
            "the temperature that draws hard negatives for the matching head: each row's own (default with a loss of "
            "temperatures), or the host's",
        ),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"key": "caption"}
    ids: ClassVar[tuple[str, ...]] = ("video_id", "image_id", "image", "id")
    captions: ClassVar[tuple[str, ...]] = ("desc", "caption")
    first_caption: ClassVar[bool] = False
    volumes: ClassVar[bool] = False

    def open_table(self, path: str) -> Table:
        table = open_table(path)
        if table.kind != CAPTION:
            raise TableError(
                f"{path}: a table of class ids, but {self.title}'s samples are found by caption or clip id; for "
                "classes make one with: mmts cluster ANNOTATIONS.json --label-column CLASS --column video_id, and add "
                "--mmts-key id"
            )
        return table

    def settle(self, config: Config) -> Config:
        wanted = config.own["itm_temperature"]
        if self.volumes and config.loss != self.loss:
            raise ConfigError(
                f"--loss {config.loss}: {self.title}'s loss is InfoNCE over volumes of three and more vectors, which "
                "has no margin; use --loss mmts-infonce"
            )
        if self.volumes and wanted == HOSTS:
            raise ConfigError(
                f"--mmts-itm-temperature host: {self.title} draws its negatives from the scaled volumes themselves; "
                "leave the flag out"
            )
        if config.kind.is_margin and wanted == OWN:
            raise ConfigError(
                "--mmts-itm-temperature mmts: max-margin has margins, not temperatures; hard negatives are drawn with "
                "the host's. Leave the flag out"
            )
        settled = wanted or (HOSTS if config.kind.is_margin else OWN)
        return replace(config, own={**config.own, "itm_temperature": settled})

    def single(self, captions: Sequence[str], where: str) -> str:
        """The caption of a clip.

        Raises:
            TableError: it has several.
        """
        if len(captions) == 1 or (captions and self.first_caption):
            return captions[0]
        raise TableError(
            f"{where} has {len(captions)} captions, but {self.title}'s training loss pairs a clip with one; write an "
            "annotation of its own for each caption"
        )


class Gram(Vast):
    """``ispamm/GRAM``, derived from VAST: InfoNCE on volumes."""

    name = "gram"
    title = "GRAM"
    ids = ("clip_id", *Vast.ids)
    captions = (*Vast.captions, "vast_cap")
    first_caption = True
    volumes = True


VAST, GRAM = Vast(), Gram()


class VASTSession(Session):
    """MM-TS in one VAST training run: made where VAST's training loop starts.

    Args:
        adapter: of VAST, or of what is derived from it.
        resolved: from the flags.
        model: VAST's, perhaps inside DDP.
        loaders: from names ``task--data set`` to loaders.
        run_cfg: VAST's ``run_cfg``, for the number of steps and the output folder.
        first_step: above zero in a resumed run.
        log: VAST's logger; silent on all ranks but the first.
        host_version: for messages and ``mmts.yaml``.

    Raises:
        ConfigError: nothing to schedule, ranks that differ, or a resumed run that differs.
        TableError: annotations whose captions the table does not know, or several captions for one clip.
    """

    adapter: Vast

    def __init__(
        self,
        adapter: Vast,
        resolved: Resolved,
        model: Any,
        loaders: Mapping[str, Any],
        run_cfg: Any,
        first_step: int,
        log: Any,
        host_version: str = "",
    ) -> None:
        self._log = log
        total, folder = run_cfg.num_train_steps, Path(run_cfg.output_dir) / "log"
        many = {name: _retrievals(name) for name in loaders}
        if total > 0 and many and not any(many.values()):
            raise ConfigError(f"no task of this run is retrieval (ret%...): {', '.join(many)}; leave --loss mmts out")
        facts = Facts(
            total_steps=total,
            device=torch.device("cpu"),  # captions are looked up there, and a step then waits for nothing
            host_version=host_version,
            folder=folder,
            resumed=os.path.join(folder, FILE_NAME) if first_step > 0 else None,
            done=f"{first_step} of {total} steps are done" if first_step >= total else "",
            longer="lower --train_batch_size or raise --train_epoch",
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            exchange=next(model.parameters()).device,
        )
        super().__init__(adapter, resolved, facts)
        for name, loader in loaders.items():
            annotations = getattr(loader.dataset, "annos", None)
            if many[name] and isinstance(annotations, list):
                self._check_annotations(name, annotations)
            elif many[name]:  # unknown before training: the batches tell
                self.judge_batches("training samples")
        self.losses_per_step = max(many.values(), default=1)
        self.expects_loss = all(many.values())
        self.at_step(first_step)
        self.write_record()

    def say(self, level: str, text: str) -> None:
        (self._log.info if level == INFO else self._log.warning)("%s", text)

    def _check_annotations(self, name: str, annotations: Sequence[Mapping[str, Any]]) -> None:
        """Every training annotation is known before the first step, and so is what the table lacks."""
        adapter, keys = self.adapter, []
        for annotation in annotations:
            clip = str(next((annotation[field] for field in adapter.ids if field in annotation), "?"))
            caption = next((annotation[field] for field in adapter.captions if field in annotation), "")
            if not isinstance(caption, str):
                caption = adapter.single(caption, f"{name}: clip {clip}")
            keys.append((caption, clip))
        if self.index is None:
            return
        missing, key = len(self.index.frequencies), self.config.own["key"]
        column = 0 if key == "caption" else 1
        found = self.index([pair[column] for pair in keys])
        absent = [pair[column] for pair, index in zip(keys, found) if index == missing]
        hint = ""
        if len(absent) == len(keys) and (self.index([pair[1 - column] for pair in keys]) != missing).any():
            other = "id" if column == 0 else "caption"
            hint = f" Its keys are {other}s: add --mmts-key {other}."
        self.judge_before(absent, len(keys), f"training samples of {name}", key, hint)

    # -- every step -------------------------------------------------------------------------------------------------

    def after_step(self, step: int) -> None:
        """VAST's global step as it computes the learning rate: after a forward pass, so it is the next one's.

        Raises:
            SeamError: the step that ends was plain training.
        """
        if step % _LOG_EVERY == 0 or step == 1:
            self.report()
        if step >= self.facts.total_steps:
            self.judge_now()
        self.at_step(step)

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
        self.loss_taken()
        temperature = self.temperatures(self._keys(batch)).float()
        losses = self._losses(host, model, batch, task, temperature)
        if not self.adapter.volumes:  # of volumes there is no similarity of pairs to show
            self.watch(batch[f"feat_{task.split('%')[1][1:]}"], batch["feat_t"], temperature)
        return losses

    def _keys(self, batch: Any) -> list[str]:
        captions = [
            c if isinstance(c, str) else self.adapter.single(c, "a clip of this batch") for c in batch["raw_captions"]
        ]
        return captions if self.config.own["key"] == "caption" else [str(clip) for clip in batch["ids"]]

    def _losses(
        self, host: Callable[..., dict[str, Tensor]], model: Any, batch: Any, task: str, temperature: Tensor
    ) -> dict[str, Any]:
        own = self.config.own["itm_temperature"] == OWN
        if own:
            # One temperature per row, for InfoNCE and for the draw of hard negatives alike. In the instance's own
            # dictionary it shadows the parameter, which stays what it is, in checkpoints too.
            device = next(model.parameters()).device
            vars(model)[_TEMPERATURE] = temperature.to(device, non_blocking=True).unsqueeze(1)
        try:
            losses = host(model, batch, task, compute_loss=True)
        finally:
            if own:
                del vars(model)[_TEMPERATURE]
        if own and self.config.loss == self.adapter.loss:
            return losses
        if "loss_itc" not in losses:
            raise SeamError(f"{self.adapter.title} {self.facts.host_version}: no loss_itc among {', '.join(losses)}")
        losses["loss_itc"] = self._contrastive(batch, task, temperature)
        return losses

    def _contrastive(self, batch: Any, task: str, temperature: Tensor) -> Tensor:
        """``loss_itc`` anew, from the features that the host left in the batch: the mean over the subtasks."""
        texts = batch["feat_t"]
        temperature = temperature.to(texts.device, non_blocking=True)
        if self.config.loss == self.adapter.loss:
            # As VAST has it on any number of ranks: own rows, no gradient through what they are compared with.
            loss = self.module(local_loss=True, label_smoothing=LABEL_SMOOTHING)
        else:
            loss = self.module(gather_with_grad=True)
        return torch.stack(
            [loss(batch[f"feat_{subtask[1:]}"], texts, temperature) for subtask in task.split("%")[1:]]
        ).mean()


def _retrievals(name: str) -> int:
    """How many retrieval tasks VAST computes for a loader named ``task--data set``, tasks joined by ``_``."""
    return sum(task.startswith("ret") for task in name.split("--")[0].split("_"))
