"""The losses that temperatures (or margins) schedule: what one is (:mod:`.kind`), and one file for each.

A third party adds one by the entry-point group ``mmts_plugins.losses``: ``docs/add-a-loss.md``. Torch is imported with
the first module that is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .kind import MARGIN, TEMPERATURE, LossKind, choices, kind, names

if TYPE_CHECKING:
    from .infonce import InfoNCELoss
    from .max_margin import MaxMarginLoss

__all__ = ["MARGIN", "TEMPERATURE", "InfoNCELoss", "LossKind", "MaxMarginLoss", "choices", "kind", "names"]


def __getattr__(name: str) -> Any:
    if name == "InfoNCELoss":
        from .infonce import InfoNCELoss

        return InfoNCELoss
    if name == "MaxMarginLoss":
        from .max_margin import MaxMarginLoss

        return MaxMarginLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
