"""The hyper-parameters of the paper's experiments (supplementary, Sec. 7), which the adapters of its hosts hold."""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """``alpha``, ``sh-`` and ``sh+`` of one experiment, and the loss they were chosen for."""

    loss: str
    alpha: float
    shift_min: float
    shift_max: float


def presets() -> dict[str, Preset]:
    """Those of every host, by name."""
    from .hosts.registry import adapters

    return {name: preset for adapter in adapters() for name, preset in adapter.presets.items()}


def __getattr__(name: str) -> Any:
    if name == "PRESETS":  # as it was called before hosts held them
        return presets()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
