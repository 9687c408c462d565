"""The hosts that are known. Third parties add theirs through the entry-point group ``mmts_plugins.hosts``.

An entry point names a module with a function ``mmts_host()`` marked :data:`hookimpl`, which returns a ``Host``, or
several that share their code; the built-in hosts use the same door. One that cannot be loaded is :class:`Broken`, and
keeps nobody else from training.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, Union

import pluggy

from .._hooks import HalfImported
from ..errors import MMTSError, cause, last_resort, one_line

if TYPE_CHECKING:
    from ..options import Option
    from .adapter import Adapter
    from .host import Host

PROJECT = "mmts_plugins"
GROUP = "mmts_plugins.hosts"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HostSpec:
    """What an entry point of the group ``mmts_plugins.hosts`` implements."""

    @hookspec
    def mmts_host(self) -> Union[Host, Sequence[Host]]:  # type: ignore[empty-body]
        """The host (or hosts) and its seams. Must not import the host."""


@dataclass(frozen=True)
class Broken:
    """An adapter of somebody else that cannot be used.

    Attributes:
        name: of the entry point, or of its host.
        source: the entry point's value and its distribution, for messages.
        reason: in one line.
    """

    name: str
    source: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"the adapter {self.name!r} ({self.source}) cannot be used: {self.reason}")


_hosts: list[Host] = []
_built_in: list[Host] = []
_broken: list[Broken] = []


def hosts() -> list[Host]:
    """All registered hosts, built-in and third-party; the same objects on every call."""
    if not _hosts:
        from .. import patches

        for name in patches.BUILT_IN:  # by name, so that a checkout without installed metadata has them too
            _built_in.extend(_hosts_of(import_module(f"{patches.__name__}.{name}")))
        _hosts.extend(_built_in)
        for name, source, load in entry_points(GROUP):
            try:
                _hosts.extend(_hosts_of(load()))
            except (Exception, SystemExit) as error:
                _broken.append(Broken(name, source, _why(error)))
    return list(_hosts)


def broken() -> list[Broken]:
    """The third-party adapters that could not be loaded or installed."""
    hosts()
    return list(_broken)


def _hosts_of(plugin: Any) -> list[Host]:
    """What one plugin's ``mmts_host()`` returns, in a manager of its own: others' faults are not its.

    Raises:
        TypeError: it has no such function, or it returns something else than hosts.
    """
    from .host import Host

    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HostSpec)
    manager.register(plugin)
    results = manager.hook.mmts_host()
    if not results:
        raise TypeError("it has no function mmts_host() marked hookimpl that returns a Host")
    found = [each for result in results for each in (result if isinstance(result, Sequence) else [result])]
    for each in found:
        if not isinstance(each, Host):
            raise TypeError(f"mmts_host() returned a {type(each).__name__}, not a Host")
        each.check_fields()
    return found


def adapters() -> list[Adapter]:
    """The conventions of every host; some hosts have several."""
    found: dict[str, Adapter] = {}
    for host in hosts():
        for adapter in _adapters_of(host):
            found.setdefault(adapter.name, adapter)
    return list(found.values())


def _adapters_of(host: Host) -> Sequence[Adapter]:
    from .adapter import Adapter

    if any(host is each for each in _built_in):
        return host.adapters()
    try:
        found = host.adapters()
        for each in found:
            if not isinstance(each, Adapter):
                raise TypeError(f"its adapters() returned a {type(each).__name__}, not an Adapter")
            each.check_fields()
        return found
    except (Exception, SystemExit) as error:
        if not any(each.name == host.name for each in _broken):
            _broken.append(Broken(host.name, host.distribution, _why(error)))
        return ()


def owned_options() -> dict[str, tuple[Adapter, Option]]:
    """The options that only some hosts know, by name, each with the first adapter that has it."""
    found: dict[str, tuple[Adapter, Option]] = {}
    for adapter in adapters():
        for option in adapter.options:
            found.setdefault(option.name, (adapter, option))
    return found


def options_of_hosts() -> list[Option]:
    """The options that only some hosts know, each name once."""
    return [option for _, option in owned_options().values()]


@cache  # every installed package's metadata is looked at, and the losses are asked for often
def entry_points(group: str) -> tuple[tuple[str, str, Callable[[], Any]], ...]:
    """Name, source and loading function of each third-party plugin, once, whatever other metadata is damaged."""
    seen, found = set(), []
    for distribution in metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group == group]
            name = distribution.metadata["Name"]
        except Exception:  # somebody's damaged metadata: nothing to do with us
            continue
        for point in points:
            if point.value not in seen and not point.value.startswith(f"{PROJECT}."):
                seen.add(point.value)
                found.append((point.name, f"{point.value} of {name}", point.load))
    return tuple(found)


def _why(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {cause(error)}")


def install_all() -> None:
    """Arm the seams of every host, and print our errors as one line instead of a traceback."""
    from .. import _startup

    _startup.guard()
    for host in hosts():
        try:
            host.install()
        except Exception as error:
            if isinstance(error, (MMTSError, HalfImported)) or any(host is each for each in _built_in):
                raise
            _broken.append(Broken(host.name, host.distribution, _why(error)))
            _hosts.remove(host)
    quiet_excepthook()


def uninstall_all() -> None:
    for host in reversed(hosts()):  # of two at one function, the one that came last stands outside
        host.uninstall()


def quiet_excepthook() -> None:
    """Print our errors as one line, and so what goes wrong in code of ours; others' tracebacks stay as they are."""
    previous = sys.excepthook
    if getattr(previous, "_mmts", False):
        return

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, MMTSError) and not _is_ours(error, trace):
            previous(kind, error, trace)
            return
        if os.environ.get("MMTS_DEBUG"):
            traceback.print_exception(kind, error, trace)
        print(f"mmts: error: {last_resort(error)}", file=sys.stderr, flush=True)

    hook._mmts = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _is_ours(error: BaseException, trace: Any) -> bool:
    """Whether an error was raised in code of ours, or of a library that it called; not in a host's that it called."""
    if not isinstance(error, Exception) or isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return False
    theirs = {seam.module.split(".")[0] for host in _hosts for seam in host.seams} | {"__main__"}
    ours = False
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__")).split(".")[0]
        ours = package == PROJECT or (ours and package not in theirs)
        trace = trace.tb_next
    return ours
