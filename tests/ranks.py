"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple, queue: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        queue.put((rank, function(rank, world_size, *arguments)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, world_size, *arguments)`` on each rank; what they return, in rank order (no tensors)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(_worker, (world_size, port, function, arguments, queue), nprocs=world_size, join=False)
    results = dict(queue.get() for _ in range(world_size))
    while not context.join():
        pass
    return [results[rank] for rank in range(world_size)]
