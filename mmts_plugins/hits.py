"""Whether the cluster table knows the training samples: counted apart from any log, judged once, by all ranks alike."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import gather_rows
from .errors import TableError, one_line, shown

ENOUGH = 1024
"""Samples of all ranks before a share is judged: it is then known to 1.6% (a standard deviation), whatever the seed."""
_LATER = 128  # batches from one look to the next, under --mmts-missing error, after the first batches
_EXAMPLES, _LONGEST = 3, 100
_BYTES = 4096  # of three examples as JSON: at most 12 for a character


def judge(
    misses: int,
    samples: int,
    what: str,
    source: str,
    missing: str,
    examples: Sequence[str] = (),
    found_by: str = "",
    hint: str = "",
) -> Optional[str]:
    """What is to be said of ``misses`` among ``samples``: stop below 50% found, warn below 99%.

    Args:
        what: the samples with their number, such as ``"20 training samples"``.
        source: the table.
        missing: ``--mmts-missing``.
        examples: captions, classes or ids that the table lacks; three are named.
        found_by: what samples are looked up by, where there is a choice.
        hint: what else to say where the run stops.

    Returns:
        The warning, if any, as one line.

    Raises:
        TableError: fewer than half were found, or any was not under ``--mmts-missing error``.
    """
    if not misses:
        return None
    found = samples - misses
    message = f"{misses} of {what} are not in {source} ({100 * found // samples}% found"
    message += f" by {found_by})" if found_by else ")"
    if examples:
        message += f", for example {'; '.join(shown(example) for example in examples[:_EXAMPLES])}"
    if 2 * found < samples:
        raise TableError(f"{message}. Was the table made from other captions, classes or annotations?{hint}")
    if missing == "error":
        raise TableError(f"{message} (--mmts-missing error; tail or mean would give them a shift).{hint}")
    if 100 * found < 99 * samples:
        return one_line(f"{message}; they get the {missing} shift (--mmts-missing)")
    return None


def judge_known(
    absent: Sequence[str], total: int, what: str, source: str, missing: str, found_by: str = "", hint: str = ""
) -> Optional[str]:
    """:func:`judge`, of ``total`` samples that are all known, and of which the table lacks ``absent``."""
    examples = list(dict.fromkeys(absent))
    return judge(len(absent), total, f"{total} {what}", source, missing, examples, found_by, hint)


class HitGuard:
    """Judges the samples of the first batches, of all ranks together, by :func:`judge`.

    Batches 1, 2, 4, 8, ... are looked at until :data:`ENOUGH` samples were seen, or :meth:`conclude` is called: only
    then does anything wait for the device, and the ranks exchange two numbers. So neither batch size, accumulation and
    log interval nor the number of ranks moves the decision, and every rank stops at one batch, with one error.
    After that nothing is counted, but under ``--mmts-missing error``: there, every 128 batches, what the last look
    counted is read, which has long arrived.

    Args:
        what, source, missing: see :func:`judge`.
        text: makes an example of a row given to :meth:`add`.
        warn: shows a warning; called on the first rank.
        device: where the ranks' numbers are summed up.
        rank, world_size: every rank must call :meth:`add` for each batch, and :meth:`conclude`.
    """

    def __init__(
        self,
        what: str,
        source: str,
        missing: str,
        text: Callable[[Any], str],
        warn: Callable[[str], None],
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._what, self._source, self._missing = what, source, missing
        self._text, self._warn, self._device = text, warn, device
        self._rank, self._world_size = rank, world_size
        self._batches = self._samples = 0
        self._misses: Union[int, Tensor] = 0
        self._seen: deque[tuple[Any, Tensor]] = deque(maxlen=2 * _LATER)
        self._judged = False
        self._look: Optional[Callable[[], list[int]]] = None

    def add(self, missed: Tensor, rows: Union[Tensor, Sequence[str]]) -> None:
        """A batch of this rank: ``[n]`` whether a sample is absent from the table, and ``n`` rows to show it by.

        Raises:
            TableError: see :func:`judge`; on every rank, or on none.
        """
        if self._judged and self._missing != "error":
            return
        self._batches += 1
        self._samples += len(missed)
        self._misses = self._misses + missed.sum()
        # The first that are missed, if any, found without waiting.
        first = missed.int().sort(descending=True, stable=True).indices[:_EXAMPLES]
        kept = rows.index_select(0, first) if isinstance(rows, Tensor) else [rows[i] for i in first.tolist()]
        self._seen.append((kept, missed.index_select(0, first)))
        if not self._judged:
            if self._batches & (self._batches - 1) == 0:
                self._check(final=False)
        elif self._batches % _LATER == 0:
            look, self._look = self._look, self._start()
            if look is not None:
                self._say(*look())

    def conclude(self) -> None:
        """The epoch or the run ends here: what was seen is judged, however little it is.

        Raises:
            TableError: see :func:`judge`; on every rank, or on none.
        """
        if self._batches and (not self._judged or self._missing == "error"):
            self._check(final=True)

    def _check(self, final: bool) -> None:
        samples, misses = self._start()()
        if final or samples >= ENOUGH or (self._missing == "error" and misses):
            self._judged = True
            self._say(samples, misses)
            self._seen.clear()

    def _start(self) -> Callable[[], list[int]]:
        """Sum up samples and misses of all ranks so far; what is returned waits for them."""
        samples = torch.full((), self._samples, dtype=torch.int64, device=self._device)
        sums = torch.stack([samples, torch.as_tensor(self._misses).to(self._device)])
        if self._world_size > 1:
            dist.all_reduce(sums)
        if sums.device.type != "cuda":
            return sums.tolist
        arriving = torch.empty(2, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def read() -> list[int]:
            arrived.synchronize()
            found: list[int] = arriving.tolist()
            return found

        return read

    def _say(self, samples: int, misses: int) -> None:
        if misses:
            what, examples = f"the first {samples} {self._what}", self._examples()
            warning = judge(misses, samples, what, self._source, self._missing, examples)
            if warning is not None and self._rank == 0:
                self._warn(warning)

    def _examples(self) -> list[str]:
        """Three of any rank's, the same on each."""
        mine: list[str] = []
        for rows, missed in self._seen:
            mine += [self._text(row) for row, absent in zip(rows, missed.tolist()) if absent]
            if len(mine) >= _EXAMPLES:
                break
        mine = [text[:_LONGEST] for text in mine[:_EXAMPLES]]
        if self._world_size == 1:
            return mine
        message = json.dumps(mine).encode()
        sent = torch.tensor([*message, *bytes(_BYTES - len(message))], dtype=torch.uint8, device=self._device)
        received = gather_rows(sent[None], self._world_size).tolist()
        return [text for row in received for text in json.loads(bytes(row).rstrip(b"\0"))][:_EXAMPLES]
