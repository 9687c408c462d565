"""sentence-transformers' seams: those of Hugging Face's Trainer, of which its own is made; see :mod:`.trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hosts.host import Host
from ..hosts.registry import hookimpl
from . import trainer

if TYPE_CHECKING:
    from ..adapters.trainer import TrainerAdapter


def _adapter() -> TrainerAdapter:
    from ..adapters.sentence_transformers import ADAPTER

    return ADAPTER


_IMPORTED = ("sentence_transformers.base.trainer", "sentence_transformers.trainer")  # from 5.3; until then
HOST = trainer.host("sentence-transformers", "sentence_transformers", "3.4 to 6.x", _IMPORTED, _adapter)


@hookimpl
def mmts_host() -> Host:
    return HOST
