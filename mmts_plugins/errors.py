"""Errors a user can act on: each message names the file, flag or seam, what is wrong and what to do, in one line."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

LONGEST_MESSAGE = 480  # characters; with "mmts: error: " before it a line stays below 500
_HEAD = 300  # of a message that is cut: the rest, where causes and remedies stand, is its end


class MMTSError(Exception):
    """Base of every error raised on purpose. The command line prints it as one line, without a traceback.

    Whatever the message was made of (a parser's own several lines, a path of 4,000 characters, a file's content), what
    is shown is one line of at most ``LONGEST_MESSAGE`` characters.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(MMTSError):
    """A flag, preset or ``mmts.yaml`` holds a value that cannot be used."""


class TableError(MMTSError):
    """A cluster table cannot be read, or does not fit the run."""


class SeamError(MMTSError):
    """A host's seam is absent or has changed, so the schedule would silently not apply."""


def one_line(text: str) -> str:
    """Line breaks and runs of spaces to one space, what no terminal shows escaped, too long a middle cut out."""
    if len(text) > 8 * LONGEST_MESSAGE:  # before anything looks at each character
        text = text[: 4 * LONGEST_MESSAGE] + " ... " + text[-4 * LONGEST_MESSAGE :]
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    if len(text) > LONGEST_MESSAGE:
        text = text[:_HEAD] + " ... " + text[-(LONGEST_MESSAGE - _HEAD - 5) :]
    return text


class _Bounded(reprlib.Repr):
    """``repr`` that looks at few things: 500 bytes of YAML aliases are worth gigabytes written out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 4
        self.maxstring = self.maxother = 80
        self.maxlong = 40

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 4 * self.maxlong:  # writing it out takes quadratic time, and Python refuses 4,300 digits
            return f"<a whole number of {x.bit_length()} bits>"
        return repr(x)


def shown(value: Any) -> str:
    """A value that somebody gave, for a message: its ``repr``, bounded in depth and length, on one line."""
    try:
        return one_line(_Bounded().repr(value))
    except Exception:  # a value whose own repr fails is still to be named
        return f"<{type(value).__name__}>"


def listed(names: Sequence[str]) -> str:
    """Names that were found, for a message: at most ten of them."""
    found = ", ".join(shown(name if len(name) <= 60 else name[:57] + "...") for name in names[:10])
    return found + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@contextmanager
def reading(source: object, what: str, kind: type[MMTSError] = MMTSError) -> Iterator[None]:
    """Around everything that parses somebody's file: whatever goes wrong inside becomes one error that names the file.

    Parsers fail in more ways than anybody lists: a date 2001-99-99 in YAML is a ``ValueError``, deep nesting a
    ``RecursionError``, a header that promises 16 GiB a ``MemoryError``, half a zip a ``BadZipFile``. Ours pass.

    Args:
        source: the file (or flag) for the message.
        what: what could not be done, and what to do, such as ``"cannot be read as a cluster table"``.
        kind: the error to raise.

    Raises:
        MMTSError: of ``kind``.
    """
    try:
        yield
    except MMTSError:
        raise
    except Exception as error:
        raise kind(f"{source}: {what}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """An exception as the end of a message: what the system said, without the file that the message names already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    text = one_line(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))
    return text or type(error).__name__


def last_resort(error: BaseException) -> str:
    """Any exception as one line. One that is not ours is a fault of this package, and says so."""
    if isinstance(error, MMTSError):
        return str(error)
    if isinstance(error, OSError):
        return one_line(f"{error.filename}: {cause(error)}" if error.filename is not None else str(error))
    trace, where = error.__traceback__, "an unknown place"
    while trace is not None:
        where, trace = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}", trace.tb_next
    return one_line(
        f"{type(error).__name__} in {where}: {cause(error)}. This is a fault of mmts-plugins, not of yours: please "
        "report it, with the traceback that MMTS_DEBUG=1 shows"
    )
