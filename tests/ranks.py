"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(
    rank: int, world_size: int, meeting: str, function: Callable[..., Any], arguments: tuple, queue: Any
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    try:
        queue.put((rank, function(rank, world_size, *arguments)))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, world_size, *arguments)`` on each rank; what they return, in rank order (no tensors)."""
    with tempfile.TemporaryDirectory() as folder:
        queue = mp.get_context("spawn").SimpleQueue()
        arguments = (world_size, str(Path(folder) / "meeting"), function, arguments, queue)
        context = mp.spawn(_worker, arguments, nprocs=world_size, join=False)
        results = {}
        while not context.join(timeout=0.05):  # raises what a rank raised
            while not queue.empty():
                results.update([queue.get()])
        while not queue.empty():
            results.update([queue.get()])
    return [results[rank] for rank in range(world_size)]
