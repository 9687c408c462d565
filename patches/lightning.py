"""Lightning has a door of its own, callbacks, so nothing is patched: the callback, and the host for ``mmts doctor``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..hosts.host import Host
from ..hosts.registry import hookimpl

if TYPE_CHECKING:
    from ..hosts.adapter import Adapter


def _adapters() -> Sequence[Adapter]:
    from ..adapters.lightning import ADAPTER

    return (ADAPTER,)


HOST = Host(
    name="Lightning",
    distribution="lightly",
    package="lightly",
    versions="1.5 and 1.6",
    seams=(),
    adapters=_adapters,
    start_modules=(),
)


@cache
def callback_class() -> type[Any]:
    """The class of the callback: of whichever Lightning is there, or of both its names.

    Raises:
        ConfigError: there is none.
    """
    names = ("lightning.pytorch", "pytorch_lightning")
    here = [name for name in names if name in sys.modules] or [name for name in names if find_spec(name.split(".")[0])]
    if not here:
        raise ConfigError("MMTSCallback needs Lightning: pip install 'mmts-plugins[lightning]'")
    bases = tuple({import_module(name).Callback: None for name in here})

    from ..adapters.lightning import ADAPTER, LightningSession

    class MMTSCallback(*bases):  # type: ignore[misc]
        """Schedules the temperature of lightly's contrastive losses (``NTXentLoss`` and kin) in a LightningModule.

        Args:
            clusters: the cluster table's file, of classes or of the samples' names; none: the schedule alone.
            key: how a sample is known to it: ``"target"`` or ``"filename"`` of lightly's ``(views, targets, names)``,
                the name of a field of a dict, or a function of the batch that returns ``n`` classes or names.
            fields: our flags by their names in ``mmts.yaml``: ``alpha=0.7``, ``shift_min=0.45``, ``shift_max=0.65``.

        Raises:
            ConfigError, TableError: what would stop the run.
        """

        def __init__(self, clusters: Any = None, key: Any = "target", **fields: Any) -> None:
            super().__init__()
            flags = {"loss": fields.pop("loss", "mmts"), **{f"mmts_{name}": value for name, value in fields.items()}}
            flags |= {"mmts_no_shifts": True} if clusters is None else {"mmts_clusters": str(clusters)}
            self._resolved, self._key = ADAPTER.resolve(flags), key
            self._saved: Any = None
            self._session: Any = None
            self._open: Any = None

        def on_train_start(self, trainer: Any, module: Any) -> None:
            if self._saved is None and trainer.ckpt_path:
                self._saved = {}  # it goes on from a run without us
            self._session = LightningSession(self._resolved, trainer, module, self._key, self._saved, HOST.version())

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            self._open = self._session.scheduled(batch)
            self._open.__enter__()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            self._close()
            step = trainer.global_step
            if step % trainer.log_every_n_steps == 0 and (number + 1) % trainer.accumulate_grad_batches == 0:
                values = {f"mmts/{name}": value for name, value in self._session.report(line=False).items()}
                for logger in trainer.loggers if values else ():
                    logger.log_metrics(values, step=step)

        def on_train_end(self, *_: Any) -> None:
            self._session.judge_now()

        def on_exception(self, *_: Any) -> None:
            self._close()

        def _close(self) -> None:
            scheduled, self._open = self._open, None
            if scheduled is not None:
                scheduled.__exit__(None, None, None)

        def state_dict(self) -> dict[str, Any]:
            return {} if self._session is None else {"record": dict(self._session.values)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._saved = state_dict.get("record", {})

    return MMTSCallback


@hookimpl
def mmts_host() -> Host:
    return HOST
