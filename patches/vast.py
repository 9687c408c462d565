"""VAST's seams, and those of two repositories derived from it. Everything else stays as it is.

* ``utils.args.get_args`` takes our flags out of ``sys.argv`` before VAST's parser can abbreviate them.
* ``utils.pipeline.train`` knows the length of the run, where a resumed one starts, and the training annotations.
* ``utils.sched.get_lr_sched`` is called with the exact global step after each forward pass: the clock.
* ``model.vast.VAST.forward_ret`` computes the losses: ours in training, VAST's own in evaluation.

``drew-g-ross/VAST`` calls its ``utils`` ``vast_utils``; ``ispamm/GRAM`` calls its model ``model.gram.GRAM``. Others
call modules ``utils`` and ``model`` too: only those in a checkout that has VAST's files are touched.

Not patched: encoders, loaders, the optimizer, checkpoints, evaluation.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Optional

from .. import losses
from ..errors import ConfigError, SeamError, one_line
from ..hosts.host import Host, Seam, Wrapper
from ..hosts.registry import hookimpl
from ..options import flag_parser, split_flags

if TYPE_CHECKING:
    from ..adapters.vast import Vast, VASTSession
    from ..hosts.adapter import Adapter, Resolved

_GRAM = "GRAM"
_ENCODER = "model.text_encoders.bert.bert"
_ADVICE = "VAST was written for transformers 4.31: pip install 'transformers>=4.31,<4.56'"

_resolved: Optional[tuple[Vast, Resolved]] = None
_run: Optional[VASTSession] = None


def _adapter(name: str) -> Vast:
    from ..adapters import vast

    return vast.GRAM if name == _GRAM else vast.VAST


def _adapters(name: str) -> Sequence[Adapter]:
    return (_adapter(name),)


def _get_args(name: str, original: Callable[[], Any]) -> Any:
    global _resolved, _run
    _resolved = _run = None
    adapter = _adapter(name)
    if {"-h", "--help"} & set(sys.argv[1:]):
        try:
            return original()
        finally:
            print("\n" + flag_parser(adapter.options).format_help())
    flags, rest = split_flags(sys.argv[1:], adapter.options)
    _refuse_abbreviations(rest)
    if not flags or _is_vasts_own(flags):
        return original()
    host = _host_of(name)
    resolved = adapter.resolve(flags)
    unmet = host.unmet()
    if unmet is not None:
        raise ConfigError(f"{name}: {unmet}")
    host.tell_wrappers()
    sys.argv[1:] = rest
    args = original()
    _warn_if_only_evaluated(args.run_cfg)
    _resolved = adapter, resolved
    return args


def _host_of(name: str) -> Host:
    return next(host for host in HOSTS if host.name == name)


def _warn_if_only_evaluated(run_cfg: Any) -> None:
    mode = getattr(run_cfg, "mode", "training")
    why = "--zero_shot" if getattr(run_cfg, "zero_shot", False) else "" if mode == "training" else f"--mode {mode}"
    if why and os.environ.get("RANK", "0") == "0":
        print(one_line(f"MM-TS: warning: --loss mmts changes nothing here: {why} trains nothing"), flush=True)


def _is_vasts_own(flags: dict[str, Any]) -> bool:
    """VAST reads ``--loss X`` as an abbreviation of its ``--loss_type``; near misses of ours are no such thing."""
    value = flags.get("loss", "mmts")
    return (
        set(flags) == {"loss"} and not value.startswith("mm") and not difflib.get_close_matches(value, losses.choices())
    )


def _refuse_abbreviations(rest: Sequence[str]) -> None:
    for word, following in zip(rest, [*rest[1:], ""]):
        name, has_value, value = word.partition("=")
        if name.startswith("--los") and (value if has_value else following) in losses.choices():
            raise ConfigError(f"{word}: VAST would take this for its --loss_type, which changes nothing; write --loss")


def _train(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    global _run
    if _resolved is not None:
        from ..adapters.vast import VASTSession

        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        run_cfg = values["run_cfg"] if "run_cfg" in values else values["args"].run_cfg  # GRAM passes all of them
        log = inspect.unwrap(original).__globals__["LOGGER"]
        loaders, first = values["train_loader"].name2loader, values["start_step"]
        _run = VASTSession(*_resolved, values["model"], loaders, run_cfg, first, log, _host_of(name).version())
    return original(*args, **kwargs)


def _get_lr_sched(original: Callable[..., Any], global_step: int, opts: Any) -> Any:
    ratio = original(global_step, opts)
    run = _started()
    if run is not None:
        run.after_step(global_step)
    return ratio


def _started() -> Optional[VASTSession]:
    if _resolved is not None and _run is None:
        raise SeamError("VAST: a training step before its loop was seen to start")
    return _run


def _forward_ret(original: Callable[..., Any], self: Any, batch: Any, task: str, compute_loss: bool = True) -> Any:
    run = _started() if compute_loss else None
    if run is None:
        return original(self, batch, task, compute_loss=compute_loss)
    return run.forward_ret(original, self, batch, task)


def _forward_vast27m(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _resolved is not None:
        _refuse_pretraining()
    return original(*args, **kwargs)


def _refuse_pretraining() -> NoReturn:
    raise ConfigError(
        "this data set has VAST-27M's vision, audio or omni captions: several for one clip, each with a loss of its "
        "own (forward_ret_vast27m). --loss mmts is for data sets with one caption a clip"
    )


def _host(name: str, url: str, versions: str, utils: str, model: str) -> Host:
    module, _, cls = model.rpartition(".")
    get_args: Wrapper = partial(_get_args, name)
    train: Wrapper = partial(_train, name)
    return Host(
        name=name,
        distribution=url,
        package=module,
        versions=versions,
        seams=(
            Seam(f"{utils}.args", "get_args", (), get_args, takes_flags=True),
            Seam(f"{utils}.pipeline", "train", ("model", "train_loader", "start_step"), train),
            Seam(f"{utils}.sched", "get_lr_sched", ("global_step", "opts"), _get_lr_sched),
            Seam(module, f"{cls}.forward_ret", ("batch", "task", "compute_loss"), _forward_ret, uses=("contra_temp",)),
            Seam(module, f"{cls}.forward_ret_vast27m", ("batch", "task"), _forward_vast27m, required=False),
        ),
        adapters=partial(_adapters, name),
        start_modules=("run.py",),
        checkout=f"put a checkout of https://github.com/{url} on PYTHONPATH",
        root_files=(
            "run.py",
            f"{utils}/args.py",
            f"{module.replace('.', '/')}.py",
            "model/general_module.py",
            "data/IndexAnno.py",
        ),
        needs={_ENCODER: _ADVICE},
    )


HOSTS = (
    _host("VAST", "DelusionalLogic/VAST", "at commit 410ca47", "utils", "model.vast.VAST"),
    _host("VAST (vast_utils)", "drew-g-ross/VAST", "at commit 8b65b36", "vast_utils", "model.vast.VAST"),
    _host(_GRAM, "ispamm/GRAM", "at commit b70c5c2", "utils", "model.gram.GRAM"),
)


@hookimpl
def mmts_host() -> Sequence[Host]:
    return HOSTS
