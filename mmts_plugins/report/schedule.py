"""Plots of a schedule: temperatures over the run, and what a negative weighs at the schedule's extremes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from ..config import SMALLEST_CALM_TEMPERATURE, merge, of_options
from ..errors import ConfigError, shown
from ..fields import WHOLE, Field
from ..hosts.registry import adapters
from ..options import COMMON
from ..preview import Preview, named_table, read_table
from ..record import read_record
from .plots import BASE, FORBIDDEN, HEAD, MIDDLE, TAIL, blank_figure, literal, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..hosts.adapter import Adapter

_MOST_STEPS = 10**9
_POINTS = 2000
_BROADEST = 0.5  # how far below the hardest negative the weights are drawn, in cosine similarity
_COLOURS = {"rarest": TAIL, "tail": TAIL, "middle": MIDDLE, "all": MIDDLE, "head": HEAD, "most common": HEAD}


def previews(
    presets: Sequence[str],
    configs: Sequence[str],
    table: Optional[str],
    total_steps: Optional[int],
    changes: dict[str, float],
    default_steps: int,
) -> list[Preview]:
    """One preview for each preset and each ``mmts.yaml``.

    Args:
        presets: names.
        configs: paths of ``mmts.yaml`` files.
        table: for all of them; a config without it takes the table it names, if that is still there.
        total_steps: of all of them; a config without it takes its own, a preset ``default_steps``.
        changes: fields of :class:`mmts_plugins.config.Config` that take the place of theirs.

    Raises:
        ConfigError, TableError: an unknown preset, a file that cannot be used, or a value that cannot be drawn.
    """
    if "period" in changes and "num_oscillations" in changes:
        raise ConfigError("give either --num-oscillations or --period, not both")
    fields = of_options(COMMON)
    for name, value in changes.items():
        fields[name].check(f"--{name.replace('_', '-')}", value)
    if total_steps is not None and total_steps > _MOST_STEPS:
        raise ConfigError(f"--total-steps is {shown(total_steps)}: too large")
    loaded = None if table is None else read_table(table)
    steps = default_steps if total_steps is None else total_steps
    found = [Preview.of_preset(name, steps, loaded, **changes) for name in presets]
    flags = {f"mmts_{name}": value for name, value in changes.items()}
    for path in configs:
        record = read_record(path)
        values = merge({"mmts_config": path, **flags}, _adapter_of(record))
        steps = total_steps if total_steps is not None else record.get("total_steps", default_steps)
        steps = Field(WHOLE, least=1, most=_MOST_STEPS).check(f"{path}: field 'total_steps'", steps)
        found.append(Preview(values, steps, loaded or named_table(record, path)[0], path))
    return found


def _adapter_of(record: dict[str, Any]) -> Adapter:
    """Of the host whose record this is; of any where that is not known: a record says all that is drawn."""
    known = adapters()
    host = record.get("host")
    return next((each for each in known if host in (each.name, each.title, each.recorded)), known[0])


def say(preview: Preview) -> str:
    """The plot of a preview in words: its range, how unequal negatives weigh at its ends, and the guard it breaks."""
    low, high = _range(preview)
    what = preview.kind.number
    names = list(preview.shifts)
    ends = "" if len(names) == 1 else f" ({names[0]}, at the lowest) to {high:.4g} ({names[-1]}, at the highest)"
    text = f"{preview.name}: {what} {low:.4g}" + (ends or f" to {high:.4g}")
    if not preview.kind.is_margin and low > 0:
        text += (
            f"; a negative 0.1 less similar than the hardest weighs {math.exp(-0.1 / low):.1%} of it at the lowest, "
            f"{math.exp(-0.1 / high):.1%} at the highest"
        )
    return text + (f". A run refuses this: {preview.problem}" if preview.problem else "")


def plot(previews: Sequence[Preview], path: Path) -> None:
    """Write a PNG: a row for each preview, its temperatures on the left, the weights of negatives on the right."""
    figure = blank_figure(9.6, 3.9 * len(previews))
    for preview, part in zip(previews, figure.subfigures(len(previews), 1, squeeze=False)[:, 0]):
        axes = part.subplot_mosaic([["run", "weights"], ["base", "weights"]], height_ratios=(3.4, 1),
                                   width_ratios=(1.75, 1))  # fmt: skip
        for each in axes.values():
            style(each)
        draw_run(axes["run"], preview)
        draw_base(axes["base"], preview)
        draw_weights(axes["weights"], preview)
        axes["run"].tick_params(labelbottom=False)
        part.legend(*axes["run"].get_legend_handles_labels(), loc="outside lower left", ncols=5, frameon=False,
                    fontsize=9)  # fmt: skip
        values = preview.values
        shifts = f"shifts {values['shift_min']:g} to {values['shift_max']:g}"
        title = f"{literal(preview.name)}: {values['loss']}, alpha {values['alpha']:g}, {shifts}"
        part.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        if preview.problem:
            lines = [literal(line, 84) for line in textwrap.wrap(preview.problem, 84)]
            axes["run"].set_title("\n".join(lines), fontsize=8.5, color=FORBIDDEN, loc="left")
    save(figure, path)


def draw_run(axes: Axes, preview: Preview) -> None:
    """Temperatures (or margins) of the preview's concepts over the run, what a guard forbids in red."""
    steps = _steps(preview)
    base = preview.base(steps)
    for name, shift in preview.shifts.items():
        edge = name in ("rarest", "most common") and "head" in preview.shifts
        curve = base + shift
        axes.plot(steps, curve, color=_COLOURS[name], linewidth=1 if edge else 2, linestyle=":" if edge else "-",
                  label=name if edge or preview.table is None else f"{name} third")  # fmt: skip
        forbidden = np.array([preview.kind.forbids(value) for value in curve])
        axes.plot(steps, np.where(forbidden, curve, np.nan), color=FORBIDDEN, linewidth=4, alpha=0.6)
    low, high = _range(preview)
    axes.set_ylim(min(0.0, low * 1.15), high * 1.06)
    if low < 0 or (low == 0 and not preview.kind.is_margin):
        axes.axhspan(axes.get_ylim()[0], 0, color=FORBIDDEN, alpha=0.08)
        axes.axhline(0, color=FORBIDDEN, linewidth=1)
    if not preview.kind.is_margin and low < 2 * SMALLEST_CALM_TEMPERATURE:
        axes.axhline(SMALLEST_CALM_TEMPERATURE, color=FORBIDDEN, linewidth=1, linestyle="--")
        axes.annotate("0.01: a logit scale of 100", (steps[-1], SMALLEST_CALM_TEMPERATURE), (0, 2), fontsize=8,
                      textcoords="offset points", ha="right", color=FORBIDDEN,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})  # fmt: skip
    axes.set_xlim(0, max(preview.total_steps - 1, 1))
    axes.set_ylabel(preview.kind.number)


