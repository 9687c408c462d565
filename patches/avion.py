"""AVION's seams. Five functions and methods, replaced where they are defined; everything else stays as it is.

* Importing ``avion.losses.losses`` takes our flags out of ``sys.argv``: AVION parses it later, inside its script.
* ``avion.utils.distributed.init_distributed_mode`` is the first to see the parsed arguments.
* ``avion.data.clip_dataset.VideoCaptionDatasetCLIP`` gets the classes of its training samples when it is made, and
  hands a sample's class out in the place of its relevancy, which AVION's loss does not use.
* ``avion.optim.schedulers.cosine_scheduler`` knows the length of the run; the array it returns is the clock.
* ``avion.losses.losses.MaxMarginRankingLoss.forward`` is the loss: ours in training, AVION's own in validation.

Not patched: models, loaders, the optimizer, checkpoints, evaluation. The MM-TS authors' fork of AVION is left alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional

from .._startup import asks_for_us
from ..config import flag_parser, split_flags
from ..errors import ConfigError
from ..registry import hookimpl
from ._target import Host, Seam

if TYPE_CHECKING:
    from ..adapters.avion import Run

SCRIPT = "main_lavila_finetune_mir.py"
_FORK = "MMTSMaxMarginRankingLoss"

_run: Optional[Run] = None


def _take_flags(module: ModuleType) -> None:
    global _run
    _run = None
    script = os.path.basename(sys.argv[0])
    if hasattr(module, _FORK):
        if os.environ.get("RANK", "0") == "0":
            print(
                f"mmts: {module.__file__} is the MM-TS authors' fork of AVION, which has the method built in: "
                "mmts-plugins leaves it alone, and its flags with it",
                file=sys.stderr,
                flush=True,
            )
        return
    if script == SCRIPT and {"-h", "--help"} & set(sys.argv):
        print(flag_parser().format_help())
        return
    if not asks_for_us(sys.argv):
        return
    flags, rest = split_flags(sys.argv[1:])
    if not flags:
        return
    if script != SCRIPT:
        raise ConfigError(f"{script or 'this process'}: in AVION, --loss mmts is for {SCRIPT}, started by torchrun")
    from ..adapters.avion import Run

    _run = Run(flags, HOST.version())
    sys.argv[1:] = rest


def _init_distributed_mode(original: Callable[..., Any], args: Any) -> Any:
    result = original(args)
    if _run is not None:
        _run.begin(args)
    return result


class _Tags:
    """The classes of a data set's samples. A worker process that is spawned, not forked, unpickles them: only there
    does it learn of us, and patches the data set's class again."""

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.indices,)


def _restored(indices: list[int]) -> _Tags:
    HOST.install("avion.data.clip_dataset")
    return _Tags(indices)


def _dataset_init(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if _run is not None and self.is_training:
        self._mmts_tags = _Tags(_run.tags(self.samples))


def _dataset_getitem(original: Callable[..., Any], self: Any, i: int) -> Any:
    item = original(self, i)
    tags = vars(self).get("_mmts_tags")
    return item if tags is None else (*item[:-1], tags.indices[i])


def _cosine_scheduler(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    schedule = original(*args, **kwargs)
    if _run is None:
        return schedule
    from ..adapters.avion import ToldSchedule

    _run.prepare(len(schedule))
    return ToldSchedule.of(schedule, _run.set_step)


def _forward(
    original: Callable[..., Any], self: Any, image_features: Any, text_features: Any, weight: Any = None
) -> Any:
    if _run is None or not sys.modules["torch"].is_grad_enabled():
        return original(self, image_features, text_features, weight)
    return _run.loss(self, image_features, text_features, weight)


HOST = Host(
    name="AVION",
    distribution="AVION",
    package="avion",
    versions="at commit 31b00b6",
    seams=(
        Seam(
            "avion.losses.losses",
            "MaxMarginRankingLoss.forward",
            ("image_features", "text_features", "weight"),
            _forward,
        ),
        Seam("avion.utils.distributed", "init_distributed_mode", ("args",), _init_distributed_mode),
        Seam(
            "avion.data.clip_dataset",
            "VideoCaptionDatasetCLIP.__init__",
            ("dataset", "metadata", "is_training"),
            _dataset_init,
        ),
        Seam("avion.data.clip_dataset", "VideoCaptionDatasetCLIP.__getitem__", ("i",), _dataset_getitem),
        Seam("avion.optim.schedulers", "cosine_scheduler", ("epochs", "niter_per_ep"), _cosine_scheduler),
    ),
    start_modules=(SCRIPT,),
    on_import={"avion.losses.losses": _take_flags},
    checkout="put a checkout of https://github.com/zhaoyue-zephyrus/AVION on PYTHONPATH",
)


@hookimpl
def mmts_host() -> Host:
    return HOST
