"""One comparison at a time in a folder."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from ..errors import MMTSError, cause, one_line

LOCK = "compare.lock"
PATIENCE = 30.0  # seconds; what ends the trainers of a killed comparison gives them less
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def locked(folder: Path) -> Iterator[Optional[int]]:
    """Hold the folder's lock, which the system releases with the last process that has it, however that ends.

    Yields:
        The descriptor, for commands to hold it as well; ``None`` where the file system has no locks, after a warning.

    Raises:
        MMTSError: another process has it, and is named; or the lock file is no plain file of its own.
    """
    path = folder / LOCK
    try:
        import fcntl
    except ImportError:  # Windows
        _warn(f"{path}: no locks on this system")
        yield None
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        why = "it is a link; remove it" if error.errno in (errno.ELOOP, errno.EMLINK) else cause(error)
        raise MMTSError(f"{path}: cannot be opened to lock the folder: {why}") from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # what we write into it is to be nobody's file
            raise MMTSError(f"{path}: cannot be used to lock the folder: it is no file of its own; remove it")
        until, said = time.monotonic() + PATIENCE, False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _TAKEN:
                    _warn(f"{path}: this file system has no locks ({cause(error)})")
                    yield None
                    return
                holder, gone = _holder(handle)
                if not gone:
                    raise MMTSError(f"{folder}: another mmts compare is at work there: {holder}") from None
                if time.monotonic() > until:
                    raise MMTSError(
                        f"{folder}: a command that an earlier mmts compare started there still runs ({holder} is gone)"
                    ) from None
                if not said:
                    print(f"waiting for what an earlier mmts compare left behind to end ({holder})", flush=True)
                said = True
                time.sleep(0.1)
            else:
                break
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _holder(handle: int) -> tuple[str, bool]:
    """Who wrote the lock file, in words; whether that process is certainly gone."""
    text = os.pread(handle, 200, 0).decode("utf-8", "replace")
    match = re.fullmatch(r"([1-9][0-9]{0,8}) (\S+) (.*)\n", text)
    if not match:
        return one_line(f"it has not said who it is {text}"), False
    pid, host, since = int(match[1]), match[2], match[3]
    gone = False
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            gone = True
        except OSError:
            pass  # somebody else's, but alive
    return one_line(f"process {pid} on {host}, since {since}"), gone


def _warn(why: str) -> None:
    print(f"mmts: warning: {why}: see to it that only one mmts compare runs in this folder", file=sys.stderr)