def draw_base(axes: Axes, preview: Preview) -> None:
    """The cosine that all samples share, Eq. 7."""
    steps = _steps(preview)
    axes.plot(steps, preview.base(steps), color=BASE, linewidth=1.6)
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_xlim(0, max(preview.total_steps - 1, 1))
    axes.set_ylabel("base")
    axes.set_xlabel("optimizer step")


def draw_weights(axes: Axes, preview: Preview) -> None:
    """Fig. 1 of the paper at the schedule's extremes: what a negative weighs (:meth:`.losses.LossKind.weight`)."""
    half = preview.schedule.alpha / 2
    names = list(preview.shifts)
    chosen = ["tail", "head"] if "head" in names else list(dict.fromkeys([names[0], names[-1]]))
    gap = np.linspace(-_BROADEST, 0, 600)
    for name in chosen:
        for base, dashes, where in ((-half, (3, 1.5), "lowest"), (half, (None, None), "highest")):
            value = preview.shifts[name] + base
            weight = preview.kind.weight(gap, value)
            if weight is not None:
                axes.plot(gap, weight, color=_COLOURS[name], dashes=dashes, linewidth=1.8,
                          label=f"{name}, {where}: {value:.3g}")  # fmt: skip
    axes.set_xlim(-_BROADEST, 0)
    axes.set_ylim(0, 1.42)  # room for the legend
    axes.set_yticks(np.arange(0, 1.01, 0.25))
    axes.set_ylabel(preview.kind.weight_label)
    axes.set_xlabel(preview.kind.gap_label)
    axes.legend(loc="upper left", frameon=False, fontsize=8.5, title_fontsize=8.5)


def _range(preview: Preview) -> tuple[float, float]:
    shifts, half = preview.shifts.values(), preview.schedule.alpha / 2
    return min(shifts) - half, max(shifts) + half


def _steps(preview: Preview) -> np.ndarray[Any, Any]:
    return np.unique(np.linspace(0, preview.total_steps - 1, min(preview.total_steps, _POINTS)).round())
