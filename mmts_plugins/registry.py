"""The hosts that can be patched. Third parties add theirs through the entry-point group ``mmts_plugins.hosts``.

An entry point names a module with a function ``mmts_host()`` marked :data:`hookimpl`, which returns a ``Host``, or
several that share their code; the built-in hosts use the same door.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

import pluggy

if TYPE_CHECKING:
    from .patches._target import Host

PROJECT = "mmts_plugins"
GROUP = "mmts_plugins.hosts"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HostSpec:
    """What an entry point of the group ``mmts_plugins.hosts`` implements."""

    @hookspec
    def mmts_host(self) -> Union[Host, Sequence[Host]]:  # type: ignore[empty-body]
        """The host (or hosts) and its seams. Must not import the host."""


_hosts: list[Host] = []


def hosts() -> list[Host]:
    """All registered hosts, built-in and third-party; the same objects on every call."""
    if not _hosts:
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(HostSpec)
        manager.load_setuptools_entrypoints(GROUP)
        from .patches import avion, openclip, vast

        for built_in in (openclip, avion, vast):  # running from a checkout, without installed metadata
            if not manager.is_registered(built_in):
                manager.register(built_in)
        for found in manager.hook.mmts_host():
            _hosts.extend(found if isinstance(found, Sequence) else [found])
    return list(_hosts)


def install_all() -> None:
    """Arm the seams of every host, and print our errors as one line instead of a traceback."""
    for host in hosts():
        host.install()
    _quiet_excepthook()


def uninstall_all() -> None:
    for host in hosts():
        host.uninstall()


def _quiet_excepthook() -> None:
    from .errors import MMTSError

    previous = sys.excepthook
    if getattr(previous, "_mmts", False):
        return

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, MMTSError):
            print(f"mmts: error: {error}", file=sys.stderr, flush=True)
        else:
            previous(kind, error, trace)

    hook._mmts = True  # type: ignore[attr-defined]
    sys.excepthook = hook
