"""The old place of :mod:`mmts_plugins.hosts.registry`."""

from __future__ import annotations

from .hosts.registry import GROUP, PROJECT, broken, hookimpl, hookspec, hosts, install_all, uninstall_all

__all__ = ["GROUP", "PROJECT", "broken", "hookimpl", "hookspec", "hosts", "install_all", "uninstall_all"]
