"""The report of cluster tables: how long the tail is, what training will make of it, and what the clusters hold."""

from __future__ import annotations

import colorsys
import csv
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from .. import losses
from .._files import replacing
from ..data.embeddings import LARGEST, check_finite, read_embeddings
from ..errors import ConfigError, MMTSError, TableError, one_line, reading, shown
from ..hosts.registry import adapters
from ..presets import presets
from ..preview import Preview, read_table
from ..tables import CAPTION, CLASS, ClusterTable
from .concepts import Concepts, examples, shortened, telling_words
from .page import Page, number, slugs
from .plots import MIDDLE, SERIES, legend_above, literal, logarithmic, new_figure, save, tail_to_head

_SHOWN = 5  # largest and smallest clusters, and examples of each plus one: as the paper's Tables 10 to 12
_EXAMPLES = 4
_REPEATED = 10
_FEWEST_POINTS = 10
_QUANTILES = 1000
_BANDS = 2  # more of them hide one another
_LEGEND_LINE = 0.2  # inches


@dataclass(frozen=True)
class Options:
    """Of ``mmts report TABLE``; see its ``--help``."""

    preset: Optional[str] = None
    embeddings: Optional[str] = None
    encoder: Optional[str] = None
    projection: str = "tsne"
    sample: int = 2000
    seed: int = 0
    distribution: Optional[str] = None


@dataclass(frozen=True, eq=False)
class Shown:
    """A table and what the report says about it."""

    name: str
    table: ClusterTable
    preview: Preview
    concepts: Concepts

    @property
    def things(self) -> str:
        """What its clusters are."""
        return "clusters" if self.table.kind == CAPTION else "classes"

    @property
    def label(self) -> str:
        """The name, for a figure."""
        return literal(self.name)


def write(inputs: Sequence[str], folder: Path, options: Options) -> list[Path]:
    """Write the report of one or several tables.

    Args:
        inputs: Parquet tables, folders of their parts, ``class_id,count`` CSVs, or annotations in EK-100's form.
        folder: gets ``report.html``, the same plots as PNGs, and the clusters as CSV.
        options: of the report.

    Returns:
        The files written.

    Raises:
        TableError, ConfigError, MMTSError: an input or an option that cannot be used; before anything is written.
    """
    shown = [_shown(name, table, options) for path in inputs for name, table in read(path, options.distribution)]
    if options.embeddings and len(shown) > 1:
        raise ConfigError(f"--embeddings belongs to one table, but {len(shown)} are given; use --encoder")
    maps = [_project(each, options) for each in shown]
    page = Page("Cluster table: " + shown[0].name if len(shown) == 1 else f"{len(shown)} cluster tables")
    written: list[Path] = []

    def picture(name: str, alt: str) -> None:
        page.picture(folder / name, alt)
        written.append(folder / name)

    _facts(page, shown)
    page.heading("The long tail")
    picture("long_tail.png", plot_long_tail(folder / "long_tail.png", shown))
    page.text(
        "Above: how common each concept is, from the most common to the rarest. Below: the share of the samples that "
        "the most common concepts hold together; the dotted diagonal would be a balanced set, the lines are thirds."
    )
    page.heading("Shift and temperature")
    _temperatures(page, shown)
    picture("temperatures.png", plot_temperatures(folder / "temperatures.png", shown))
    several = len(shown) > 1
    names = slugs([re.sub(r"\.(csv|parquet)\b", "", each.name) for each in shown])
    for each, points, own in zip(shown, maps, names):
        words = _words(each, options.seed)
        if several and each.table.kind == CAPTION:
            page.heading(each.name)
        _stability(page, each, several)
        if each.table.kind == CAPTION:
            _examples(page, each, words, several)
            _section(page, "Map of the captions", several)
            if isinstance(points, Points):
                name = f"map_{own}.png" if several else "map.png"
                picture(name, plot_map(folder / name, each, points, options.projection))
                page.text(_legend(each, points, words, options.projection))
            else:
                page.text(points)
        _duplicates(page, each, several)
        path = folder / (f"clusters_{own}.csv" if several else "clusters.csv")
        _write_clusters(path, each, words)
        written.append(path)
    page.heading("How the table was made" if not several else "How the tables were made")
    _origin(page, shown)
    page.write(folder / "report.html")
    return [folder / "report.html", *written]


