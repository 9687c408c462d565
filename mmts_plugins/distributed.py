"""What the ranks of a run do together: exchange rows and vectors, take turns, compare what they were given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError

# Collectives of whole tensors, as this torch calls them: 2.14 gives them new names.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def _whole(rows: Tensor) -> bool:
    """Whether to use them. gloo of torch 1.13 has neither, and that of 2.14 makes its reduce-scatter of an all-reduce:
    twice the bytes."""
    return rows.device.type != "cpu" and dist.get_backend() != "gloo"


def gather_rows(rows: Tensor, world_size: int) -> Tensor:
    """``[n, ...]`` of each rank, the same shape everywhere, to ``[world_size * n, ...]`` in rank order; no gradient."""
    rows = rows.detach().contiguous()
    everyone = rows.new_empty(world_size * len(rows), *rows.shape[1:])
    if _whole(rows):
        _ALL_GATHER(everyone, rows)
    else:  # as bytes: older gloo knows no bfloat16
        dist.all_gather(list(everyone.view(torch.uint8).chunk(world_size)), rows.view(torch.uint8))
    return everyone


def to_owners(parts: Tensor, world_size: int) -> Tensor:
    """``[world_size * n, ...]`` of each rank, a part of something of everybody's rows, to the ``[world_size, n, ...]``
    parts of this rank's own rows, in rank order."""
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous())
    return received.view(world_size, -1, *parts.shape[1:])


def sum_at_owners(parts: Tensor, world_size: int) -> Tensor:
    """The sum over ranks of ``[world_size * n, ...]``, of which each rank gets its own ``[n, ...]``."""
    if not _whole(parts):
        return to_owners(parts, world_size).sum(0)
    mine = parts.new_empty(len(parts) // world_size, *parts.shape[1:])
    _REDUCE_SCATTER(mine, parts.contiguous())
    return mine


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks, on every rank; no gradient."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


@contextmanager
def first_on_node(local_rank: int, distributed: bool) -> Iterator[None]:
    """The first rank of each node goes through the block before the others: it fills the cache that they read."""
    if distributed and local_rank != 0:
        dist.barrier()
    try:
        yield
    finally:  # also where the first fails: nobody waits for ever
        if distributed and local_rank == 0:
            dist.barrier()


def check_ranks_agree(values: dict[str, Any], rank: int, world_size: int, device: torch.device) -> None:
    """Each rank reads its own flags and files: all must have read the same.

    Raises:
        ConfigError: naming the ranks and the field that differs.
    """
    text = json.dumps({name: value for name, value in values.items() if name != "clusters"}).encode()
    mine = torch.zeros(4096, dtype=torch.uint8, device=device)
    mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine)
    first = json.loads(bytes(everyone[0].tolist()).rstrip(b"\0"))
    for other in range(1, world_size):
        theirs = json.loads(bytes(everyone[other].tolist()).rstrip(b"\0"))
        for name, value in theirs.items():
            if value != first[name]:
                raise ConfigError(
                    f"ranks 0 and {other} differ in {name}: {first[name]!r} and {value!r}; every rank must be given "
                    "the same flags and the same cluster table"
                )
