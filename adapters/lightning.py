"""Lightning's conventions translated to the core, for the losses of the library lightly: one modality, two views.

Imports without either and patches nothing; :mod:`mmts_plugins.patches.lightning` makes the callback of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Optional, Union

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import ConfigError, TableError, shown
from ..hosts.adapter import Adapter, Resolved
from ..hosts.session import Facts, Session
from ..presets import Preset
from ..record import compare_records
from ..tables import CAPTION, ClusterTable, Table, open_table
from ..tables.index import KeyLookup

LOSSES = ("NTXentLoss", "DCLLoss", "DCLWLoss")
"""Classes whose ``temperature`` divides matrices that have this rank's anchors as their rows."""
Key = Union[str, Callable[[Any], Any]]


class Lightning(Adapter):
    """A LightningModule with a contrastive loss of lightly's, and :class:`mmts_plugins.MMTSCallback`."""

    name = "lightning"
    title = "Lightning"
    loss = "mmts-infonce"
    presets: ClassVar[Mapping[str, Preset]] = {
        # Kukleva et al. (2023), README of its code: from 1.0 to 0.1 and back five times in 2,000 epochs.
        "unimodal-ts": Preset("mmts-infonce", 0.9, 0.55, 0.55),
    }
    default_presets: ClassVar[Mapping[str, str]] = {"mmts-max-margin": "avion-max-margin"}

    def open_table(self, path: str) -> Table:
        return open_table(path)

    def settle(self, config: Config) -> Config:
        if config.kind.is_margin:
            raise ConfigError(f"--loss {config.loss}: lightly's losses have a temperature; use --loss mmts-infonce")
        if config.clusters is not None and not config.no_shifts and config.shift_min == config.shift_max:
            raise ConfigError(
                f"shift_min and shift_max are both {config.shift_min:g}, so the table would change nothing; no paper "
                "has shifts for one modality: alpha=0.7, shift_min=0.45, shift_max=0.65 stay within 0.1 and 1.0"
            )
        return config


ADAPTER = Lightning()


class _Classes:
    """Finds the classes of a batch where they are: no device waits for the CPU."""

    def __init__(self, table: Table, device: torch.device) -> None:
        if not isinstance(table, ClusterTable):
            raise TableError(f"{table.source}: a table of classes in parts; make one file of it")
        lookup = KeyLookup(table)
        self.frequencies = lookup.frequencies
        numbers = range(1 + max((int(key) for key in table.keys.to_pylist() if key.isdecimal()), default=0))
        found = np.append(lookup([str(number) for number in numbers]), lookup.missing)
        self._place = torch.from_numpy(found).to(device)

    def __call__(self, classes: Tensor) -> Tensor:
        last = len(self._place) - 1
        place = torch.where((classes >= 0) & (classes < last), classes, last)
        return self._place[place]


class LightningSession(Session):
    """MM-TS in one call of ``fit()``.

    Args:
        resolved: from the callback's arguments.
        trainer, module: Lightning's.
        key: as of the callback.
        saved: the record in the checkpoint that the run goes on from; ``None`` where it starts.
        version: of the host.

    Raises:
        ConfigError: as :class:`.Session`; or the module has no loss that is known.
    """

    def __init__(
        self,
        resolved: Resolved,
        trainer: Any,
        module: nn.Module,
        key: Key,
        saved: Optional[Mapping[str, Any]],
        version: str,
    ) -> None:
        self._key, self._trainer = key, trainer
        self._losses = [each for each in module.modules() if _names(each) & set(LOSSES)]
        if not self._losses:
            raise ConfigError(
                f"{type(module).__name__} has no loss that is known ({', '.join(LOSSES)}); one that is made inside of "
                "training_step is not seen: make it in __init__"
            )
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError(
                "the run has no end, so its schedule has no period: give the Trainer max_epochs or max_steps"
            )
        folder = trainer.log_dir or trainer.default_root_dir
        facts = Facts(
            total_steps=int(steps),
            device=torch.device(trainer.strategy.root_device),
            host_version=version,
            folder=Path(folder) if folder and not trainer.fast_dev_run else None,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        self._by_class = resolved.shifted is not None and resolved.shifted.kind != CAPTION
        super().__init__(ADAPTER, resolved, facts, self._index_of)
        if saved is not None:
            compare_records(
                saved or None, self.values, resolved.allow_change, self.table, "mmts.yaml of the checkpoint"
            )
        self.judge_batches("training classes" if self._by_class else "training samples")
        if facts.folder is not None and facts.rank == 0:
            facts.folder.mkdir(parents=True, exist_ok=True)
        self.write_record()

    def _index_of(self, table: Table) -> Any:
        return _Classes(table, self.facts.device) if self._by_class else KeyLookup(table)

    def keys(self, batch: Any) -> Any:
        """What the table knows the samples of a batch by: ``[n]`` classes, or ``n`` names.

        Raises:
            ConfigError: the batch has none where the key says.
        """
        if callable(self._key):
            found = self._key(batch)
        else:
            place = {"target": 1, "filename": 2}.get(self._key)
            found = batch.get(self._key) if isinstance(batch, Mapping) else None
            if found is None and place is not None and isinstance(batch, (list, tuple)) and len(batch) > place:
                found = batch[place]
        if isinstance(found, Tensor) and found.ndim == 1:
            return found if self._by_class or self.index is None else [str(each) for each in found.tolist()]
        if isinstance(found, Sequence) and not isinstance(found, str) and all(isinstance(each, str) for each in found):
            if not self._by_class:
                return list(found)
            return torch.tensor([int(each) if each.isdecimal() else -1 for each in found], device=self.facts.device)
        raise ConfigError(
            f"key={shown(self._key)}: a batch has no classes or names there; of (views, targets, file names) they are "
            "'target' and 'filename', else give a function of the batch"
        )

    @contextmanager
    def scheduled(self, batch: Any) -> Iterator[None]:
        """For one batch every loss has a column ``[n, 1]`` in the place of its temperature."""
        self.at_step(int(self._trainer.global_step))
        column = self.temperatures(self.keys(batch))[:, None].float()
        before = [(loss, loss.__dict__["temperature"]) for loss in self._losses]
        hooks = [loss.register_forward_pre_hook(lambda *_: self.loss_taken()) for loss in self._losses]
        try:
            for loss in self._losses:
                loss.__dict__["temperature"] = column
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for loss, temperature in before:
                loss.__dict__["temperature"] = temperature


def _names(module: nn.Module) -> set[str]:
    return {each.__name__ for each in type(module).__mro__}
