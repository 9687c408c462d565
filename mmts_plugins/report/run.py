"""The report of training runs: what they were told, the schedule they followed, losses, metrics, and who gains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from .. import losses
from .._files import replacing
from ..config import THIRDS, of_options
from ..errors import ConfigError, MMTSError, one_line, reading
from ..fields import TEXT, WHOLE, Field, check_mapping
from ..markdown import line
from ..options import COMMON
from ..preview import Preview, named_table
from ..record import FILE_NAME, RECORDED, says_something
from ..tables import CAPTION
from . import temperatures
from .logs import Metric, Score, TrainingLog, read_run
from .page import Page, number, slugs
from .plots import HEAD, MIDDLE, MOST_PANELS, PLAIN, SERIES, TAIL, legend_above, literal, new_figure, save
from .schedule import draw_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR_OF_THIRD = dict(zip(THIRDS, (HEAD, MIDDLE, TAIL)))
_PERCENT = re.compile(r"R@\d+$|mAP|nDCG|top\d$|accuracy|class_mean|mean_recall")
_SCHEDULE_SERIES = ("tau_base", "tau_mean", "tau_min", "tau_max", "tau_head", "tau_middle", "tau_tail", "scale_mean",
                    "learned_temperature", "loss", *(f"loss_{third}" for third in THIRDS))  # fmt: skip
_UNINTERESTING = ("name", "logs", "log_path", "checkpoint_path", "tensorboard_path", "resume", "wandb_notes")
_CLOSE = 1e-6  # of logged and configured base temperature; float32 or a printed number explains no more
_PLOTTED_THIRDS = 4
_PLOTTED_METRICS = 100
_TALLEST = 60  # inches of a figure
_PLANNED = {
    **{
        name: of_options(COMMON)[name]
        for name in (
            "alpha",
            "shift_min",
            "shift_max",
            "num_oscillations",
            "period",
            "start_phase",
            "no_schedule",
            "no_shifts",
            "mean_matched",
            "shuffle_shifts",
            "clusters",
        )
    },
    "loss": Field(TEXT),
    "total_steps": Field(WHOLE, least=1),
    "table_hash": RECORDED["table_hash"],
}
"""What of a record makes its preview; the rest is shown as it is."""


def write(inputs: Sequence[str], folder: Path) -> list[Path]:
    """Write the report of one or several runs.

    Args:
        inputs: folders of runs. One that holds no run is named on the page, unless it is the only one.
        folder: gets ``report.html``, the same plots as PNGs, and for each run of ours a fragment for a model card.

    Returns:
        The files written.

    Raises:
        ConfigError: none of the inputs is a run.
    """
    runs, refused = _read(inputs)
    previews = [_preview(run) for run in runs]
    page = Page(
        f"Training run: {runs[0].name}" if len(runs) == 1 else "Training runs: " + ", ".join(r.name for r in runs)
    )
    written: list[Path] = []

    def picture(name: str, alt: Optional[str]) -> None:
        if alt is not None:
            page.picture(folder / name, alt)
            written.append(folder / name)

    for message in refused:
        page.note(message)
    for run, (_, notes) in zip(runs, previews):
        for note in [*run.notes, *notes]:
            page.note(f"{run.name}: {note}.")
    page.heading("Configuration")
    _configuration(page, runs)
    page.heading("Cluster table")
    _tables(page, runs, previews)
    page.heading("Schedule")
    for text in _followed(runs, previews):
        page.text(text)
    page.text("Lines are what was configured, dots what training logged.", small=True)
    picture("schedule.png", plot_schedule(folder / "schedule.png", runs, [preview for preview, _ in previews]))
    if temperatures.section(page, runs, folder / "temperatures.png"):
        written.append(folder / "temperatures.png")
    page.heading("Losses")
    page.text("Losses at other temperatures are on other scales: compare metrics, not losses.", small=True)
    picture("loss.png", plot_losses(folder / "loss.png", runs))
    picture("diagnostics.png", plot_diagnostics(folder / "diagnostics.png", runs))
    page.heading("Metrics")
    _metrics(page, runs)
    picture("metrics.png", plot_metrics(folder / "metrics.png", runs))
    page.heading("Recall against the frequency of concepts")
    thirds = plot_thirds(folder / "thirds.png", runs)
    if thirds is None:
        page.text("Not measured: mmts eval with the run's cluster table splits every metric by thirds of frequency.")
    else:
        page.text("Head, middle and tail are thirds of the cluster table's samples; bars are the metrics' intervals.")
    picture("thirds.png", thirds)
    if len(runs) > 1:
        page.heading("Differences between the runs")
        _differences(page, runs)
    cards = [(run, model_card(run)) for run in runs if run.record]
    if cards:
        page.heading("For a model card")
    for card, name in zip((card for _, card in cards), slugs([run.name for run, _ in cards])):
        path = folder / (f"model_card_{name}.md" if len(runs) > 1 else "model_card.md")
        with replacing(path) as temporary:
            temporary.write_text(card, encoding="utf-8", errors="backslashreplace")
        written.append(path)
        page.text(f"The same as {path.name}:", small=True)
        page.code(card)
    page.write(folder / "report.html")
    return [folder / "report.html", *written]


def _read(inputs: Sequence[str]) -> tuple[list[TrainingLog], list[str]]:
    runs, refused = [], []
    for path in inputs:
        try:
            runs.append(read_run(path))
        except ConfigError as error:
            if len(inputs) == 1:
                raise
            refused.append(f"Left out: {error}")
    if not runs:
        raise ConfigError("; ".join(refused))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [replace(run, name=f"{index}: {run.name}") for index, run in enumerate(runs, 1)]
    return runs, refused


def _preview(run: TrainingLog) -> tuple[Optional[Preview], list[str]]:
    """The schedule that a run's record sets, and what is missing for it."""
    if run.record_path is None or not run.record:
        return None, []
    notes: list[str] = []
    try:
        with reading(FILE_NAME, "does not describe a schedule", ConfigError):
            given = {name: value for name, value in run.record.items() if name in _PLANNED}
            required = ("loss", "alpha", "shift_min", "shift_max", "total_steps")
            values = check_mapping(FILE_NAME, given, _PLANNED, required)
            table, why = named_table(values, run.record_path)
            if table is None and (values.get("mean_matched") or not values.get("no_shifts")):
                notes.append(f"the cluster table cannot be shown: {why}")
            preview = Preview(values, values["total_steps"], table, run.name)
            _ = preview.shifts  # may not fit the table
            return preview, notes
    except MMTSError as error:
        return None, [*notes, f"its {FILE_NAME} does not describe a schedule ({error})"]


