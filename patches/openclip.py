"""OpenCLIP's seams. Four functions, each replaced where it is defined; everything else of the host stays as it is.

* ``open_clip_train.params.parse_args`` takes our flags out before OpenCLIP's parser can abbreviate them.
* ``open_clip_train.data.get_data`` has the tokenizer, the length of the run and the epoch a resume starts at.
* ``open_clip.factory.create_loss`` (3.x) or ``create_task`` (4.x) makes the loss.
* ``open_clip_train.train.train_one_epoch`` holds the model, the scheduler and the loggers of an epoch.

Not patched: models, data loaders, optimizers, checkpoints, evaluation.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

from .. import losses
from .._startup import swallowed
from ..errors import ConfigError, SeamError
from ..hosts.host import Host, Seam
from ..hosts.registry import hookimpl
from ..options import flag_parser, split_flags

if TYPE_CHECKING:
    from ..adapters.openclip import Run
    from ..hosts.adapter import Adapter, Resolved

# What 3.x itself calls --loss-dist-impl; its parser takes --loss as an abbreviation of that.
_HOST_LOSS_VALUES = ("bidir", "shift", "reduce", "gather")

_resolved: Optional[Resolved] = None
_run: Optional[Run] = None


def _adapters() -> Sequence[Adapter]:
    from ..adapters.openclip import ADAPTER

    return (ADAPTER,)


def _parse_args(original: Callable[..., Any], args: Any) -> Any:
    global _resolved, _run
    _resolved = _run = None
    (adapter,) = _adapters()
    flags, rest = split_flags(sys.argv[1:] if args is None else args, adapter.options)
    found = swallowed(rest)
    if found is not None:
        raise ConfigError(
            f"{found}: OpenCLIP would take this for its own --loss-dist-impl, which changes nothing; write --loss"
        )
    if "-h" in rest or "--help" in rest:
        try:
            return original(rest)
        finally:
            print("\n" + flag_parser(adapter.options).format_help())
    if not flags or (set(flags) == {"loss"} and flags["loss"] in _HOST_LOSS_VALUES):
        return original(args)
    if flags.get("loss") not in (None, *losses.choices()):
        adapter.resolve(flags)  # says so, before anything else is looked at
    parsed = original(rest)
    from ..adapters.openclip import refuse_unsupported

    HOST.tell_wrappers()
    resolved = adapter.resolve(flags)
    refuse_unsupported(parsed)
    resolved.config.publish(parsed)
    _resolved = resolved
    return parsed


def _get_data(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    global _run
    data = original(*args, **kwargs)
    if _resolved is not None and "train" in data:
        from ..adapters.openclip import Run

        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        _run = Run(_resolved, values["args"], data, values["tokenizer"], values["epoch"], HOST.version())
    return data


def _watch(*batch: Any) -> None:
    assert _run is not None  # a loss made before its data is not called before
    _run.watch(*batch)


def _loss_called() -> None:
    if _run is not None and sys.modules["torch"].is_grad_enabled():
        _run.loss_taken()


def _wrapped(loss: Any, on_call: Optional[Callable[[], None]]) -> Any:
    from ..adapters.openclip import wrap_loss

    assert _resolved is not None
    return wrap_loss(_resolved, loss, _watch, on_call, HOST.version())


def _create_loss(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    loss = original(*args, **kwargs)
    return loss if _resolved is None else _wrapped(loss, _loss_called)


def _create_task(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    task = original(*args, **kwargs)
    if _resolved is not None:
        task.loss = _wrapped(getattr(task, "loss", None), None)
    return task


def _train_one_epoch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _resolved is None:
        return original(*args, **kwargs)
    if _run is None:
        raise SeamError(f"open_clip_torch {HOST.version()}: training starts, but its data were never seen by us")
    given = inspect.signature(original).bind(*args, **kwargs)
    given.apply_defaults()
    steps = _task_steps if "state" in given.arguments else _model_steps
    with steps(_run, given.arguments):
        return original(*given.args, **given.kwargs)


@contextmanager
def _model_steps(run: Run, arguments: dict[str, Any]) -> Iterator[None]:
    """3.x: the model's output is tagged on the outermost module, outside DDP and the compiled graph."""
    log = functools.partial(_log, arguments["args"], arguments["tb_writer"])
    run.begin_epoch(
        arguments["model"], arguments["loss"], arguments["epoch"], arguments["data"], arguments["args"], log
    )
    arguments["scheduler"] = _telling(run, arguments["scheduler"])
    hooks = (
        arguments["model"].register_forward_pre_hook(run.batch_starts),
        arguments["model"].register_forward_hook(run.tag, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _task_steps(run: Run, arguments: dict[str, Any]) -> Iterator[None]:
    """4.x: the task may be compiled whole, so temperatures are set on the loss where the batch is prepared."""
    state, args = arguments["state"], arguments["args"]
    task, scheduler = state.task, state.scheduler
    run.expects_loss = False  # a compiled one tells nobody
    prepare_batch, compute_accum_loss = task.prepare_batch, task.compute_accum_loss
    log = functools.partial(_log, args, arguments["tb_writer"])
    run.begin_epoch(
        task.trainable_module, getattr(task, "loss", None), state.epoch, arguments["data"], arguments["args"], log
    )
    group: deque[Any] = deque(maxlen=args.accum_freq)

    def prepare(batch: Any, *rest: Any, **kwargs: Any) -> Any:
        prepared = prepare_batch(batch, *rest, **kwargs)
        if "text" in prepared:  # not a part of a batch: it calls itself for nested dicts
            run.batch_starts()
            task.loss.temperature = run.of_batch(prepared["text"])
            group.append(task.loss.temperature)
            run.batch_done()
        return prepared

    def accumulated(*inputs: Any, **kwargs: Any) -> Any:
        import torch

        task.loss.temperature = torch.cat(tuple(group))
        return compute_accum_loss(*inputs, **kwargs)

    task.prepare_batch, task.compute_accum_loss = prepare, accumulated
    state.scheduler = _telling(run, scheduler)
    try:
        yield
    finally:
        del task.prepare_batch, task.compute_accum_loss
        state.scheduler = scheduler


def _telling(run: Run, scheduler: Optional[Callable[[int], Any]]) -> Optional[Callable[[int], Any]]:
    """The host calls its scheduler with the exact global step before each step, also after a resume."""
    if scheduler is None:
        return None

    def adjust(step: int) -> Any:
        run.at_step(step)
        return scheduler(step)

    return adjust


def _log(args: Any, writer: Any, values: dict[str, float], step: int) -> None:
    """To the loggers that the host writes to. Its own values of the same step follow, in the same W&B row."""
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    if getattr(args, "wandb", False):
        sys.modules["wandb"].log(values, step=step, commit=False)
    if getattr(args, "trackio", False):
        sys.modules["trackio"].log(values, step=step)


HOST = Host(
    name="OpenCLIP",
    distribution="open_clip_torch",
    package="open_clip",
    versions="3.3 and main (4.x)",
    seams=(
        Seam("open_clip_train.params", "parse_args", ("args",), _parse_args, takes_flags=True),
        Seam("open_clip_train.data", "get_data", ("args", "epoch", "tokenizer"), _get_data),
        Seam("open_clip.factory", "create_loss", ("args",), _create_loss),
        Seam("open_clip.factory", "create_task", ("args", "model"), _create_task, required=False),
        Seam("open_clip_train.train", "train_one_epoch", ("data", "args", "tb_writer"), _train_one_epoch),
    ),
    adapters=_adapters,
    start_modules=("open_clip_train.main",),
)


@hookimpl
def mmts_host() -> Host:
    return HOST
