"""AVION's seams: functions and methods, replaced where they are defined; everything else stays as it is.

* Importing ``avion.losses.losses`` takes our flags out of ``sys.argv``: AVION parses it later, inside its scripts.
* ``get_args_parser`` of a script that ``run_with_submit_*`` imports: our flags travel to the job inside its arguments.
* ``avion.utils.distributed.init_distributed_mode`` is the first to see the parsed arguments; ``save_on_master`` writes
  them into checkpoints, which must load without us.
* ``avion.data.clip_dataset.VideoCaptionDatasetCLIP`` finds its training samples in the table when it is made, and hands
  out a sample's row in the place of its relevancy, which AVION's losses do not use.
* ``avion.models.model_clip.CLIP.forward`` sees the drawn captions' tokens, where it is those that count.
* ``avion.optim.schedulers.cosine_scheduler`` knows the length of the run; the array it returns is the clock.
* ``avion.utils.meters.ProgressMeter`` knows it too, also under ``--fix-lr``; its line shows where the schedule stands.
* ``avion.losses.losses``: ``MaxMarginRankingLoss.forward`` (fine-tuning) and ``ClipLoss.forward`` (pre-training) are
  ours in training, and AVION's own in validation.

Not patched: models, loaders, the optimizer, evaluation. The MM-TS authors' fork of AVION is left alone.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional

from .._startup import asks_for_us
from ..errors import ConfigError, SeamError
from ..hosts.host import Host, Seam
from ..hosts.registry import hookimpl
from ..options import flag_parser, split_flags

if TYPE_CHECKING:
    from ..adapters.avion import AVIONSession, Job
    from ..hosts.adapter import Adapter

FINETUNING, PRETRAINING = "main_lavila_finetune_mir", "main_lavila_pretrain"
_SUBMITTED = {
    "run_with_submit_lavila_finetune_mir.py": FINETUNING,
    "run_with_submit_lavila_pretrain.py": PRETRAINING,
}
_SCRIPTS = {f"{FINETUNING}.py": FINETUNING, f"{PRETRAINING}.py": PRETRAINING, **_SUBMITTED}
_FORK = "MMTSMaxMarginRankingLoss"

_job: Optional[Job] = None
_flags_of_job: Optional[PickledFlags] = None


class PickledFlags:
    """Our flags on their way into a job: submitit pickles AVION's arguments, and these with them. To unpickle them is
    to arm the job's process, whatever its own command line and environment are."""

    def __init__(self, script: str, flags: dict[str, Any]) -> None:
        self.script, self.flags = script, flags

    def __repr__(self) -> str:
        return repr(self.flags)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.script, self.flags)


def _unpickled(script: str, flags: dict[str, Any]) -> PickledFlags:
    global _flags_of_job
    _flags_of_job = PickledFlags(script, flags)
    HOST.install()
    return _flags_of_job


def _adapters() -> Sequence[Adapter]:
    from ..adapters import avion

    return avion.FINETUNING, avion.PRETRAINING


def _take_flags(module: ModuleType) -> None:
    global _job, _flags_of_job
    _job = None
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
    if script in _SCRIPTS and {"-h", "--help"} & set(sys.argv):
        print(flag_parser(_adapters()[0].options).format_help())
        return
    ours = _flags_of_job or _own_flags(script)
    if ours is None:
        return
    if script in _SUBMITTED:
        _flags_of_job = ours
    from ..adapters.avion import Job

    finetuning, pretraining = _adapters()
    _job = Job(pretraining if ours.script == PRETRAINING else finetuning, ours.flags, HOST.version())


def _own_flags(script: str) -> Optional[PickledFlags]:
    """Ours on this process's command line, and off it; ``None`` where there are none."""
    if not asks_for_us(sys.argv):
        return None
    from ..adapters.avion import authors_flags

    flags, rest = split_flags(authors_flags(sys.argv[1:]))
    if not flags:
        return None
    if script not in _SCRIPTS:
        raise ConfigError(f"{script or 'this process'}: in AVION, --loss mmts is for {', '.join(sorted(_SCRIPTS))}")
    sys.argv[1:] = rest
    return PickledFlags(_SCRIPTS[script], flags)


def _get_args_parser(original: Callable[..., Any]) -> Any:
    parser = original()
    if _flags_of_job is not None:
        parser.set_defaults(mmts_flags=_flags_of_job)
    return parser


def _init_distributed_mode(original: Callable[..., Any], args: Any) -> Any:
    result = original(args)
    if _job is not None:
        HOST.tell_wrappers()
        _job.begin(args)
    return result


