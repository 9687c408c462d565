"""``mmts doctor``: before a run, everything that could keep the schedule from applying."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from . import __version__
from .errors import MMTSError, SeamError, cause, one_line


def run(table: Optional[str] = None) -> int:
    """Check hosts, losses and a table, and print what was found.

    Returns:
        1 if training with ``--loss mmts`` would not work, else 0.
    """
    problems = _environment() + _hosts() + _losses()
    if table:
        problems += _table(table)
    print(f"\n{problems} problem(s) found" if problems else "\nno problem found")
    return 1 if problems else 0


def _line(state: str, what: str) -> None:
    print(f"  {state:<8} {one_line(what)}")


def _environment() -> int:
    print("environment")
    _line("ok", f"mmts-plugins {__version__}, Python {platform.python_version()}, {sys.executable}")
    _line("ok", f"torch {_version('torch')}")
    try:
        files = metadata.files("mmts-plugins") or ()
    except metadata.PackageNotFoundError:  # run from a checkout
        files = ()
    startup = [Path(str(found.locate())) for found in files if found.name in ("mmts_plugins.pth", "mmts_plugins.start")]
    folders = {str(path.parent) for path in startup if path.exists()}
    if not folders:
        _line("PROBLEM", "no start-up file installed: use `mmts run -m ...`, or pip install mmts-plugins again")
        return 1
    if sys.flags.no_site:
        _line("PROBLEM", "this Python ignores start-up files (-S); use `mmts run -m ...`")
        return 1
    _line("ok", f"start-up file in {', '.join(sorted(folders))}")
    return 0


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # built here, or of another packager
        return str(getattr(importlib.import_module(distribution), "__version__", "of an unknown version"))


def _hosts() -> int:
    from .hosts import registry

    problems = found = 0
    for host in registry.hosts():
        try:
            is_here, wrong = _host(host)
        except (Exception, SystemExit) as error:  # an adapter of somebody else keeps nobody from seeing the others
            _line("PROBLEM", f"{host.name}: {type(error).__name__}: {cause(error)}")
            is_here, wrong = True, 1
        found += is_here
        problems += wrong
    if not found:
        _line("PROBLEM", "no host is installed in this environment")
        problems += 1
    broken = registry.broken()
    if broken:
        print("adapters of others")
    for each in broken:
        _line("PROBLEM", str(each))
    return problems + len(broken)


def _losses() -> int:
    from . import losses
    from .losses.kind import broken

    print("losses")
    wrong = broken()
    for problem in wrong:
        _line("PROBLEM", problem)
    bad = [name for name in losses.names() if any(f"the loss {name} " in problem for problem in wrong)]
    _line("ok", ", ".join(name for name in losses.names() if name not in bad))
    return len(wrong)


def _host(host: Any) -> tuple[bool, int]:
    """Whether it is installed, and how many problems it has."""
    version = host.version()
    print(f"host {host.name} ({host.distribution} {version}; known: {host.versions})")
    if version == "not installed" or not all(_is_there(seam.module.partition(".")[0]) for seam in host.seams[:1]):
        _line("absent", host.checkout or f"pip install 'mmts-plugins[{host.name.lower()}]'")
        return False, 0
    try:
        host.install()
    except (SeamError, ImportError) as error:
        _line("PROBLEM", str(error))
        return True, 1
    problems = sum(_seam(host, seam) for seam in host.seams)
    if not host.seams:
        _line("ok", "nothing is patched")
    unmet = host.unmet()
    if unmet is not None or host.needs:
        _line("PROBLEM" if unmet else "ok", unmet or f"{', '.join(host.needs)}: can be imported")
    return True, problems + int(unmet is not None)


def _is_there(package: str) -> bool:
    """Whether a package that a host's newer or older versions call otherwise can be found."""
    return importlib.util.find_spec(package) is not None


def _seam(host: Any, seam: Any) -> int:
    try:
        importlib.import_module(seam.module)
    except SeamError as error:
        _line("PROBLEM", str(error))
        return 1
    except ModuleNotFoundError as error:
        if error.name == seam.module and not seam.required:
            _line("ok", f"{seam}: not in this version")
            return 0
        _line("PROBLEM", f"{seam}: cannot be imported: {cause(error)}")
        return 1
    except (Exception, SystemExit) as error:  # a host written for other versions of its libraries fails in many ways
        _line("PROBLEM", f"{seam}: cannot be imported: {cause(error)}")
        return 1
    state = host.status(seam)
    if state == "absent" and not seam.required:
        _line("ok", f"{seam}: not in this version")
        return 0
    _line("ok" if state == "installed" else "PROBLEM", f"{seam}: {state}")
    return int(state != "installed")


def _table(path: str) -> int:
    from .tables import open_table

    print(f"cluster table {path}")
    try:
        table = open_table(path)
    except MMTSError as error:
        _line("PROBLEM", str(error))
        return 1
    _line("ok", f"{len(table)} {table.kind}s, {table.samples} samples, hash {table.content_hash}")
    _line("ok", f"{table.clusters} clusters, frequency from {table.summary.low:g} to {table.summary.high:g}")
    return 0
