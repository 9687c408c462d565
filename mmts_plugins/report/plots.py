"""The style that all our plots share. Matplotlib is the extra ``report``; it is imported when a figure is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import replacing
from ..errors import MMTSError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

PLAIN, MMTS = "#8d99ae", "#c8553d"
HEAD, MIDDLE, TAIL = "#14213d", "#3a86a8", "#e09f3e"
BASE, FORBIDDEN = "#777777", "#b00020"
SERIES = (MMTS, MIDDLE, TAIL, HEAD, "#6a994e", "#9d4edd", PLAIN)
"""Colours of things that stand side by side, such as runs; they repeat."""
WIDTH = 5.4


def check_matplotlib() -> None:
    """Say before any work that no plot can be drawn.

    Raises:
        MMTSError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MMTSError(f"plots need matplotlib ({error}): pip install 'mmts-plugins[report]'") from error


def new_figure(
    height: float, height_ratios: Sequence[float] = (1,), width: float = WIDTH, columns: Sequence[float] = (1,)
) -> tuple[Figure, Any]:
    """A figure in the report's style, made without pyplot: no display is needed and no global state is touched.

    Args:
        height, width: in inches; a page shows :data:`WIDTH` at full width.
        height_ratios: of the rows of axes.
        columns: width ratios; with a single column the axes come as a vector, else as a matrix.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    axes = figure.subplots(
        len(height_ratios), len(columns), squeeze=False, height_ratios=height_ratios, width_ratios=columns
    )
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes[:, 0] if len(columns) == 1 else axes


def tail_to_head() -> Colormap:
    """Colours from the tail's to the head's."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("tail to head", [TAIL, MIDDLE, HEAD])


def legend_above(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """The legend of ``axes``, outside, where it hides nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