def _save_on_master(original: Callable[..., Any], state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if "mmts_flags" in vars(state.get("args", object)):
        plain = copy.copy(state["args"])
        del plain.mmts_flags
        state = {**state, "args": plain}
    return original(state, *args, **kwargs)


class _Rows:
    """Of a data set's samples, in the table. A worker process that is spawned, not forked, unpickles them: only there
    does it learn of us, and patches the data set's class again."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.rows,)


def _restored(rows: Any) -> _Rows:
    HOST.install("avion.data.clip_dataset")
    return _Rows(rows)


def _dataset_init(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if _job is None or not self.is_training:
        return
    rows = _job.find(self)
    if rows is not None:
        self._mmts_rows = _Rows(rows)


def _dataset_getitem(original: Callable[..., Any], self: Any, i: int) -> Any:
    item = original(self, i)
    found = vars(self).get("_mmts_rows")
    return item if found is None else (*item[:-1], int(found.rows[i]))


def _model_forward(original: Callable[..., Any], self: Any, image: Any, text: Any) -> Any:
    run = _training_run()
    if run is not None:
        run.take_tokens(text)
    return original(self, image, text)


def _cosine_scheduler(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    schedule = original(*args, **kwargs)
    if _job is None:
        return schedule
    from ..adapters.avion import ClockSchedule

    return ClockSchedule.of(schedule, _job.start(len(schedule)).at_step)


def _progress_init(
    original: Callable[..., Any], self: Any, num_batches: int, meters: Sequence[Any], prefix: str = ""
) -> None:
    original(self, num_batches, meters if _job is None else _job.meters(num_batches, meters, prefix), prefix)


def _training_run() -> Optional[AVIONSession]:
    """Ours, in a training step; there it must have started by now."""
    if _job is None or not sys.modules["torch"].is_grad_enabled():
        return None
    if _job.run is None:
        raise SeamError(f"AVION {HOST.version()}: a training step before the length of the run was known: no clock")
    return _job.run


def _max_margin(
    original: Callable[..., Any], self: Any, image_features: Any, text_features: Any, weight: Any = None
) -> Any:
    """Called with the batch's last item, which carries our tags."""
    run = _training_run()
    if run is None:
        return original(self, image_features, text_features, weight)
    loss = run.loss_of_batch(self, image_features, text_features, weight)
    return {"loss": loss, "max_margin_loss": loss.detach()}


def _clip_loss(
    original: Callable[..., Any], self: Any, image_features: Any, text_features: Any, logit_scale: Any
) -> Any:
    run = _training_run()
    if run is None:
        return original(self, image_features, text_features, logit_scale)
    from ..adapters.avion import batch_accuracy

    # DDP expects a gradient for every parameter: the unused scale stays in the graph, with zero.
    loss = run.loss_of_batch(self, image_features, text_features) + 0.0 * logit_scale.sum()
    return {"loss": loss, "clip_acc": batch_accuracy(image_features, text_features, self.rank, self.world_size)}


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
            _max_margin,
        ),
        Seam("avion.losses.losses", "ClipLoss.forward", ("image_features", "text_features", "logit_scale"), _clip_loss),
        Seam("avion.utils.distributed", "init_distributed_mode", ("args",), _init_distributed_mode),
        Seam("avion.utils.distributed", "save_on_master", ("state",), _save_on_master),
        Seam("avion.utils.meters", "ProgressMeter.__init__", ("num_batches", "meters", "prefix"), _progress_init),
        Seam(
            "avion.data.clip_dataset",
            "VideoCaptionDatasetCLIP.__init__",
            ("dataset", "metadata", "is_training", "tokenizer"),
            _dataset_init,
        ),
        Seam("avion.data.clip_dataset", "VideoCaptionDatasetCLIP.__getitem__", ("i",), _dataset_getitem),
        Seam("avion.models.model_clip", "CLIP.forward", ("image", "text"), _model_forward),
        Seam("avion.optim.schedulers", "cosine_scheduler", ("epochs", "niter_per_ep"), _cosine_scheduler),
        *(Seam(f"scripts.{script}", "get_args_parser", (), _get_args_parser) for script in (FINETUNING, PRETRAINING)),
    ),
    adapters=_adapters,
    start_modules=tuple(_SCRIPTS),
    on_import={"avion.losses.losses": _take_flags},
    checkout="put a checkout of https://github.com/zhaoyue-zephyrus/AVION on PYTHONPATH",
)


@hookimpl
def mmts_host() -> Host:
    return HOST
