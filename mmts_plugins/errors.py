"""Errors a user can act on: each message names the file, flag or seam, what is wrong and what to do."""

from __future__ import annotations


class MMTSError(Exception):
    """Base of every error raised on purpose. The command line prints it as one line, without a traceback."""


class ConfigError(MMTSError):
    """A flag, preset or ``mmts.yaml`` holds a value that cannot be used."""


class TableError(MMTSError):
    """A cluster table cannot be read, or does not fit the run."""


class SeamError(MMTSError):
    """A host's seam is absent or has changed, so the schedule would silently not apply."""