def read(path: str, distribution: Optional[str] = None) -> list[tuple[str, ClusterTable]]:
    """The tables in an input, each with a name.

    Raises:
        TableError: it is none of the kinds that :func:`write` knows.
    """
    name = one_line(Path(path).name or path)
    with reading(path, "cannot be read as a table", TableError):
        return _read(path, name, distribution)


def _read(path: str, name: str, distribution: Optional[str]) -> list[tuple[str, ClusterTable]]:
    if not path.lower().endswith(".csv"):
        return [(name, ClusterTable.load(path))]
    with open(path, newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file), [])
    if "class_id" in columns:
        return [(name, read_table(path))]
    for adapter in adapters():
        found = adapter.classes_in(path, columns)
        if distribution is not None and found and distribution not in found:
            raise ConfigError(f"--distribution {shown(distribution)}: {path} has {', '.join(found)}")
        if found:
            return [(f"{name}: {kind}", count()) for kind, count in found.items() if distribution in (None, kind)]
    raise TableError(
        f"{path}: neither counts (columns class_id, count) nor annotations whose classes a host counts; found: "
        f"{', '.join(columns[:8])}. For captions make a table first: mmts cluster {path} -o clusters.parquet"
    )


def _default_preset(table: ClusterTable) -> str:
    """Of captions the first for temperatures, of classes the first for margins: as the paper schedules them."""
    margins = table.kind == CLASS
    return next(name for name, preset in presets().items() if losses.kind(preset.loss).is_margin == margins)


def _shown(name: str, table: ClusterTable, options: Options) -> Shown:
    preset = options.preset or _default_preset(table)
    if preset not in presets():
        raise ConfigError(f"unknown --preset {preset!r}; choose from {', '.join(presets())}")
    preview = Preview.of_preset(preset, 1, table)
    return Shown(
        name, table, preview, Concepts.of(table, table.shifts(preview.values["shift_min"], preview.values["shift_max"]))
    )


# -- sections ----------------------------------------------------------------------------------------------------------


def _section(page: Page, title: str, several: bool) -> None:
    page.subheading(title) if several else page.heading(title)


def _facts(page: Page, shown: Sequence[Shown]) -> None:
    def column(each: Shown) -> dict[str, str]:
        table, frequency = each.table, each.concepts.frequency
        samples = int(table.count.sum())
        half = int(np.searchsorted(np.cumsum(each.concepts.samples), samples / 2)) + 1
        facts = {
            "samples": f"{samples:,}",
            "distinct captions" if table.kind == CAPTION else "": f"{len(table):,}",
            "clusters or classes" if len(shown) > 1 else each.things: f"{len(each.concepts):,}",
            "most common, rarest": f"{number(frequency[0])} and {number(frequency[-1])} samples",
            "imbalance": f"{number(frequency[0] / frequency[-1])} to 1",
            "half of the samples": f"in the {half:,} most common ({half / len(each.concepts):.0%})",
        }
        facts.pop("", None)
        return facts

    columns = [column(each) for each in shown]
    names = list(dict.fromkeys(name for facts in columns for name in facts))
    header = ["", *(each.name for each in shown)] if len(shown) > 1 else []
    page.table(header, [[name, *(facts.get(name, "–") for facts in columns)] for name in names], words=True)
    for each in shown:
        runs = each.table.info.get("runs")
        if isinstance(runs, int) and runs > 1:
            page.text(
                f"The frequencies of {each.name} are means over {runs} clusterings: captions of one "
                "cluster differ, and a cluster is shown with their mean.",
                small=True,
            )