def _colour(runs: Sequence[TrainingLog], index: int) -> str:
    """A run of ours has a colour of the series, a plain one is grey."""
    if not runs[index].record:
        return PLAIN
    return SERIES[sum(bool(run.record) for run in runs[:index]) % len(SERIES)]


# -- configuration and table -------------------------------------------------------------------------------------------


def _configuration(page: Page, runs: Sequence[TrainingLog]) -> None:
    fields = dict.fromkeys(name for run in runs for name in run.record)
    rows = [[name, *(_shown(run.record.get(name)) for run in runs)] for name in fields]
    if rows:
        page.table(["", *(run.name for run in runs)], [row for row in rows if set(row[1:]) - {"–", "no"}], words=True)
    else:
        page.text(f"No run has an {FILE_NAME}.")


def _tables(page: Page, runs: Sequence[TrainingLog], previews: Sequence[tuple[Optional[Preview], list[str]]]) -> None:
    rows = []
    for run, (preview, _) in zip(runs, previews):
        if preview is not None and preview.table is not None:
            table = preview.table
            rows.append([run.name, f"{len(table):,} {'captions' if table.kind == CAPTION else 'classes'}",
                         f"{table.clusters:,}", f"{table.samples:,}",
                         f"{number(table.summary.low)} to {number(table.summary.high)}"])  # fmt: skip
    if rows:
        page.table(["", "keys", "clusters", "samples", "frequency"], rows)
        page.text("More about a table: mmts report TABLE -o DIR.", small=True)
    else:
        page.text("None of the runs has a cluster table that is found from here.")


