"""How a trainer is added: seams (:class:`Host`), conventions (:class:`Adapter`), a run of it (:class:`Session`).

``docs/add-a-host.md`` fills them in. Third parties register a host by the entry-point group ``mmts_plugins.hosts``.
:class:`Session` and :class:`Facts` import torch, the rest does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..fields import Field
from ..options import Option
from ..presets import Preset
from .adapter import Adapter, Resolved
from .host import Host, Seam
from .registry import hookimpl

if TYPE_CHECKING:
    from .session import Facts, Session

__all__ = ["Adapter", "Facts", "Field", "Host", "Option", "Preset", "Resolved", "Seam", "Session", "hookimpl"]


def __getattr__(name: str) -> Any:
    if name in ("Facts", "Session"):
        from . import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