def _temperatures(page: Page, shown: Sequence[Shown]) -> None:
    said = set()
    for each in shown:
        values, half = each.preview.values, each.preview.schedule.alpha / 2
        what = each.preview.kind.number
        if each.preview.name not in said:
            low, high = values["shift_min"], values["shift_max"]
            page.text(
                f"Preset {each.preview.name}: shifts {low:g} to {high:g} (Eq. 6), alpha {2 * half:g}: every {what} "
                f"moves by {half:g} up and down around its shift (Eqs. 7 and 8). Choose another with --preset."
            )
            said.add(each.preview.name)
        if len(shown) > 1:
            page.subheading(each.name)
        frequencies = _thirds(each)
        rows = []
        for name, shift in reversed(list(each.preview.shifts.items())):
            label = name if name in ("rarest", "most common") else f"{name} third"
            rows.append([label, number(frequencies[name]), *(f"{x:.4f}" for x in (shift, shift - half, shift + half))])
        page.table(["", "frequency", "shift", f"lowest {what}", "highest"], rows)
    page.text("Thirds are thirds of the training samples, ranked by frequency; their values are means.", small=True)


def _thirds(each: Shown) -> dict[str, float]:
    frequency = each.table.frequency
    head, middle, tail = each.table.third_means(frequency)
    return {"rarest": frequency.min(), "tail": tail, "middle": middle, "head": head, "most common": frequency.max()}


def _stability(page: Page, each: Shown, several: bool) -> None:
    if each.table.kind == CLASS:
        return  # counted, not estimated
    _section(page, "How stable the frequencies are", several)
    measured = each.table.info.get("stability")
    if not isinstance(measured, dict):
        source = shlex.quote(_plain(each.table.info.get("source") or "CAPTIONS"))
        page.note(
            "Not measured. Another seed of K-Means may give a caption quite another frequency, above all on small "
            f"sets. Measure it with: mmts stability {source} --runs 20"
        )
        return
    verdict = measured.get("verdict")
    if verdict is not None:
        page.note(_plain(verdict))
    rows = [[name.replace("_", " "), _plain(value)] for name, value in measured.items()
            if name != "verdict" and value is not None]  # fmt: skip
    if rows:
        page.table([], rows, words=True)


def _examples(page: Page, each: Shown, words: Sequence[Sequence[str]], several: bool) -> None:
    count = len(each.concepts)
    large = range(min(_SHOWN, count))
    small = range(max(_SHOWN, count - _SHOWN), count)
    half = each.preview.schedule.alpha / 2
    _section(page, "Examples of the most common and the rarest clusters", several)
    page.text("The words of a title tell the cluster from all others, by class-based TF-IDF.", small=True)
    for place in [*large, *small]:
        concepts = each.concepts
        members = concepts.members(place)
        page.subheading(f"#{place + 1}: {', '.join(words[place]) or 'no words'}")
        shift = concepts.shift[place]
        page.text(
            f"{concepts.samples[place]:,} samples, frequency {number(concepts.frequency[place])}; shift {shift:.4f}, "
            f"{each.preview.kind.number} {shift - half:.4f} to {shift + half:.4f}",
            small=True,
        )
        page.items(examples(each.table, members, _EXAMPLES))


def _duplicates(page: Page, each: Shown, several: bool) -> None:
    table = each.table
    if table.kind == CLASS:
        return
    _section(page, "Duplicates", several)
    samples = int(table.count.sum())
    if samples == len(table):
        page.text("Every caption occurs once, or the table does not say how often (column count).")
        return
    repeated = int((table.count > 1).sum())
    page.text(
        f"{samples - len(table):,} of {samples:,} samples ({(samples - len(table)) / samples:.1%}) repeat an earlier "
        f"caption; {repeated:,} captions occur more than once. In a batch, equal captions are each other's negatives."
    )
    most = np.argsort(-table.count, kind="stable")[: min(_REPEATED, repeated)]
    page.table(
        ["most repeated", "samples"],
        [
            [shortened(key), f"{many:,}"]
            for key, many in zip(table.keys.take(most).to_pylist(), table.count[most].tolist())
        ],
    )


