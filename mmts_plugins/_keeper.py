"""Runs one command, and sees to it that nothing of it outlives whoever asked for it. A script: standard library only.

``python -IS _keeper.py LIFE HELD COMMAND...``: ``LIFE`` is the reading end of a pipe whose other end only the asker
holds, so that it closes with the asker, however it dies (SIGKILL too). ``HELD`` is a descriptor, or -1, that the
command gets and never uses: a lock in it is held until the last of them is gone.

When the pipe closes, when the keeper is told to end, and when the command has ended, whatever of its processes is left
is ended too: asked (SIGTERM), then killed. On Linux that is every descendant, also one in a session of its own
(torchrun's workers), because orphans of the command come to the keeper; elsewhere it is the command's process group.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

LINUX = sys.platform.startswith("linux")
GRACE = 10.0  # seconds that a trainer has to end by itself; schedulers give 30 before they kill us
CANNOT_START = 127  # as a shell says it
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _descendants() -> list[int]:
    """Every process below this one, orphans included: they are given to us."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])  # a name may hold blanks and brackets
            except OSError:
                continue  # ended meanwhile
            children.setdefault(parent, []).append(int(name))
    found, open_ends = [], [os.getpid()]
    while open_ends:
        below = children.get(open_ends.pop(), [])
        found += below
        open_ends += below
    return found


class Keeper:
    """The command and what it started."""

    def __init__(self, command: list[str], held: int) -> None:
        me = os.getpid()

        def tie() -> None:  # the last resort: somebody kills the keeper itself
            _prctl(_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != me:
                os._exit(CANNOT_START)

        if LINUX:
            _prctl(_SET_CHILD_SUBREAPER, 1)
        self._process = subprocess.Popen(  # held: when it is dropped, Python collects the status that we wait for
            command,
            start_new_session=True,
            pass_fds=() if held < 0 else (held,),
            preexec_fn=tie if LINUX else None,  # no thread but this one
        )
        self.main = self._process.pid
        self.status: int | None = None  # of the command, once it has ended

    def reap(self) -> bool:
        """Collect who has ended; whether anybody is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.main:
                self.status = status

    def left(self) -> list[int]:
        if LINUX:
            return _descendants()
        try:
            os.killpg(self.main, 0)
        except OSError:
            return []
        return [-self.main]

    def end(self) -> None:
        """The command first, which may want to end its own in order; then whoever is left.

        Where the command has ended by itself, its helpers may be about to do so too: they are asked a little later.
        """
        first = (signal.SIGTERM, GRACE, True) if self.status is None else (0, GRACE / 5, False)
        for how, seconds, only_main in (first, (signal.SIGTERM, GRACE / 5, False), (signal.SIGKILL, GRACE, False)):
            for pid in [self.main] if only_main else self.left():
                _send(pid, how)
            until = time.monotonic() + seconds
            while self.reap() or self.left():
                if time.monotonic() > until or (only_main and self.status is not None):
                    break
                if how == signal.SIGKILL:  # those that were forked meanwhile
                    for pid in self.left():
                        _send(pid, how)
                time.sleep(0.01)


def _send(pid: int, how: int) -> None:
    with contextlib.suppress(OSError):  # ended meanwhile
        os.kill(pid, how)


def main() -> int:
    life, held, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    told = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: told.append(True))
    try:
        keeper = Keeper(command, held)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        print(f"cannot start {command[0]!r}: {reason}", file=sys.stderr, flush=True)
        return CANNOT_START
    while keeper.reap() and keeper.status is None:
        ready = select.select([life, waking], [], [])[0]
        if life in ready or told:
            break
        os.read(waking, 512)
    keeper.end()
    status = keeper.status
    if status is None:  # it could not even be killed: stuck in the kernel
        return 128 + signal.SIGKILL
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


if __name__ == "__main__":
    sys.exit(main())
