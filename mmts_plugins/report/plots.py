"""The style that all our plots share. Matplotlib is the extra ``report``; it is imported when a figure is made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import replacing
from ..errors import MMTSError, one_line

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
MOST_PANELS = 24
"""In one figure; a PNG has its limits, and so has who looks at it."""
_LABEL = 40  # characters: what a legend and a title hold
_MOST_LABELS = 40


def check_matplotlib() -> None:
    """Say before any work that no plot can be drawn.

    Raises:
        MMTSError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MMTSError(f"plots need matplotlib ({error}): pip install 'mmts-plugins[report]'") from error


def own_style() -> AbstractContextManager[None]:
    """Around all drawing of a command: somebody's ``matplotlibrc``, TeX for example, changes nothing."""
    from matplotlib import style

    return style.context("default")


def literal(text: str, longest: int = _LABEL) -> str:
    """Somebody's text for a figure, as it is: nothing in it is a formula, or a label that legends leave out.

    It is on one line, and without its middle where it is long. Characters that the font lacks are written out, such as
    ``\\u4e2d``: as boxes they would look alike, and labels are to tell runs apart.
    """
    text = "".join(each if ord(each) in _glyphs() else ascii(each)[1:-1] for each in one_line(text))
    if len(text) > longest:
        text = text[: longest // 3] + "…" + text[1 + longest // 3 - longest :]
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def blank_figure(width: float, height: float) -> Figure:
    """A figure without axes, in inches, made without pyplot: no display is needed and no global state is touched."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def new_figure(height: float, height_ratios: Sequence[float] = (1,)) -> tuple[Figure, Any]:
    """A figure as wide as a page, with a column of axes: the figure and a vector of its axes, in the shared style."""
    figure = blank_figure(WIDTH, height)
    axes = figure.subplots(len(height_ratios), 1, squeeze=False, height_ratios=height_ratios)[:, 0]
    for each in axes:
        style(each)
    return figure, axes


def style(axes: Axes) -> None:
    """What all axes share: no box, and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def tail_to_head() -> Colormap:
    """Colours from the tail's to the head's."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("tail to head", [TAIL, MIDDLE, HEAD])


def logarithmic(axes: Axes) -> None:
    """Logarithmic axes, for data that is drawn already, that write numbers out; at 1, 2 and 5 where there is room."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_data_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def legend_above(figure: Figure, *panels: Axes, columns: int = 2) -> None:
    """The legend of all panels, outside, where it hides nothing; what several of them hold, once."""
    entries: dict[tuple[str, Any], Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            part: Any = handle[0] if isinstance(handle, tuple) else handle  # of error bars, or of bars
            colour = part.get_facecolor() if hasattr(part, "get_facecolor") else part.get_color()
            entries.setdefault((label, colour), handle)
    shown = list(entries.items())[:_MOST_LABELS]
    figure.legend([handle for _, handle in shown], [label for (label, _), _ in shown], loc="outside upper center",
                  ncols=columns, frameon=False, fontsize=9)  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