def _origin(page: Page, shown: Sequence[Shown]) -> None:
    for each in shown:
        if len(shown) > 1:
            page.subheading(each.name)
        info = {name: value for name, value in each.table.info.items() if name not in ("stability", "content_hash")}
        page.table([], [*([name.replace("_", " "), _plain(value)] for name, value in info.items()),
                        ["content hash", each.table.content_hash]], words=True)  # fmt: skip


def _plain(value: Any) -> str:
    """A value of a table's metadata, which may hold anything, in a few words."""
    if isinstance(value, dict) and all(isinstance(each, (str, float, int)) for each in value.values()):
        return one_line(", ".join(f"{name} {_plain(each)}" for name, each in value.items()))
    if isinstance(value, str):
        return one_line(value)
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def _words(each: Shown, seed: int) -> list[list[str]]:
    if each.table.kind == CLASS:
        return [[] for _ in range(len(each.concepts))]
    count = len(each.concepts)
    shown = {*range(min(_SHOWN, count)), *range(max(0, count - _SHOWN), count)}
    return telling_words(each.table, each.concepts, sorted(shown), seed=seed)


def _write_clusters(path: Path, each: Shown, words: Sequence[Sequence[str]]) -> None:
    half, concepts = each.preview.schedule.alpha / 2, each.concepts
    _, first_key, keys = np.unique(concepts.place, return_index=True, return_counts=True)
    classes = each.table.kind == CLASS
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = ["frequency", "samples", "keys", "shift", "lowest", "highest"]
        writer.writerow(["class", *columns] if classes else ["cluster", *columns, "words"])
        for place in range(len(concepts)):
            shift = concepts.shift[place]
            writer.writerow([
                each.table.keys[int(first_key[place])].as_py() if classes else int(concepts.ids[place]),
                f"{concepts.frequency[place]:g}", int(concepts.samples[place]), int(keys[place]),
                f"{shift:.6f}", f"{shift - half:.6f}", f"{shift + half:.6f}",
                *([] if classes else [" ".join(words[place])]),
            ])  # fmt: skip


# -- plots -------------------------------------------------------------------------------------------------------------


