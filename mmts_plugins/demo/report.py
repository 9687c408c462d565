"""Tables, plots and the page of a comparison of plain CLIP with MM-TS."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any, Optional

import numpy as np

from .._files import replacing
from ..markdown import line
from ..record import read_record
from ..report.concepts import Concepts
from ..report.logs import record_beside
from ..report.page import embedded, shell
from ..report.plots import HEAD, MIDDLE, MMTS, PLAIN, TAIL, legend_above, new_figure, save, tail_to_head
from ..schedule import CosineSchedule
from ..tables import ClusterTable
from .data import HELD_OUT, Split, captions_of
from .evaluate import DEFINITION, Scores
from .train import TrainingRun

Row = tuple[str, float, float]


# --- tables ---------------------------------------------------------------------------------------------------------


def comparison_table(rows: Iterable[Row]) -> str:
    """A Markdown table of shares in per cent: what, plain CLIP, MM-TS, and the difference in points."""
    rows = list(rows)
    width = max(len(name) for name, _, _ in rows)
    lines = [
        line([f"{'%':<{width}}", "plain CLIP", "MM-TS", "difference"]),
        f"|:{'-' * width}-|-----------:|------:|-----------:|",
    ]
    for name, plain, mmts in rows:
        lines.append(
            line([f"{name:<{width}}", f"{_percent(plain):>10}", f"{_percent(mmts):>5}", f"{_points(plain, mmts):>10}"])
        )
    return "\n".join(lines) + "\n"


def recall_rows(plain: dict[str, dict[int, float]], mmts: dict[str, dict[int, float]]) -> list[Row]:
    """Rows of :func:`comparison_table` from two results of image-text retrieval."""
    names = {"image_to_text": "image → text", "text_to_image": "text → image"}
    return [(f"{name} R@{k}", plain[way][k], mmts[way][k]) for way, name in names.items() for k in plain[way]]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(plain: float, mmts: float) -> str:
    return f"{100 * (mmts - plain):+.1f}"


# --- plots ----------------------------------------------------------------------------------------------------------


def plot_temperatures(path: Path, table: ClusterTable, mmts: TrainingRun, plain: TrainingRun) -> str:
    """The temperature of three clusters over the run that was made, and the one that plain CLIP learned.

    Args:
        path: PNG to write.
        table: the cluster table of the run.
        mmts: the schedule is the one it recorded beside its checkpoints.
        plain: its logged logit scale is one over its temperature.

    Returns:
        A description of the picture.
    """
    record = read_record(record_beside(mmts.checkpoint))
    concepts = _clusters(table, record)
    sizes, shifts = concepts.frequency, concepts.shift
    total = int(record["total_steps"])
    schedule = CosineSchedule(0.0 if record["no_schedule"] else record["alpha"], record["period"])
    steps = np.arange(total)
    base = np.array([schedule.offset(step) for step in steps.tolist()])

    figure, (top, bottom) = new_figure(4.2, height_ratios=(3.2, 1))
    said = []
    for name, cluster, color in (("largest", 0, HEAD), ("middle", len(sizes) // 2, MIDDLE), ("smallest", -1, TAIL)):
        curve = base + shifts[cluster]
        top.plot(steps, curve, color=color, linewidth=2, label=f"{name} cluster ({sizes[cluster]:.0f} samples)")
        said.append(f"{name} cluster {curve.min():.3f} to {curve.max():.3f}")
    learned = [
        (total * at.epochs / plain.progress[-1].epochs, 1 / at.logit_scale)
        for at in plain.progress
        if at.logit_scale > 0 and plain.progress[-1].epochs > 0
    ]
    top.plot(
        *np.array(learned).reshape(-1, 2).T,
        color=PLAIN,
        linewidth=1.8,
        linestyle=(0, (4, 2)),
        label="plain CLIP (learned)",
    )
    top.set_ylabel("temperature")
    top.set_ylim(bottom=0)
    bottom.plot(steps, base, color="#444444", linewidth=1.6)
    bottom.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    bottom.set_ylabel("shared part")
    bottom.set_xlabel("optimizer step")
    for axes in (top, bottom):
        axes.set_xlim(0, max(total - 1, 1))
    top.tick_params(labelbottom=False)
    legend_above(figure, top)
    save(figure, path)
    return f"Temperatures over {total} steps, {total / record['period']:g} cosine periods: {', '.join(said)}."


def plot_cluster_sizes(
    path: Path, table: ClusterTable, mmts: TrainingRun, names: Optional[dict[int, str]] = None
) -> str:
    """Bars of the cluster sizes, largest first, coloured by shift.

    Args:
        path: PNG to write.
        table: the cluster table of the run.
        mmts: its recorded config says which shifts it used.
        names: ``{cluster: label}``, where there are few enough to name.

    Returns:
        A description of the picture.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    concepts = _clusters(table, read_record(record_beside(mmts.checkpoint)))
    clusters, sizes, shifts = concepts.ids, concepts.frequency, concepts.shift
    colors = ScalarMappable(Normalize(shifts.min(), shifts.max()), tail_to_head())
    figure, (axes,) = new_figure(2.7)
    bars = axes.bar(np.arange(len(sizes)), sizes, color=colors.to_rgba(shifts), width=0.76 if names else 1.0)
    axes.set_ylabel("training samples")
    axes.set_xlabel("cluster, largest first")
    if names:
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
        axes.set_xticks(np.arange(len(sizes)), [names[cluster] for cluster in clusters.tolist()])
    else:
        axes.set_xlim(-0.5, len(sizes) - 0.5)
    figure.colorbar(colors, ax=axes, label="shift", pad=0.02, aspect=18).outline.set_visible(False)
    save(figure, path)
    return f"{len(sizes)} clusters, from {sizes[0]:.0f} training samples down to {sizes[-1]:.0f}."


