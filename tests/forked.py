"""Python started afresh, without the seconds that importing torch takes: forked from a server that has done so.

A child has run nothing yet: the server imports what the plugin imports in training, calls nothing, and patches nothing.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if multiprocessing.parent_process() is not None:  # our parent's server has other modules loaded: start one of our own
    multiprocessing.forkserver._forkserver.__init__()  # type: ignore[attr-defined,misc]
context = multiprocessing.get_context("forkserver")
_loaded = ["torch", "torch.distributed", "torch.nn.parallel", "mmts_plugins.adapters.vast", "hypothesis", "pytest"]
# What OpenCLIP imports of others, two of the three seconds of its start; where one is not installed, it is passed over.
_loaded += ["torchvision", "transformers", "timm", "pandas", "webdataset", "ftfy", "braceexpand"]


HUGGING_FACE = ("torch._dynamo", "torch.distributed.tensor", "tensorboard", "sklearn.metrics", "scipy", "datasets",
                "accelerate", "tokenizers", "huggingface_hub", "safetensors.torch", "PIL.Image")  # fmt: skip
"""What transformers' trainer and sentence-transformers import of others, five of the seven seconds of their start."""


def preload(*modules: str) -> None:
    """Have the server import these too; of use only where a test module is imported, before the server starts."""
    _loaded.extend(modules)
    context.set_forkserver_preload(list(_loaded))


preload()
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _become(arguments: list[str], environment: dict[str, str], output: str, armed: bool = False) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    code: object = 0
    try:
        if armed:
            sys.orig_argv = [sys.executable, *arguments]
            from mmts_plugins import _startup

            _startup.start()
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


def one_rank(rank: int = 0, ranks: int = 1, port: int = 0) -> dict[str, str]:
    """What a launcher sets."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        **where,
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_forked(
    *arguments: object, ranks: int = 0, timeout: float = 120, armed: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS``, or that many ranks of it; output as text, errors merged in.

    The first rank that fails takes the others with it, as under a launcher. ``armed``: as our start-up file does.
    """
    given = [str(argument) for argument in arguments]
    port = free_port()
    with tempfile.NamedTemporaryFile(suffix=".txt") as output:
        children = []
        for rank in range(max(1, ranks)):
            variables = {**environment, **(one_rank(rank, ranks, port) if ranks else {})}
            children.append(context.Process(target=_become, args=(given, variables, output.name, armed)))
            children[-1].start()
        deadline, code = time.monotonic() + timeout, 0
        while running := [child for child in children if child.exitcode is None]:
            if not code and any(child.exitcode for child in children):
                deadline = time.monotonic() + 10  # the others may have as much to say
            code = next((child.exitcode for child in children if child.exitcode), 0)
            if time.monotonic() > deadline:
                break
            multiprocessing.connection.wait([child.sentinel for child in running], 0.5)
        code = next((child.exitcode for child in children if child.exitcode), 0)
        late = not code and any(child.exitcode is None for child in children)
        for child in children:
            child.kill()
            child.join()
        text = Path(output.name).read_text()
        if late:
            raise subprocess.TimeoutExpired(given, timeout, text)
        return subprocess.CompletedProcess(given, code, text)