def _differences(page: Page, runs: Sequence[TrainingLog]) -> None:
    ours = [run for run in runs if run.record]
    plain = [run.name for run in runs if not run.record]
    if plain:
        page.text(f"Without MM-TS, or without its {FILE_NAME}: {', '.join(plain)}.")
    rows = []
    for title, compared, values in (
        ("", ours, [run.record for run in ours]),
        ("host: ", runs, [run.settings for run in runs]),
    ):
        for name in dict.fromkeys(name for value in values for name in value):
            cells = {run.name: _shown(value.get(name)) for run, value in zip(compared, values)}
            repeats = title and (name == "loss" or name.startswith("mmts_"))
            if len(set(cells.values())) > 1 and name not in _UNINTERESTING and not repeats:
                rows.append([title + name, *(cells.get(run.name, "–") for run in runs)])
    if rows:
        page.table(["", *(run.name for run in runs)], rows, words=True)
    else:
        page.text("Nothing else that was written down differs.")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else one_line(str(value))


# -- schedule ----------------------------------------------------------------------------------------------------------


def _followed(runs: Sequence[TrainingLog], previews: Sequence[tuple[Optional[Preview], list[str]]]) -> list[str]:
    """Whether the logged base temperature is the configured one."""
    said = []
    for run, (preview, _) in zip(runs, previews):
        if preview is None or "tau_base" not in run.series:
            continue
        off = np.abs(run.series["tau_base"][:, 1] - preview.base(run.steps))
        worst = int(off.argmax())
        said.append(
            f"{run.name}: the base temperature that training logged is the configured cosine at all {len(off):,} "
            f"logged steps (greatest difference {off[worst]:.1e})."
            if off[worst] <= _CLOSE + 1e-4 * preview.schedule.alpha
            else f"{run.name}: the base temperature that training logged is NOT the configured cosine: at step "
            f"{run.steps[worst]:,} it is {off[worst]:.4f} away. Was the run resumed with another length or config?"
        )
    return said


def _draw(axes: Axes, series: np.ndarray, color: str, linewidth: float = 1.6, label: Optional[str] = None) -> None:
    """``[n, 2]`` share of the run in per cent and value, as a line; where only one was logged, as a dot."""
    one = len(series) == 1
    axes.plot(*series.T, color=color, linewidth=linewidth, label=label, marker="." if one else "", clip_on=not one)


def plot_schedule(path: Path, runs: Sequence[TrainingLog], previews: Sequence[Optional[Preview]]) -> Optional[str]:
    """The configured temperatures as lines, the logged ones as dots; of plain runs, the learned one.

    Returns:
        A description, or None where there is nothing to draw.
    """
    shown = [
        (run, preview)
        for run, preview in zip(runs, previews)
        if preview is not None or "learned_temperature" in run.series
    ]
    if not shown:
        return None
    said = _left_out(len(shown), MOST_PANELS, "runs")
    shown = shown[:MOST_PANELS]
    figure, panels = new_figure(1.0 + 2.5 * len(shown), [1] * len(shown))
    legend = None
    for axes, (run, preview) in zip(panels, shown):
        axes.set_title(literal(run.name), fontsize=10, loc="left")
        if preview is None:
            _draw(axes, run.series["learned_temperature"], color=PLAIN, linewidth=2)
            axes.set_ylim(0, 1.15 * run.series["learned_temperature"][:, 1].max())
            axes.set_xlim(0, 100)
            axes.set_xlabel("share of the run, %")
            axes.set_ylabel("learned temperature")
            said.append(
                f"{run.name}: one learned temperature, {run.series['learned_temperature'][-1, 1]:.4f} at the end"
            )
            continue
        draw_run(axes, preview)
        axes.set_xlabel("optimizer step")
        for third in THIRDS:
            logged = run.series.get(f"tau_{third}")
            if logged is not None:
                axes.plot(logged[:, 0] / 100 * preview.total_steps, logged[:, 1], ".", color=_COLOUR_OF_THIRD[third],
                          markersize=5)  # fmt: skip
        if legend is None or len(preview.shifts) > len(legend[1].shifts):
            legend = (axes, preview)
        shifts = preview.shifts.values()
        half = preview.schedule.alpha / 2
        said.append(f"{run.name}: {preview.kind.number}s from {min(shifts) - half:.4g} to "
                    f"{max(shifts) + half:.4g} over {preview.total_steps:,} steps")  # fmt: skip
    if legend is not None:
        legend_above(figure, legend[0], columns=3)
    save(figure, path)
    return "; ".join(said) + "."


