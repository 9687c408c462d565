"""transformers' seams: its Trainer, with a model that has a contrastive loss of its own; see :mod:`.trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hosts.host import Host
from ..hosts.registry import hookimpl
from . import trainer

if TYPE_CHECKING:
    from ..adapters.trainer import TrainerAdapter


def _adapter() -> TrainerAdapter:
    from ..adapters.transformers import ADAPTER

    return ADAPTER


# The parser refuses flags that it does not know, and a script may parse before it imports the trainer.
_IMPORTED = ("transformers.hf_argparser", "transformers.trainer")
HOST = trainer.host("transformers", "transformers", "4.46 to 5.x", _IMPORTED, _adapter, "sentence_transformers")


@hookimpl
def mmts_host() -> Host:
    return HOST
