"""What runs at interpreter start (``mmts_plugins.pth``; ``mmts_plugins.start`` from Python 3.15).

It looks at the arguments: standard library only, and nothing but ``sys`` and ``os`` unless they ask for us. A run armed
here and one armed by ``python -m mmts_plugins run`` are the same from then on.

Why it is on by default: without it OpenCLIP reads ``--loss mmts`` as an abbreviation of ``--loss-dist-impl`` and trains
plain CLIP without a word.
"""

from __future__ import annotations

import os
import sys

_HOST_WORDS = ("open_clip_train", "lavila_finetune_mir", "lavila_pretrain")
_started = False


def _names_host(arguments: list[str]) -> bool:
    return any(word in argument for argument in arguments for word in _HOST_WORDS)


def _is_vast(argument: str) -> bool:
    """The name of VAST's script, ``run.py``, says nothing by itself."""
    beside = os.path.join(os.path.dirname(argument), "model", "general_module.py")
    return argument.endswith("run.py") and os.path.exists(beside)


def asks_for_us(arguments: list[str]) -> bool:
    """Whether a command line carries one of our flags, or a misspelling that a host would swallow."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, has_value, value = argument.partition("=")
        if name.startswith("--mmts-"):
            return True
        # Hosts abbreviate: --los is read as --loss-dist-impl just as --loss is. In VAST --loss is --loss_type, so there
        # only what looks like ours asks for us.
        if name in ("--loss", "--los"):
            start = (value if has_value else following)[:2]
            if _names_host(arguments) or start == "mm" or (start == "mt" and any(map(_is_vast, arguments))):
                return True
    return False


def start() -> None:
    """Arm the hosts' seams if this process asks for MM-TS. Idempotent: a virtual environment runs a ``.pth`` twice."""
    global _started
    switch = os.environ.get("MMTS")
    arguments = list(getattr(sys, "orig_argv", sys.argv))
    asked = asks_for_us(arguments)
    wants_help = (_names_host(arguments) or any(map(_is_vast, arguments))) and (
        "--help" in arguments or "-h" in arguments
    )
    if _started or not (asked or switch == "1" or (wants_help and switch != "0")):
        return
    _started = True
    if switch == "0":
        # Switched off, yet asked for: the host must not mistake our flags for its own.
        _refuse("MMTS=0 switches mmts-plugins off, but the command line asks for it; unset MMTS or drop the flags")
        return
    try:
        from . import registry

        registry.install_all()
    except Exception as error:  # an exception here would be printed by site and then ignored
        _refuse(f"mmts-plugins could not start: {type(error).__name__}: {error}")


def _refuse(reason: str) -> None:
    """Make the hosts' argument parsing fail: nothing else of this process is any of our business."""
    from . import _hooks

    def refuse(module: object) -> None:
        if hasattr(module, "MMTSMaxMarginRankingLoss"):
            return  # the MM-TS authors' fork of AVION: flags of our names are its own
        if "utils" in getattr(module, "__name__", "") and not hasattr(module, "parse_with_config"):
            return  # a package called utils, and not VAST's
        raise SystemExit(f"mmts: error: {reason}")

    for module in ("open_clip_train.params", "training.params", "avion.losses.losses", "utils.args", "vast_utils.args"):
        _hooks.after_import(module, refuse)
