"""Multi-Modal Temperature and Margin Schedules (MM-TS, arXiv 2603.08202) as a plugin for contrastive trainers.

This module stays free of heavy imports: the start-up file imports it in every interpreter.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__", "install", "uninstall"]


def install() -> None:
    """Arm the hooks of every host adapter in this process, before the host is imported.

    Only needed where the command line does not carry our flags: notebooks, tests, a script that calls a host's
    ``main([...])`` itself. Idempotent. Without ``--loss mmts`` a patched host still behaves as before.
    """
    from .hosts import registry

    registry.install_all()


def uninstall() -> None:
    """Take every patch out again (those another tool has since wrapped are switched off in place, with a warning)."""
    from .hosts import registry

    registry.uninstall_all()