def plot_long_tail(path: Path, shown: Sequence[Shown]) -> str:
    """Frequencies by rank (the paper's Figs. 5, 8, 9 and 11), and their running sum. Returns a description.

    One table is drawn on linear axes, as the paper does; several share logarithmic ones.
    """
    single = len(shown) == 1
    figure, (top, bottom) = new_figure(5.6 + _LEGEND_LINE * len(shown), height_ratios=(1.25, 1))
    said = []
    for index, each in enumerate(shown):
        color = MIDDLE if single else SERIES[index % len(SERIES)]
        frequency = each.concepts.frequency
        rank = np.arange(1, len(frequency) + 1)
        if single:
            top.fill_between(np.append(rank - 0.5, rank[-1] + 0.5), np.append(frequency, frequency[-1]), step="post",
                             color=color, linewidth=0)  # fmt: skip
        else:
            top.plot(rank, frequency, color=color, linewidth=2, label=f"{each.label} ({len(rank):,})",
                     marker="o" if len(rank) < 20 else None)  # fmt: skip
        held = np.concatenate([[0], np.cumsum(each.concepts.samples)]) / each.concepts.samples.sum()
        bottom.plot(100 * np.linspace(0, 1, len(held)), 100 * held, color=color, linewidth=2)
        third = held[-(-len(rank) // 3)]
        said.append(
            f"{each.name}: {number(frequency[0])} samples for the most common of {len(rank):,} {each.things} down to "
            f"{number(frequency[-1])}; the most common third of them hold {third:.0%} of the samples"
        )
    things = shown[0].things if len({each.things for each in shown}) == 1 else "concepts"
    top.set_ylabel("frequency (samples)")
    top.set_xlabel(f"{things}, most common first")
    if single:
        top.set_xlim(0.5, len(shown[0].concepts) + 0.5)
        top.set_ylim(bottom=0)
    else:
        logarithmic(top)
        legend_above(figure, top, columns=1)
    bottom.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=1, linestyle=":")
    for third in (100 / 3, 200 / 3):
        bottom.axhline(third, color="#bbbbbb", linewidth=0.8)
    bottom.set_xlim(0, 100)
    bottom.set_ylim(0, 101)
    bottom.set_xlabel(f"{things}, most common first, %")
    bottom.set_ylabel("samples held, %")
    save(figure, path)
    return "; ".join(said) + "."


def plot_temperatures(path: Path, shown: Sequence[Shown]) -> str:
    """The shift of every training sample and the band that the schedule moves it in. Returns a description."""
    figure, (axes,) = new_figure(3.3 + _LEGEND_LINE * len(shown))
    said = []
    share = np.linspace(0, 1, _QUANTILES + 1)
    for index, each in enumerate(shown):
        color = MIDDLE if len(shown) == 1 else SERIES[index % len(SERIES)]
        half = each.preview.schedule.alpha / 2
        shifts = each.table.shifts(each.preview.values["shift_min"], each.preview.values["shift_max"])
        order = np.argsort(-shifts, kind="stable")
        edges = np.cumsum(each.table.count[order]) / each.table.count.sum()
        shift = shifts[order][np.minimum(np.searchsorted(edges, share), len(order) - 1)]
        axes.plot(100 * share, shift, color=color, linewidth=2, label=f"{each.label}: {each.preview.name}")
        if len(shown) <= _BANDS:
            axes.fill_between(100 * share, shift - half, shift + half, color=color, alpha=0.15, linewidth=0)
        said.append(f"{each.name}, preset {each.preview.name}: shift {shift[0]:.3f} for the most common samples, "
                    f"{shift[_QUANTILES // 2]:.3f} for the median one, {shift[-1]:.3f} for the rarest, each moving by "
                    f"{half:g} up and down")  # fmt: skip
    for third in (100 / 3, 200 / 3):
        axes.axvline(third, color="#bbbbbb", linewidth=0.8)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    for middle, name in ((100 / 6, "head"), (50, "middle"), (500 / 6, "tail")):
        axes.annotate(name, (middle, 0), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="center", fontsize=9, color="#777777")  # fmt: skip
    axes.set_xlim(0, 100)
    axes.set_xlabel("training samples, most common concept first, %")
    axes.set_ylabel("shift, and its range" if len(shown) <= _BANDS else "shift")
    if len(shown) > 1:
        legend_above(figure, axes, columns=1)
    save(figure, path)
    return "; ".join(said) + "."


_LABEL = {"facecolor": "white", "alpha": 0.8, "pad": 1, "edgecolor": "none"}
_PROJECTIONS = {"tsne": "t-SNE", "umap": "UMAP"}


class Points(NamedTuple):
    """A map: rows of the table, and where each lies, ``[n, 2]``."""

    rows: np.ndarray
    where: np.ndarray


def _project(each: Shown, options: Options) -> Union[Points, str]:
    """A map of a sample of the captions, or why there is none."""
    if each.table.kind == CLASS:
        if options.embeddings or options.encoder:
            raise ConfigError(f"{each.name}: a table of classes has no captions to embed; drop --embeddings, --encoder")
        return "Not drawn: classes have no captions."
    if not (options.embeddings or options.encoder):
        return (
            "Not drawn: give the captions' embeddings (--embeddings FILE.npy, a row for each key of the table) or an "
            "encoder (--encoder NAME)."
        )
    if options.embeddings and options.encoder:
        raise ConfigError("give either --embeddings or --encoder, not both")
    rows = np.arange(len(each.table))
    if len(rows) > options.sample:
        rows = np.sort(np.random.default_rng(options.seed).choice(len(rows), options.sample, replace=False))
    if len(rows) < _FEWEST_POINTS:
        return f"Not drawn: {len(rows)} captions are too few for a map."
    if options.embeddings:
        points = read_embeddings(options.embeddings, None)
        if len(points) != len(each.table):
            raise ConfigError(
                f"{options.embeddings}: {len(points):,} rows for the {len(each.table):,} keys of {each.name}; give one "
                "row for each key, in the table's order"
            )
        chosen = np.asarray(points[rows], np.float32)
    else:
        assert options.encoder is not None
        from ..data.encoders import encode

        chosen = encode(options.encoder, each.table.keys.take(rows).to_pylist(), options.seed)
    check_finite(chosen, options.embeddings or f"the embeddings of {options.encoder}", LARGEST)
    return Points(rows, (_umap if options.projection == "umap" else _tsne)(chosen, options.seed))


def _tsne(points: np.ndarray, seed: int) -> np.ndarray:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise MMTSError(f"t-SNE needs scikit-learn ({error}): pip install 'mmts-plugins[cluster]'") from error
    perplexity = min(30.0, (len(points) - 1) / 3)
    return np.asarray(
        TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed).fit_transform(points)
    )


