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

from ..config import LOSSES, flag_parser, split_flags
from ..errors import ConfigError, one_line
from ..registry import hookimpl
from ._target import Host, Seam, Wrapper

if TYPE_CHECKING:
    from ..adapters.vast import Run

_GRAM = "GRAM"
_ENCODER = "model.text_encoders.bert.bert"
_ADVICE = "VAST was written for transformers 4.31: pip install 'transformers>=4.31,<4.56'"

_run: Optional[Run] = None


def _get_args(name: str, original: Callable[[], Any]) -> Any:
    global _run
    _run = None
    if {"-h", "--help"} & set(sys.argv[1:]):
        try:
            return original()
        finally:
            print("\n" + flag_parser().format_help())
    flags, rest = split_flags(sys.argv[1:])
    _refuse_abbreviations(rest)
    if not flags or _is_vasts_own(flags):
        return original()
    from ..adapters import vast as adapter

    host = next(host for host in HOSTS if host.name == name)
    run = adapter.Run(flags, adapter.GRAM if name == _GRAM else adapter.VAST, host.version())
    unmet = host.unmet()
    if unmet is not None:
        raise ConfigError(f"{name}: {unmet}")
    host.tell_wrappers()
    sys.argv[1:] = rest
    args = original()
    _warn_if_only_evaluated(args.run_cfg)
    _run = run
    return args


def _warn_if_only_evaluated(run_cfg: Any) -> None:
    mode = getattr(run_cfg, "mode", "training")
    why = "--zero_shot" if getattr(run_cfg, "zero_shot", False) else "" if mode == "training" else f"--mode {mode}"
    if why and os.environ.get("RANK", "0") == "0":
        print(one_line(f"MM-TS: warning: --loss mmts changes nothing here: {why} trains nothing"), flush=True)


def _is_vasts_own(flags: dict[str, Any]) -> bool:
    """VAST reads ``--loss X`` as an abbreviation of its ``--loss_type``; near misses of ours are no such thing."""
    value = flags.get("loss", "mmts")
    return set(flags) == {"loss"} and not value.startswith("mm") and not difflib.get_close_matches(value, LOSSES)


def _refuse_abbreviations(rest: Sequence[str]) -> None:
    for word, following in zip(rest, [*rest[1:], ""]):
        name, has_value, value = word.partition("=")
        if name.startswith("--los") and (value if has_value else following) in LOSSES:
            raise ConfigError(f"{word}: VAST would take this for its --loss_type, which changes nothing; write --loss")


def _train(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _run is not None:
        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        run_cfg = values["run_cfg"] if "run_cfg" in values else values["args"].run_cfg  # GRAM passes all of them
        log = inspect.unwrap(original).__globals__["LOGGER"]
        _run.prepare(values["model"], values["train_loader"].name2loader, run_cfg, values["start_step"], log)
    return original(*args, **kwargs)


def _get_lr_sched(original: Callable[..., Any], global_step: int, opts: Any) -> Any:
    ratio = original(global_step, opts)
    if _run is not None:
        _run.set_step(global_step)
    return ratio


def _forward_ret(original: Callable[..., Any], self: Any, batch: Any, task: str, compute_loss: bool = True) -> Any:
    if _run is None or not compute_loss:
        return original(self, batch, task, compute_loss=compute_loss)
    return _run.forward_ret(original, self, batch, task)


def _forward_vast27m(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _run is not None:
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
    return Host(
        name=name,
        distribution=url,
        package=module,
        versions=versions,
        seams=(
            Seam(f"{utils}.args", "get_args", (), get_args),
            Seam(f"{utils}.pipeline", "train", ("model", "train_loader", "start_step"), _train),
            Seam(f"{utils}.sched", "get_lr_sched", ("global_step", "opts"), _get_lr_sched),
            Seam(module, f"{cls}.forward_ret", ("batch", "task", "compute_loss"), _forward_ret, uses=("contra_temp",)),
            Seam(module, f"{cls}.forward_ret_vast27m", ("batch", "task"), _forward_vast27m, required=False),
        ),
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
