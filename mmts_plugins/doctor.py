"""``mmts doctor``: before a run, everything that could keep the schedule from applying."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__
from .errors import MMTSError, SeamError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check hosts, seams, start-up file and cluster table before a run",
        description="Lists the hosts found, the state of every seam, whether the start-up file is in place, and "
        "whether a cluster table can be read. Exit status 1 if training with --loss mmts would not work.",
    )
    parser.add_argument("--clusters", metavar="FILE", help="a cluster table to check as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    problems = _environment() + _hosts()
    if args.clusters:
        problems += _table(args.clusters)
    print(f"\n{problems} problem(s) found" if problems else "\nno problem found")
    return 1 if problems else 0


def _line(state: str, what: str) -> None:
    print(f"  {state:<8} {what}")


def _environment() -> int:
    print("environment")
    _line("ok", f"mmts-plugins {__version__}, Python {platform.python_version()}, {sys.executable}")
    _line("ok", f"torch {metadata.version('torch')}")
    startup = [
        Path(str(found.locate()))
        for found in metadata.files("mmts-plugins") or ()
        if found.name in ("mmts_plugins.pth", "mmts_plugins.start")
    ]
    folders = {str(path.parent) for path in startup if path.exists()}
    if not folders:
        _line("PROBLEM", "no start-up file installed: use `mmts run -m ...`, or pip install mmts-plugins again")
        return 1
    if sys.flags.no_site:
        _line("PROBLEM", "this Python ignores start-up files (-S); use `mmts run -m ...`")
        return 1
    _line("ok", f"start-up file in {', '.join(sorted(folders))}")
    return 0


def _hosts() -> int:
    from . import registry

    problems = found = 0
    for host in registry.hosts():
        version = host.version()
        print(f"host {host.name} ({host.distribution} {version}; known: {host.versions})")
        if version == "not installed":
            _line("absent", host.checkout or f"pip install 'mmts-plugins[{host.name.lower()}]'")
            continue
        found += 1
        try:
            host.install()
        except SeamError as error:
            _line("PROBLEM", str(error))
            problems += 1
            continue
        for seam in host.seams:
            problems += _seam(host, seam)
        unmet = host.unmet()
        if unmet is not None or host.needs:
            _line("PROBLEM" if unmet else "ok", unmet or f"{', '.join(host.needs)}: can be imported")
        problems += int(unmet is not None)
    if not found:
        _line("PROBLEM", "no host is installed in this environment")
        problems += 1
    return problems


def _seam(host: Any, seam: Any) -> int:
    try:
        importlib.import_module(seam.module)
    except SeamError as error:
        _line("PROBLEM", str(error))
        return 1
    except ImportError as error:
        _line("PROBLEM", f"{seam}: cannot be imported: {error}")
        return 1
    state = host.status(seam)
    if state == "absent" and not seam.required:
        _line("ok", f"{seam}: not in this version")
        return 0
    _line("ok" if state == "installed" else "PROBLEM", f"{seam}: {state}")
    return int(state != "installed")


def _table(path: str) -> int:
    from .large import open_table

    print(f"cluster table {path}")
    try:
        table = open_table(path)
    except MMTSError as error:
        _line("PROBLEM", str(error))
        return 1
    _line("ok", f"{len(table)} {table.kind}s, {table.samples} samples, hash {table.content_hash}")
    _line("ok", f"{table.clusters} clusters, frequency from {table.summary.low:g} to {table.summary.high:g}")
    return 0
