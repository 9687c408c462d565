"""What the fuzzing tests share: how many cases, and what counts as surviving one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings

from mmts_plugins.errors import MMTSError

SLOWEST = 5.0  # seconds for one case
_LONG = settings.get_profile("long").max_examples
_MANY = _LONG if settings.default.max_examples == _LONG else 20  # type: ignore[union-attr]

tally = {"cases": 0, "refused": 0}


def fuzz(*strategies: Any, **named: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``given``, with a few cases in ``make test`` (always the same) and any number in the long profile."""

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        few = _MANY != _LONG
        chosen = settings(
            max_examples=_MANY, derandomize=few, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        return chosen(given(*strategies, **named)(test))

    return decorate


def survives(call: Callable[[], Any]) -> Any:
    """What ``call`` returns; ``None`` where it refused with one of our errors, in one line. Soon, either way."""
    tally["cases"] += 1
    started = time.process_time()
    refused, result = None, None
    try:
        result = call()
    except MMTSError as error:
        refused = str(error)
    seconds = time.process_time() - started
    assert seconds < SLOWEST, f"took {seconds:.1f} s"
    if refused is not None:
        tally["refused"] += 1
        assert len("mmts: error: " + refused) <= 500, refused
        assert refused.isprintable(), refused
        assert len(refused) > 10, f"says nothing: {refused}"
    return result