def plot_accuracy(path: Path, outcome: Outcome) -> str:
    """Zero-shot accuracy by digit, most common digit first. Returns a description of the picture."""
    order = outcome.split.order
    at = np.arange(len(order))
    figure, (axes,) = new_figure(3.2)
    for offset, name, scores, color in ((-0.2, "plain CLIP", outcome.plain, PLAIN), (0.2, "MM-TS", outcome.mmts, MMTS)):
        bars = axes.bar(at + offset, [100 * scores.digits[d] for d in order], width=0.38, color=color, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=5.8)
    axes.set_xticks(at, [f"{digit}\n{len(outcome.split.train[digit])}" for digit in order])
    axes.set_xlabel("digit, and its number of training images")
    axes.set_ylabel("zero-shot accuracy, %")
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 25))
    legend_above(figure, axes)
    save(figure, path)
    said = [f"{d}: {_percent(outcome.plain.digits[d])} and {_percent(outcome.mmts.digits[d])}" for d in order]
    return (
        "Accuracy in per cent, plain CLIP and MM-TS, from the most common digit to the rarest: " + "; ".join(said) + "."
    )


def _clusters(table: ClusterTable, record: dict[str, Any]) -> Concepts:
    """The clusters under a recorded config, largest first."""
    if record["no_shifts"]:
        return Concepts.of(table, np.full(len(table), (record["shift_min"] + record["shift_max"]) / 2))
    return Concepts.of(table, table.shifts(record["shift_min"], record["shift_max"]))


# --- the demo's result and page -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """All that the demo reports."""

    seed: int
    epochs: int
    split: Split
    plain: Scores
    mmts: Scores
    plain_run: TrainingRun
    mmts_run: TrainingRun
    cluster_command: str
    seconds: float
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "seed": self.seed,
            "epochs": self.epochs,
            "seconds": round(self.seconds, 1),
            "definition": DEFINITION,
            "training_images": {digit: len(self.split.train[digit]) for digit in self.split.order},
            "held_out_images_per_digit": HELD_OUT,
            "groups": self.split.groups(),
            "plain": self._run_json(self.plain_run, self.plain),
            "mmts": {
                **self._run_json(self.mmts_run, self.mmts),
                "config": read_record(record_beside(self.mmts_run.checkpoint)),
            },
            "cluster_command": self.cluster_command,
            "versions": self.versions,
        }

    @staticmethod
    def _run_json(run: TrainingRun, scores: Scores) -> dict[str, Any]:
        return {**asdict(scores), "seconds": round(run.seconds, 1), "command": run.command}

    def rows(self) -> list[Row]:
        """What the table compares."""
        rows = recall_rows(self.plain.recall, self.mmts.recall)
        rows.append(("accuracy, all digits", self.plain.accuracy, self.mmts.accuracy))
        for name, digits in self.split.groups().items():
            sizes = [len(self.split.train[digit]) for digit in digits]
            label = f"accuracy, {name}: {', '.join(map(str, digits))} ({sizes[0]}–{sizes[-1]} images)"
            rows.append((label, self.plain.groups[name], self.mmts.groups[name]))
        return rows

    def table(self) -> str:
        """The comparison, in Markdown."""
        return comparison_table(self.rows())

    def caveat(self) -> str:
        """How far the numbers carry."""
        images = sum(map(len, self.split.train.values()))
        return (
            f"One seed ({self.seed}), {images} training images, {HELD_OUT} held-out images per digit: another seed can "
            f"change the differences, and their sign (try --seed {self.seed + 1}). This shows that the method runs, "
            "not how good it is."
        )