# -- losses and diagnostics --------------------------------------------------------------------------------------------


def plot_losses(path: Path, runs: Sequence[TrainingLog]) -> Optional[str]:
    """The losses of all runs over one another, and by thirds where they were logged."""
    by_third = [run for run in runs if any(f"loss_{third}" in run.series for third in THIRDS)]
    said = _left_out(len(by_third), MOST_PANELS, "runs by thirds")
    by_third = by_third[:MOST_PANELS]
    if not by_third and not any("loss" in run.series for run in runs):
        return None
    figure, panels = new_figure(3.2 + 2.2 * len(by_third), [1.3, *([1] * len(by_third))])
    for index, run in enumerate(runs):
        if "loss" in run.series:
            values = run.series["loss"]
            _draw(panels[0], values, color=_colour(runs, index), label=literal(run.name))
            said.append(f"{run.name}: from {values[0, 1]:.4g} to {values[-1, 1]:.4g}")
    for axes, run in zip(panels[1:], by_third):
        for third in THIRDS:
            if f"loss_{third}" in run.series:
                _draw(axes, run.series[f"loss_{third}"], color=_COLOUR_OF_THIRD[third], label=third)
        axes.set_title(f"{literal(run.name)}, by third of the samples", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=9, ncols=3)
    for axes in panels:
        axes.set_ylabel("loss")
        axes.set_xlim(0, 100)
    panels[-1].set_xlabel("share of the run, %")
    if said:
        legend_above(figure, panels[0])
    save(figure, path)
    return "Training loss. " + "; ".join(said) + "."


def plot_diagnostics(path: Path, runs: Sequence[TrainingLog]) -> Optional[str]:
    """Everything else that a run logged: alignment, uniformity, similarities, hit rate."""
    names = sorted({name for run in runs for name, values in run.series.items()
                    if name not in _SCHEDULE_SERIES and len(values) > 1})  # fmt: skip
    if not names:
        return None
    left_out = _left_out(len(names), MOST_PANELS, "values")
    names = names[:MOST_PANELS]
    figure, panels = new_figure(0.8 + 1.5 * len(names), [1] * len(names))
    for axes, name in zip(panels, names):
        for index, run in enumerate(runs):
            if name in run.series:
                _draw(axes, run.series[name], color=_colour(runs, index), label=literal(run.name))
        axes.set_title(literal(name.replace("_", " ")), fontsize=10, loc="left")
        axes.set_xlim(0, 100)
    panels[-1].set_xlabel("share of the run, %")
    if len(runs) > 1:
        legend_above(figure, *panels)
    save(figure, path)
    return "; ".join(["Logged over the run: " + ", ".join(name.replace("_", " ") for name in names), *left_out]) + "."


def _left_out(many: int, shown: int, what: str) -> list[str]:
    """That a figure does not hold everything."""
    return [f"the first {shown} of {many} {what}"] if many > shown else []


# -- metrics -----------------------------------------------------------------------------------------------------------


def is_share(name: str) -> bool:
    """Whether a metric of that name lies in [0, 1] and is shown in per cent."""
    return _PERCENT.search(name) is not None


def shown_score(name: str, score: Optional[Score]) -> str:
    """``41.2 [39.0, 43.3]`` in per cent where the metric is a share; a dash where there is none."""
    if score is None:
        return "–"
    scale, form = (100, ".1f") if is_share(name) else (1, ".4g")
    text = format(scale * score.value, form)
    if score.low is None or score.high is None:
        return text
    return f"{text} [{format(scale * score.low, form)}, {format(scale * score.high, form)}]"


def _names(runs: Sequence[TrainingLog]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.metrics))


def _difference(name: str, one: Optional[Score], other: Optional[Score]) -> str:
    if one is None or other is None:
        return "–"
    gain = other.value - one.value
    return f"{100 * gain:+.1f}" if is_share(name) else f"{gain:+.4g}"


