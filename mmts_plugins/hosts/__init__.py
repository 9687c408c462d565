"""How a trainer is added: seams (:class:`Host`), conventions (:class:`Adapter`), a run of it (:class:`Session`).

``docs/add-a-host.md`` fills them in. Third parties register a host by the entry-point group ``mmts_plugins.hosts``.
Start-up passes through here, so whatever imports torch or reads tables is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..fields import Field
from ..options import Option
from ..presets import Preset
from .host import Host, Seam
from .registry import hookimpl

if TYPE_CHECKING:
    from .adapter import Adapter, Resolved
    from .session import Facts, Session

__all__ = ["Adapter", "Facts", "Field", "Host", "Option", "Preset", "Resolved", "Seam", "Session", "hookimpl"]

_LATER = {"Adapter": "adapter", "Resolved": "adapter", "Facts": "session", "Session": "session"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
