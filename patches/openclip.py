"""OpenCLIP's seams. Each function is replaced where it is defined; everything else of the host stays as it is.

* ``open_clip_train.params.parse_args`` takes our flags out before OpenCLIP's parser can abbreviate them.
* ``open_clip_train.data.get_data`` has the tokenizer, the length of the run and the epoch a resume starts at.
* ``open_clip.factory.create_loss`` (to 3.x) or ``create_task`` (4.x) makes the loss.
* ``open_clip_train.train.train_one_epoch`` holds the model, the scheduler and the loggers of an epoch.
* ``open_clip.factory.create_model`` makes the model, whose geometry the flags of the product sphere change.
* ``open_clip.convert.convert_state_dict`` sees weights and model before the one is loaded into the other. Every process
  has these two: a checkpoint that says what it is needs no flag.

Until 2.24 the trainer is called ``training``, as in many a fork: a host of its own, with the same functions.

Not patched: data loaders, optimizers, evaluation.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

from .. import _startup, losses
from .._startup import swallowed
from ..errors import ConfigError, SeamError
from ..hosts.host import Host, Seam
from ..hosts.registry import hookimpl
from ..options import field_of, flag_of, flag_parser, split_flags

if TYPE_CHECKING:
    from ..adapters.openclip import OpenCLIPSession
    from ..adapters.openclip_geometry import Geometry, Request
    from ..hosts.adapter import Adapter, Resolved

_MARKER = "mmts_product_sphere"  # as the adapter has it, which need not be imported to look for it
# What 3.x itself calls --loss-dist-impl; its parser takes --loss as an abbreviation of that.
_HOST_LOSS_VALUES = ("bidir", "shift", "reduce", "gather")

_GEOMETRY_SINCE = [3, 2]

_resolved: Optional[Resolved] = None
_run: Optional[OpenCLIPSession] = None
_request: Optional[Request] = None
_args: Any = None  # OpenCLIP's, until its model is made
_former = False  # whether its trainer is called training


def _host() -> Host:
    return FORMER if _former else HOST


def _version() -> str:
    return _host().version()


def _adapters() -> Sequence[Adapter]:
    from ..adapters.openclip import ADAPTER

    return (ADAPTER,)


def _parse_args(original: Callable[..., Any], args: Any) -> Any:
    global _resolved, _run, _request, _args, _former
    _resolved = _run = _request = _args = None
    _former = original.__module__.startswith("training.")
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
    from ..adapters import openclip_geometry
    from ..adapters.openclip import refuse_unsupported

    of_model = {field_of(name): value for name, value in flags.items() if field_of(name) in openclip_geometry.NAMES}
    if of_model:
        _check_age(flag_of(next(iter(of_model))))
    others = {name for name in flags if field_of(name) not in of_model}
    if others == {"loss"} and flags["loss"] in _HOST_LOSS_VALUES:
        others, rest = set(), [*rest, "--loss", flags["loss"]]
    if not others:
        parsed = original(rest if of_model else args)
        _request = openclip_geometry.request_of(of_model)
        if _request is not None:
            openclip_geometry.refuse(_request, parsed, None)
            _host().tell_wrappers()
            for name in openclip_geometry.NAMES:
                setattr(parsed, f"mmts_{name}", of_model.get(name))
        _args = parsed
        return parsed
    if flags.get("loss") not in (None, *losses.choices()):
        adapter.resolve(flags)  # says so, before anything else is looked at
    parsed = original(rest)
    _host().tell_wrappers()
    resolved = adapter.resolve(flags)
    refuse_unsupported(parsed)
    request = openclip_geometry.request_of(resolved.config.own)
    if request is not None:
        openclip_geometry.refuse(request, parsed, resolved.config.loss)
    resolved.config.publish(parsed)
    _resolved, _request, _args = resolved, request, parsed
    return parsed


def _check_age(what: str) -> None:
    """Raise :class:`ConfigError` where models are built in another way than our towers are."""
    version = [int(part) for part in re.findall(r"\d+", _version())[:2]]
    if _former or version < _GEOMETRY_SINCE:
        raise ConfigError(f"{what}: needs OpenCLIP 3.2 or newer, and this is {_version()}")


def _create_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The trained model is the first that is made after the command line was read."""
    global _args
    model = original(*args, **kwargs)
    options, _args = _args or _startup.parsed.pop("open_clip_train.params", None), None
    if options is None:
        return model
    from ..adapters import openclip_geometry

    _startup.parsed.clear()
    say = openclip_geometry.prepare(model, _request, options)
    if say is not None and getattr(options, "rank", 0) == 0:
        logging.info("MM-TS: %s", say)
    return model