def _metrics(page: Page, runs: Sequence[TrainingLog]) -> None:
    names = _names(runs)
    if not names:
        page.text("None of the runs has metrics.")
        return
    rows = []
    for name in names:
        scores = [run.metrics[name].score if name in run.metrics else None for run in runs]
        cells = [shown_score(name, score) for score in scores]
        if len(runs) == 2:
            cells.append(_difference(name, *scores))
        rows.append([name.replace("_", " "), *cells])
    page.table(["metric", *(run.name for run in runs), *(["difference"] if len(runs) == 2 else [])], rows)
    metrics = [metric for run in runs for metric in run.metrics.values()]
    intervals = (
        "brackets are 95% bootstrap intervals of one evaluation, which do not cover another training seed"
        if any(metric.score.low is not None for metric in metrics)
        else "no intervals: mmts eval gives them"
    )
    sources = ", ".join(sorted({metric.source for metric in metrics}))
    page.text(f"Recalls, precisions and accuracies in per cent; {intervals}. From {sources}.", small=True)
    for run in runs:
        missing = [name.replace("_", " ") for name in names if name not in run.metrics]
        if missing and run.metrics:
            page.note(f"{run.name} lacks {', '.join(missing)}: not compared.")


def plot_metrics(path: Path, runs: Sequence[TrainingLog]) -> Optional[str]:
    """The shares among the metrics, with their intervals."""
    names = [name for name in _names(runs) if is_share(name)]
    if not names:
        return None
    left_out = _left_out(len(names), _PLOTTED_METRICS, "metrics")
    names = names[:_PLOTTED_METRICS]
    figure, (axes,) = new_figure(min(1.2 + (0.2 + 0.12 * len(runs)) * len(names), _TALLEST))
    for index, run in enumerate(runs):
        at = [(row, run.metrics[name].score) for row, name in enumerate(names) if name in run.metrics]
        spread = 0.5 * (index - (len(runs) - 1) / 2) / max(len(runs), 1)
        _points(axes, [score for _, score in at], [row + spread for row, _ in at], _colour(runs, index), run.name, "x")
    axes.set_yticks(range(len(names)), [literal(name.replace("_", " ")) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel("%")
    legend_above(figure, axes)
    save(figure, path)
    return "Metrics in per cent: " + "; ".join([
        *(f"{name.replace('_', ' ')} "
          + ", ".join(f"{run.name} {shown_score(name, run.metrics[name].score)}" for run in runs if name in run.metrics)
          for name in names),
        *left_out,
    ]) + "."  # fmt: skip


def plot_thirds(path: Path, runs: Sequence[TrainingLog]) -> Optional[str]:
    """Metrics by third of the concepts' frequency: who gains, head or tail."""
    names = [name for name in _names(runs) if is_share(name)
             and any(name in run.metrics and run.metrics[name].thirds for run in runs)]  # fmt: skip
    names = sorted(names, key=lambda name: not name.endswith("R@1"))[:_PLOTTED_THIRDS]
    if not names:
        return None
    figure, panels = new_figure(0.7 + 2.1 * len(names), [1] * len(names))
    said = []
    for axes, name in zip(panels, names):
        for index, run in enumerate(runs):
            metric: Optional[Metric] = run.metrics.get(name)
            if metric is None or not metric.thirds:
                continue
            at = [(place, metric.thirds[third]) for place, third in enumerate(THIRDS) if third in metric.thirds]
            spread = 0.24 * (index - (len(runs) - 1) / 2) / max(len(runs), 1)
            _points(axes, [score for _, score in at], [place + spread for place, _ in at], _colour(runs, index),
                    run.name, "y")  # fmt: skip
            said.append(f"{run.name} {name.replace('_', ' ')}: "
                        + ", ".join(f"{THIRDS[place]} {shown_score(name, score)}" for place, score in at))  # fmt: skip
        axes.set_xticks(range(3), ["head (common)", "middle", "tail (rare)"])
        axes.set_xlim(-0.5, 2.5)
        axes.set_ylabel("%")
        axes.set_ylim(0, min(108, max(axes.get_ylim()[1], 10)))
        axes.set_title(literal(name.replace("_", " ")), fontsize=10, loc="left")
    legend_above(figure, *panels)
    save(figure, path)
    return "; ".join(said) + "."


def _points(axes: Any, scores: Sequence[Score], at: Sequence[float], color: str, label: str, along: str) -> None:
    """Scores in per cent as dots with their intervals, along one axis."""
    values = np.array([100 * score.value for score in scores])
    bars = np.array(
        [[score.value - score.low, score.high - score.value] if score.low is not None and score.high is not None
         else [0, 0] for score in scores]
    ).reshape(-1, 2).T * 100  # fmt: skip
    x, y = (values, at) if along == "x" else (at, values)
    axes.errorbar(x, y, **{f"{along}err": np.maximum(bars, 0)}, fmt="o", color=color, markersize=4.5, elinewidth=1.4,
                  capsize=2, label=literal(label))  # fmt: skip


# -- model card --------------------------------------------------------------------------------------------------------


def model_card(run: TrainingLog) -> str:
    """A Markdown fragment for the model card of a run of ours, with the citation."""
    record = run.record
    what = losses.kind(record["loss"]).number
    lines = [
        "## Training with MM-TS",
        "",
        f"Trained with [MM-TS](https://arxiv.org/abs/2603.08202) in {_cell(run.host)} by mmts-plugins "
        f"{_cell(_shown(record.get('mmts_plugins')))}: {_method(record, what)}.",
        "",
        "| setting | value |",
        "| --- | --- |",
    ]
    # Of the table's path the last part alone: a card is shared, its author's folders are not.
    shown = {name: Path(str(value)).name if name == "clusters" and value else value for name, value in record.items()}
    lines += [line([_cell(name), _cell(_shown(value))]) for name, value in shown.items()
              if says_something(name, value) and name not in ("host", "host_version", "mmts_plugins")]  # fmt: skip
    if run.metrics:
        thirds = any(metric.thirds for metric in run.metrics.values())
        columns = ["all", *(("head", "middle", "tail") if thirds else ())]
        lines += ["", line(["metric", *columns]), "| --- |" + " ---: |" * len(columns)]
        for name, metric in run.metrics.items():
            cells = [shown_score(name, metric.score)]
            cells += [shown_score(name, metric.thirds.get(third)) for third in THIRDS] if thirds else []
            lines.append(line([_cell(name.replace("_", " ")), *cells]))
        note = "Recalls, precisions and accuracies in per cent, 95% bootstrap intervals in brackets."
        lines += ["", note + (" Head, middle and tail: thirds of the training samples by frequency." if thirds else "")]
    return "\n".join([*lines, "", "```bibtex", CITATION, "```", ""])


def _method(record: dict[str, Any], what: str) -> str:
    """The method as the run used it, ablations too."""
    shift = "a shift that grows with the frequency of its concept"
    if record.get("shuffle_shifts") is not None:
        shift = "a shift that belongs to another caption (a control: the shifts were shuffled)"
    if record.get("no_shifts"):
        mean = ", with the mean of the cluster table's shifts" if record.get("mean_matched") else ""
        return f"the {what} of all training samples " + (
            f"was constant{mean}" if record.get("no_schedule") else
            f"moved on a cosine over the run (schedule alone{mean})")  # fmt: skip
    if record.get("no_schedule"):
        return f"the {what} of every training sample was {shift} (shifts alone)"
    return f"the {what} of every training sample was the sum of a cosine over the run and {shift}"


def _cell(text: str) -> str:
    """Text in a table of Markdown, with nothing in it that Markdown or HTML would act on."""
    return re.sub(r"([\\|<>`*\[\]$~])", r"\\\1", " ".join(text.split()).replace("&", "&amp;"))


CITATION = """\
@article{sheludzko2026mmts,
  title   = {MM-TS: Multi-Modal Temperature and Margin Schedules for Contrastive Learning with Long-Tail Data},
  author  = {Sheludzko, Siarhei and Duka, Dhimitrios and Schiele, Bernt and Kuehne, Hilde and Kukleva, Anna},
  journal = {arXiv preprint arXiv:2603.08202},
  year    = {2026}
}"""
