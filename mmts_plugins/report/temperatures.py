"""Learned temperatures over training, and from where on they stand still: Fig. 3 and Table 7 of Sun & Li."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from ..geometry import in_both_units
from .logs import TrainingLog
from .page import Page
from .plots import PLAIN, SERIES, legend_above, literal, new_figure, save

STILL = 0.02
"""A scale that changes by less than this share from one end of an epoch to the next stands still (App. C)."""
_CLAMP = 100.0


class Learned(NamedTuple):
    """What one run's logit scale did.

    Attributes:
        factor: of the host's scale over the paper's: the number of spheres.
        still: the epoch from whose end on every further one changes less than :data:`STILL`; ``None`` where the last
            epoch still changes more, or there are too few to tell.
        clamped: whether it ends at OpenCLIP's clamp.
    """

    first: float
    last: float
    factor: float
    still: Optional[int]
    clamped: bool


def learned(run: TrainingLog) -> Optional[Learned]:
    """Of a run whose temperature was learned; ``None`` of a scheduled one, and where nothing was logged."""
    series = run.series.get("learned_temperature")
    if run.record or series is None:
        return None
    scales = 1 / series[:, 1]
    asked = run.settings.get("epochs", "")
    epochs = int(asked) if re.fullmatch("[1-9][0-9]{0,5}", asked) else 0
    ends = np.interp(100 * np.arange(1, epochs + 1) / epochs, series[:, 0], scales) if epochs else np.empty(0)
    changes = np.abs(np.diff(ends)) / ends[:-1] if len(ends) > 1 else np.empty(0)
    moving = np.flatnonzero(changes >= STILL)
    still: Optional[int] = None
    if len(changes):
        after = int(moving[-1]) + 1 if len(moving) else 0
        still = after + 1 if after < len(changes) else None
    highest = run.settings.get("mmts_max_logit_scale", "None")
    clamp = _CLAMP if highest == "None" else _number(highest) * _factor(run)
    return Learned(float(scales[0]), float(scales[-1]), _factor(run), still, bool(scales[-1] > 0.995 * clamp))


def _factor(run: TrainingLog) -> float:
    """1, or of a product sphere compared by inner products the number of its spheres."""
    found = re.fullmatch(r"\s*[0-9]{1,6}\s*,\s*([0-9]{1,6})\s*", run.settings.get("mmts_product_sphere", ""))
    inner = run.settings.get("mmts_distance", "None") in ("None", "inner")
    return float(found[1]) if found and inner else 1.0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def section(page: Page, runs: Sequence[TrainingLog], path: Path) -> bool:
    """Write the section and its figure, if any run learned its temperature; whether it did."""
    known = [(run, found) for run in runs if (found := learned(run)) is not None]
    if not known:
        return False
    figure, panels = new_figure(3.2)
    for number, (run, _) in enumerate(known):
        series = run.series["learned_temperature"]
        one = len(series) == 1
        panels[0].plot(series[:, 0], 1 / series[:, 1], color=SERIES[number % len(SERIES)], label=literal(run.name),
                       marker="." if one else "")  # fmt: skip
    if any(found.clamped for _, found in known):
        panels[0].axhline(_CLAMP, color=PLAIN, linewidth=1, linestyle="--")
    low, high = panels[0].yaxis.get_data_interval()
    if high > 4 * low:
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        panels[0].set(yscale="log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_minor_locator(NullLocator())
        panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].set(xlim=(0, 100))
    panels[0].set(xlabel="share of the run, %", ylabel="logit scale (1 / temperature)")
    legend_above(figure, panels[0])
    save(figure, path)
    page.heading("Learned temperatures")
    page.picture(path, "Logit scale over the run: " + "; ".join(
        f"{run.name}: from {found.first:.4g} to {found.last:.4g}" for run, found in known))  # fmt: skip
    rows = []
    for run, found in known:
        both = [in_both_units(scale, found.factor) for scale in (found.first, found.last)]
        rows.append([run.name, *both, f"{1 / found.last:.4g}", "–" if found.still is None else str(found.still)])
    page.table(["", "scale at first", "at the end", "that temperature", f"< {STILL:.0%} an epoch from"], rows)
    page.text("A scale that still moves at the end had too little training, or started too far away. Where it comes to "
              "rest depends on the batch size and on how noisy the pairs are (docs/temperature.md).", True)  # fmt: skip
    for run, found in known:
        if found.clamped:
            page.note(f"{run.name}: the scale ends at its clamp: it would have grown further. See docs/temperature.md.")
    return True
