"""Differences between variants as a picture: a point and its interval for each, a panel for each metric or group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1c1c1c"


class Panel(NamedTuple):
    """One panel.

    Attributes:
        title: above it.
        entries: of each variant its difference to the first, as :func:`.tables.summary` has it, or ``None``.
        colour: of its points.
    """

    title: str
    entries: Mapping[str, Optional[dict[str, Any]]]
    colour: str = INK


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(path: Path, panels: Sequence[Panel], label: str) -> None:
    """Write a PNG; variants go from top to bottom in the first panel's order, points are per cent.

    Args:
        path: of the picture.
        panels: at least one.
        label: below them all.
    """
    from ..report import plots

    rows = list(panels[0].entries)
    with plots.own_style():
        figure = _figure(panels, rows, label)
        plots.save(figure, path)


def _figure(panels: Sequence[Panel], rows: Sequence[str], label: str) -> Figure:
    from ..report import plots

    figure = plots.blank_figure(plots.WIDTH, 1.6 + 0.32 * len(rows))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels):
        plots.style(axes)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.axvline(0, color="#888888", linewidth=1)
        for place, name in enumerate(rows):
            entry = panel.entries[name]
            if entry is None:
                continue
            if entry["low"] is not None:
                axes.plot([100 * entry["low"], 100 * entry["high"]], [place, place], color=panel.colour, linewidth=2)
            axes.plot([100 * entry["mean"]], [place], "o", color=panel.colour, markersize=5)
        lines = (plots.literal(part.replace("_", " ")) for part in panel.title.rsplit("_", 1))
        axes.set_title("\n".join(lines), fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.set_yticks(range(len(rows)), [plots.literal(name) for name in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(plots.literal(label), fontsize=9)
    return figure
