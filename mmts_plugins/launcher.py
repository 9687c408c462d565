"""``mmts run``: a host started with the plugin armed, without the start-up file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from .errors import ConfigError, SeamError, shown


def launch(arguments: Sequence[str], local_rank: Sequence[str] = ()) -> Callable[[], object]:
    """Arm the hosts, and what then becomes the target, as ``python -m`` or ``python SCRIPT`` would; it gets its rank.

    Raises:
        ConfigError: there is no such target, or it is asked for a schedule that nothing here can apply.
    """
    import runpy

    from ._startup import asks_for_us
    from .hosts import registry

    registry.install_all()
    as_module = arguments[0] == "-m"
    if as_module and len(arguments) < 2:
        raise ConfigError("mmts run -m: which module? For example: mmts run -m package.trainer --loss mmts ...")
    target, rest = (arguments[1], arguments[2:]) if as_module else (arguments[0], arguments[1:])
    safe_path = getattr(sys.flags, "safe_path", False)
    if as_module and not safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # where `python -m` looks first
    _check_exists(target, as_module)
    hosts = [host for host in registry.hosts() if host.starts(target, as_module)] if asks_for_us(rest) else []
    if asks_for_us(rest) and not hosts:
        known = dict.fromkeys(name for host in registry.hosts() for name in host.start_modules or ())
        problems = "".join(f"; {each}" for each in registry.broken())
        raise ConfigError(
            f"no adapter for {shown(target)}, so --loss mmts would do nothing; known: {', '.join(known)}{problems}"
        )
    sys.argv = [target, *local_rank, *rest]
    if as_module:
        started: Callable[[], object] = partial(runpy.run_module, target, run_name="__main__", alter_sys=True)
    else:
        if not safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(target))  # where `python SCRIPT` looks first
        started = partial(runpy.run_path, target, run_name="__main__")
    only_libraries = bool(hosts) and all(host.start_modules is None for host in hosts)
    return partial(_run_and_see, started, target) if only_libraries else started


def _run_and_see(started: Callable[[], object], target: str) -> None:
    """Run what may be a script of a library's user, and end with an error where nobody took the flags.

    Raises:
        SeamError: they are still on the command line. A host whose seam takes them is told before it trains.
    """
    from . import options

    started()
    if not options.taken:
        raise SeamError(f"{shown(target)} ended, and no adapter took --loss: what it trained, it trained without MM-TS")


def _check_exists(target: str, as_module: bool) -> None:
    if not as_module:
        if not target or "\0" in target or not os.path.exists(target):
            raise ConfigError(f"mmts run: there is no script {shown(target)}; for a module: mmts run -m MODULE")
        if os.path.isdir(target) and not os.path.exists(os.path.join(target, "__main__.py")):
            raise ConfigError(f"mmts run: {shown(target)} is a folder without a __main__.py; give the script in it")
        return
    import importlib.util

    try:
        found = not target.startswith(".") and importlib.util.find_spec(target) is not None
    except Exception as error:
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        if target and (name is None or not f"{target}.".startswith(f"{name}.")):
            return  # a package around it cannot be imported: Python says so when it runs
        found = False
    if not found:
        raise ConfigError(
            f"mmts run -m: there is no module {shown(target)} in this environment ({sys.executable}); for a file: "
            "mmts run SCRIPT"
        )
