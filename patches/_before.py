"""What start-up must know of the hosts before anything of theirs, or of ours, is imported. Standard library only."""

from __future__ import annotations

import os

WORDS = ("open_clip_train", "lavila_finetune_mir", "lavila_pretrain")
"""In the arguments of a process that starts one of them."""

READERS = {
    "open_clip_train.params": ("parse_args", "parse_args"),
    "utils.args": ("get_args", "parse_with_config"),
    "vast_utils.args": ("get_args", "parse_with_config"),
}
"""Of hosts whose parser takes ``--loss`` for an abbreviation: the function that reads the command line, and what else
its module has, where the name alone says nothing."""

PARSED_IN = (*READERS, "training.params", "avion.losses.losses")
"""Modules whose import comes before a host has read its command line."""


ALWAYS = {"open_clip.convert": "openclip", "open_clip.factory": "openclip"}
"""Modules with seams that every process has, each with the module here that knows them."""


def is_started_by(argument: str) -> bool:
    """Whether an argument starts a host: by a word in it; or VAST's ``run.py``, whose name says nothing by itself."""
    if any(word in argument for word in WORDS):
        return True
    beside = os.path.join(os.path.dirname(argument), "model", "general_module.py")
    return argument.endswith("run.py") and os.path.exists(beside)


def is_foreign(module: object) -> bool:
    """Whether a module of :data:`PARSED_IN` is somebody else's: the MM-TS authors' fork of AVION, whose flags of our
    names are its own; or a package called utils that is not VAST's."""
    if hasattr(module, "MMTSMaxMarginRankingLoss"):
        return True
    return "utils" in getattr(module, "__name__", "") and not hasattr(module, "parse_with_config")