def _umap(points: np.ndarray, seed: int) -> np.ndarray:
    try:
        from umap import UMAP
    except ImportError as error:
        raise MMTSError(f"--projection umap needs umap-learn ({error}): pip install umap-learn") from error
    return np.asarray(UMAP(metric="cosine", random_state=seed).fit_transform(points))


def _legend(each: Shown, points: Points, words: Sequence[Sequence[str]], projection: str) -> str:
    marked = (f"#{place + 1} {', '.join(words[place][:3])}" for place in range(_marked(each)))
    return (
        f"{_PROJECTIONS[projection]} of {len(points.rows):,} captions, drawn at random; distances between groups mean "
        "little. Above, colours are clusters (like hues mean nothing), and numbers mark the most common ones: "
        f"{'; '.join(marked)}. Below, the same points by their shift."
    )


def _marked(each: Shown) -> int:
    return min(_SHOWN, len(each.concepts))


def plot_map(path: Path, each: Shown, points: Points, projection: str) -> str:
    """The captions in a plane, coloured by cluster (the paper's Figs. 4 and 7) and by shift. Returns a description."""
    figure, (top, bottom) = new_figure(9.6, height_ratios=(1, 1))
    rows, where = points
    place = each.concepts.place[rows]
    size = 9 if len(rows) <= 2500 else 4
    order = np.random.default_rng(0).permutation(len(rows))  # so that no cluster lies on top of all others
    top.scatter(*where[order].T, c=[_hue(concept) for concept in place[order].tolist()], s=size, linewidths=0)
    for concept in range(_marked(each)):
        inside = where[place == concept]
        if len(inside):
            top.annotate(f"#{concept + 1}", np.median(inside, axis=0), fontsize=9, fontweight="bold", ha="center",
                         va="center", bbox=_LABEL)  # fmt: skip
    shifts = each.table.shifts(each.preview.values["shift_min"], each.preview.values["shift_max"])[rows]
    drawn = bottom.scatter(*where[order].T, c=shifts[order], cmap=tail_to_head(), s=size, linewidths=0)
    figure.colorbar(drawn, ax=bottom, label="shift", pad=0.02, aspect=30).outline.set_visible(False)
    for axes, title in (
        (top, f"{_PROJECTIONS[projection]}, coloured by cluster"),
        (bottom, "the same, coloured by shift"),
    ):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    save(figure, path)
    return f"{_PROJECTIONS[projection]} of {len(rows):,} captions of {each.name}, coloured by cluster and by shift."


def _hue(number: int) -> tuple[float, float, float]:
    """Colours of many clusters: successive numbers lie far apart on the circle of hues."""
    return colorsys.hsv_to_rgb(number * 0.618034 % 1, (0.9, 0.6)[number % 2], (0.85, 0.7, 0.55)[number % 3])
