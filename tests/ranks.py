"""Run a function on several gloo ranks of this machine, forked from the server of :mod:`forked`."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from forked import context


def _worker(rank: int, world_size: int, meeting: str, function: Callable[..., Any], arguments: tuple, out: Any) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
        out.send((True, function(rank, world_size, *arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        out.send((False, traceback.format_exc()))
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, world_size, *arguments)`` on each rank; what they return, in rank order (no tensors)."""
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        receiving, ranks = {}, []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            given = (rank, world_size, str(Path(folder) / "meeting"), function, arguments, sender)
            ranks.append(context.Process(target=_worker, args=given))
            ranks[-1].start()
            sender.close()
            receiving[receiver] = rank
        try:
            while receiving:
                for receiver in wait(list(receiving), timeout=120) or [None]:
                    if receiver is None:
                        raise TimeoutError(f"ranks {sorted(receiving.values())} hang")
                    rank = receiving.pop(receiver)
                    try:
                        good, results[rank] = receiver.recv()
                    except EOFError:
                        raise RuntimeError(f"rank {rank} died") from None
                    if not good:
                        raise RuntimeError(f"rank {rank}: {results[rank]}")
            for process in ranks:
                process.join(60)
        finally:
            for process in ranks:
                process.kill()
    return [results[rank] for rank in range(world_size)]