def _convert_state_dict(original: Callable[..., Any], model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    state = original(model, state_dict, *args, **kwargs)
    if isinstance(state, dict) and _MARKER in state:
        from ..adapters.openclip_geometry import follow

        _check_age(f"a checkpoint with {_MARKER}")
        return follow(model, state)
    return state


def _get_data(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    global _run
    data = original(*args, **kwargs)
    if _resolved is not None and "train" in data:
        from ..adapters.openclip import OpenCLIPSession

        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        _run = OpenCLIPSession(_resolved, values["args"], data, values["tokenizer"], values["epoch"], _version())
    return data


def _watch(*batch: Any) -> None:
    if _run is not None:  # a loss made before its data is not called before
        _run.watch(*batch)


def _loss_called() -> None:
    if _run is None:
        raise SeamError(f"open_clip_torch {_version()}: its loss is called, but its data were never seen by us")
    if sys.modules["torch"].is_grad_enabled():
        _run.loss_taken()


def _wrapped(resolved: Resolved, loss: Any, on_call: Optional[Callable[[], None]]) -> Any:
    from ..adapters.openclip import wrap_loss

    return wrap_loss(resolved, loss, _watch, on_call, _version())


def _distance() -> Optional[Geometry]:
    """The geometry of a run whose loss compares by something else than inner products."""
    geometry = None if _request is None else _request.geometry
    return geometry if geometry is not None and geometry.distance != "inner" else None


def _create_loss(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    loss = original(*args, **kwargs)
    geometry = _distance()
    if geometry is not None:
        from ..adapters.openclip_geometry import compare_by

        compare_by(loss, geometry, _version())
    return loss if _resolved is None else _wrapped(_resolved, loss, _loss_called)


def _create_task(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    task = original(*args, **kwargs)
    if _request is not None:
        from ..adapters.openclip_geometry import compare_by, highest_of

        geometry, highest = _distance(), highest_of(_request)
        if geometry is not None:
            compare_by(getattr(task, "loss", None), geometry, _version())
        if highest is not None:
            task.clamp_logit_scale = functools.partial(task.clamp_logit_scale, highest)
    if _resolved is not None:
        task.loss = _wrapped(_resolved, getattr(task, "loss", None), None)
    return task


def _train_one_epoch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _resolved is None:
        return original(*args, **kwargs)
    if _run is None:
        raise SeamError(f"open_clip_torch {_version()}: training starts, but its data were never seen by us")
    given = inspect.signature(original).bind(*args, **kwargs)
    given.apply_defaults()
    steps = _task_steps if "state" in given.arguments else _model_steps
    lacking = [name for name in _OF_AN_EPOCH if name not in given.arguments and steps is _model_steps]
    if lacking:
        raise SeamError(
            f"open_clip_torch {_version()}: {original.__module__}.train_one_epoch has changed: no parameter "
            f"{lacking[0]!r} in ({', '.join(given.signature.parameters)})"
        )
    with steps(_run, given.arguments):
        return original(*given.args, **given.kwargs)


@contextmanager
def _model_steps(run: OpenCLIPSession, arguments: dict[str, Any]) -> Iterator[None]:
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
def _task_steps(run: OpenCLIPSession, arguments: dict[str, Any]) -> Iterator[None]:
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


def _telling(run: OpenCLIPSession, scheduler: Optional[Callable[[int], Any]]) -> Optional[Callable[[int], Any]]:
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


_OF_AN_EPOCH = ("model", "data", "loss", "scheduler", "args", "tb_writer")


def _seams_of(trainer: str, of_an_epoch: tuple[str, ...]) -> tuple[Seam, ...]:
    return (
        Seam(f"{trainer}.params", "parse_args", ("args",), _parse_args, takes_flags=True),
        Seam(f"{trainer}.data", "get_data", ("args", "epoch", "tokenizer"), _get_data),
        Seam(f"{trainer}.train", "train_one_epoch", of_an_epoch, _train_one_epoch),
    )


HOST = Host(
    name="OpenCLIP",
    distribution="open_clip_torch",
    package="open_clip",
    versions="2.26 to 3.3, and main (4.x)",
    seams=(
        *_seams_of("open_clip_train", ("data", "args", "tb_writer")),
        Seam("open_clip.factory", "create_model", ("model_name", "pretrained"), _create_model, always=True),
        Seam(
            "open_clip.convert",
            "convert_state_dict",
            ("model", "state_dict"),
            _convert_state_dict,
            required=False,
            always=True,
        ),
        Seam("open_clip.factory", "create_loss", ("args",), _create_loss),
        Seam("open_clip.factory", "create_task", ("args", "model"), _create_task, required=False),
    ),
    adapters=_adapters,
    start_modules=("open_clip_train.main",),
)
FORMER = Host(
    name="OpenCLIP (training)",
    distribution=HOST.distribution,
    package=HOST.package,
    versions="2.16 to 2.24, and forks with its trainer",
    seams=_seams_of("training", _OF_AN_EPOCH),  # its loss is made where the other's is
    adapters=_adapters,
    start_modules=("training.main",),
    checkout="pip install 'open_clip_torch<2.25', or a checkout with the folders training and open_clip on PYTHONPATH",
    root_files=tuple(f"training/{name}.py" for name in ("params", "data", "train", "zero_shot", "scheduler")),
)


@hookimpl
def mmts_host() -> tuple[Host, Host]:
    return HOST, FORMER