def write(folder: Path, outcome: Outcome) -> None:
    """Write the plots, ``results.md`` and ``report.html``."""
    table = ClusterTable.load(folder / "clusters.parquet")
    digits = {caption: str(digit) for digit in range(10) for caption in captions_of(digit)}
    names = {cluster: digits[key] for key, cluster in zip(table.keys.to_pylist(), table.cluster.tolist())}
    figures = {
        "temperatures": plot_temperatures(folder / "temperatures.png", table, outcome.mmts_run, outcome.plain_run),
        "cluster_sizes": plot_cluster_sizes(folder / "cluster_sizes.png", table, outcome.mmts_run, names),
        "accuracy": plot_accuracy(folder / "accuracy.png", outcome),
    }
    pages = {
        "results.md": f"{outcome.table()}\n{outcome.caveat()}\n\n{DEFINITION}\n",
        "report.html": _page(folder, outcome, figures),
    }
    for name, text in pages.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _page(folder: Path, outcome: Outcome, alt: dict[str, str]) -> str:
    """The page, with everything it shows inside it."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{_percent(plain)}</td><td>{_percent(mmts)}</td>"
        f"<td>{_points(plain, mmts)}</td></tr>\n"
        for name, plain, mmts in outcome.rows()
    )
    images = {f"image_{name}": embedded(folder / f"{name}.png", text) for name, text in alt.items()}
    record = read_record(record_beside(outcome.mmts_run.checkpoint))
    commands = (outcome.cluster_command, outcome.plain_run.command, outcome.mmts_run.command)
    body = _BODY.substitute(
        images,
        rows=rows,
        caveat=html.escape(outcome.caveat()),
        definition=html.escape(DEFINITION),
        training=sum(map(len, outcome.split.train.values())),
        largest=max(map(len, outcome.split.train.values())),
        smallest=min(map(len, outcome.split.train.values())),
        config=html.escape(", ".join(f"{name} {record[name]:g}" for name in ("alpha", "shift_min", "shift_max"))),
        oscillations=f"{record['total_steps'] / record['period']:g}",
        commands=html.escape("\n\n".join(commands)),
        versions=html.escape(", ".join(f"{name} {number}" for name, number in outcome.versions.items())),
        seconds=f"{outcome.seconds:.0f}",
    )
    return shell("MM-TS demo: plain CLIP against MM-TS", body)


_BODY = Template("""<h1>Plain CLIP against MM-TS on long-tail handwritten digits</h1>
<p>OpenCLIP's own trainer trained the same small model twice on $training images of handwritten digits, whose numbers
fall from $largest for the most common digit to $smallest for the rarest: once as it is, once with
<code>--loss mmts</code>. Seed, data and number of steps were the same.</p>
<p class="note">$caveat</p>

<h2>Held-out images, equally many of each digit</h2>
<table>
<thead><tr><th>%</th><th>plain CLIP</th><th>MM-TS</th><th>difference</th></tr></thead>
<tbody>
$rows</tbody>
</table>
<p class="small">$definition</p>

<h2>Accuracy by digit</h2>
$image_accuracy

<h2>Temperature over the run</h2>
<p>MM-TS gives every sample the sum of a cosine that all share (lower panel; $oscillations periods) and a shift that
grows with the size of its caption's cluster ($config). Plain CLIP learns one temperature for all.</p>
$image_temperatures

<h2>Cluster sizes</h2>
<p>The cluster of a caption is the digit it names.</p>
$image_cluster_sizes

<h2>What was run</h2>
<pre>$commands</pre>
<p class="small">In the folder of this page; $seconds seconds in all. Where mmts-plugins is installed,
<code>python -m open_clip_train.main</code> takes <code>--loss mmts</code> without the launcher. $versions.</p>""")
