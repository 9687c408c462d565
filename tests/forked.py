"""Python started afresh, without the seconds that importing torch takes: forked from a server that has done so.

A child has run nothing yet: the server imports what the plugin imports in training, calls nothing, and patches nothing.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

if multiprocessing.parent_process() is not None:  # our parent's server has other modules loaded: start one of our own
    multiprocessing.forkserver._forkserver.__init__()  # type: ignore[attr-defined,misc]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch", "torch.distributed", "torch.nn.parallel", "mmts_plugins.adapters.vast", "hypothesis", "pytest"]
)


def _become(arguments: list[str], environment: dict[str, str], output: str) -> None:
    handle = os.open(output, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(os.path.realpath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # type: ignore[call-overload]


def run_forked(*arguments: object, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS``; output as text, errors merged in."""
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    with tempfile.NamedTemporaryFile(suffix=".txt") as output:
        child = context.Process(target=_become, args=([str(a) for a in arguments], environment, output.name))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired([str(a) for a in arguments], timeout, Path(output.name).read_text())
        return subprocess.CompletedProcess(list(arguments), child.exitcode, Path(output.name).read_text())
