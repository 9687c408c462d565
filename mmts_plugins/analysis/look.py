"""What ``mmts analyze`` does: get features, measure, and write ``analysis.json``, a PNG and ``report.html``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from .._files import replacing
from ..errors import ConfigError, MMTSError
from ..evaluation import sets
from ..evaluation.evaluate import read_features
from ..evaluation.model import encode_images, encode_texts, load_images, load_model, similarity_of
from ..evaluation.retrieval import Similarity
from ..geometry import in_both_units
from ..report.page import Page
from ..report.plots import MIDDLE, MMTS, PLAIN, SERIES, TAIL, legend_above, new_figure, save
from . import distances, equilibrium, landscape, probe


@dataclass(frozen=True)
class Source:
    """Whose pairs are looked at.

    Attributes:
        reading: of images and captions; ``None`` where there are only features.
        model, checkpoint, pretrained: as in ``mmts eval``.
        image_features, text_features: files ``[N, D]`` of pairs, row by row.
    """

    reading: Optional[sets.Reading] = None
    model: Optional[str] = None
    checkpoint: Optional[str] = None
    pretrained: Optional[str] = None
    image_features: Optional[str] = None
    text_features: Optional[str] = None
    batch_size: int = 256
    device: Optional[str] = None
    sample: int = 0
    seed: int = 0

    @property
    def shown(self) -> str:
        if self.image_features is not None:
            return f"{self.image_features} and {self.text_features}"
        return f"{self.checkpoint or self.pretrained or self.model} on {self.reading.data if self.reading else '?'}"


@dataclass(frozen=True)
class Pairs:
    """Features whose rows belong together.

    Attributes:
        scale: the model's own logit scale, where there is a model; ``factor`` what it is of the paper's.
        low, high: between which all similarities lie.
    """

    images: Tensor
    texts: Tensor
    similarity: Similarity
    low: float
    high: float
    scale: Optional[float] = None
    factor: float = 1.0
    geometry: str = "the sphere, inner products"
    notes: Sequence[str] = ()


def load(source: Source) -> tuple[Any, Any, Any, str]:
    """The model of a source, its transform, its tokenizer and its device."""
    device = source.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if source.model is None:
        raise ConfigError("this analysis needs a model: --checkpoint, or --model with --pretrained")
    return (*load_model(source.model, source.checkpoint, device, source.pretrained), device)


def pairs(source: Source) -> Pairs:
    """Read or encode.

    Raises:
        MMTSError: a file or a flag cannot be used.
    """
    if source.image_features is not None:
        if source.text_features is None:
            raise ConfigError("--image-features needs --text-features too, row by row")
        images = read_features(source.image_features, "--image-features")
        texts = read_features(source.text_features, "--text-features", images, source.image_features)
        if len(images) != len(texts):
            raise MMTSError(
                f"{source.text_features}: {len(texts)} rows for the {len(images)} of {source.image_features}"
            )
        chosen = _sample(len(images), source)
        if chosen is not None:
            images, texts = images[chosen], texts[chosen]
        return Pairs(images, texts, F.linear, -1.0, 1.0)
    model, preprocess, tokenizer, device = load(source)
    files, captions, notes = _read(source)
    images = encode_images(model, preprocess, files, source.batch_size, device)
    texts = encode_texts(model, tokenizer, captions, source.batch_size, device)
    geometry, low, high = getattr(model, "mmts_geometry", None), -1.0, 1.0
    if geometry is not None and geometry.distance == "geodesic":
        low, high = -math.sqrt(geometry.m) * math.pi, 0.0
    elif geometry is not None and geometry.distance == "euclidean":
        low, high = -float(images.norm(dim=1).max() + texts.norm(dim=1).max()), 0.0
    scale = float(model.logit_scale.detach().exp().mean())
    factor = 1.0 if geometry is None else geometry.factor
    name = Pairs.geometry if geometry is None else str(geometry)
    return Pairs(images, texts, similarity_of(model), low, high, scale, factor, name, notes)


def _sample(count: int, source: Source) -> Optional[Tensor]:
    if not source.sample or source.sample >= count:
        return None
    return torch.randperm(count, generator=torch.Generator().manual_seed(source.seed))[: source.sample]


def _read(source: Source) -> tuple[list[Any], list[str], list[str]]:
    """Each image with its first caption."""
    if source.reading is None:
        raise ConfigError("no data given: mmts analyze WHAT DATA --checkpoint ..., or --image-features")
    samples = sets.read(source.reading)
    files = list(samples.images)
    captions = [samples.captions[rows[0]] for rows in samples.image_rows]
    chosen = _sample(len(files), source)
    if chosen is not None:
        files, captions = ([each[i] for i in chosen.tolist()] for each in (files, captions))
    notes = list(samples.notes)
    repeated = len(captions) - len(set(captions))
    if repeated:
        notes.append(
            f"{repeated:,} of {len(captions):,} captions repeat another's word for word: such pairs are negatives to "
            "one another here, as they are in training, and no scale tells them apart"
        )
    return files, captions, notes


def _page(title: str, source: Source, found: Pairs) -> Page:
    """A page that says first what was looked at."""
    page = Page(title)
    page.text(f"{source.shown}; {len(found.images):,} pairs; {found.geometry}.", small=True)
    for note in found.notes:
        page.note(note)
    return page


def _finish(folder: Path, page: Page, name: str, values: dict[str, Any]) -> list[Path]:
    values = {"analysis": name, "mmts_plugins": __version__, **values}
    path = folder / "analysis.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    page.write(folder / "report.html")
    return [folder / "report.html", path, folder / f"{name}.png"]


def _numbers(values: np.ndarray) -> list[Optional[float]]:
    """As JSON can hold them: what is too large for it is ``null``."""
    return [float(value) if np.isfinite(value) else None for value in values]


# -- Fig. 1 -----------------------------------------------------------------------------------------------------------


def look_at_equilibrium(
    source: Source, folder: Path, scales: Sequence[float], batch_sizes: Sequence[int], shuffled: Sequence[float],
    batches: int,
) -> list[Path]:  # fmt: skip
    """Write where the loss is in equilibrium, by batch size and share of shuffled pairs."""
    found = pairs(source)
    sizes = sorted(set(batch_sizes)) or [size for size in (64, 256, 1024, 4096) if size <= len(found.images)]
    sizes = sizes or [len(found.images)]
    total = sum(min(batches, len(found.images) // size) for size in sizes)
    with tqdm(total=total, desc="batches", disable=None) as bar:
        curves = equilibrium.equilibrium(
            found.images, found.texts, scales, sizes, shuffled, found.similarity, batches, source.seed, bar.update
        )
    figure, panels = new_figure(1.2 + 2.6 * len(shuffled), [1] * len(shuffled))
    for axes, share in zip(panels, shuffled):
        for number, curve in enumerate(each for each in curves if each.shuffled == share):
            axes.plot(scales, curve.geometric, color=SERIES[number % len(SERIES)], label=f"batch {curve.batch_size:,}")
        axes.axhline(1, color=PLAIN, linewidth=1)
        if found.scale is not None:
            axes.axvline(found.scale, color=PLAIN, linewidth=1, linestyle="--", label="the model's own")
        axes.set(xscale="log", yscale="log", ylabel="alignment / uniformity")
        axes.set_title(f"{100 * share:g}% of the pairs shuffled", fontsize=10, loc="left")
    panels[-1].set_xlabel("logit scale (1 / temperature)")
    legend_above(figure, *panels, columns=3)
    save(figure, folder / "equilibrium.png")
    page = _page("Equilibrium of the contrastive loss", source, found)
    page.picture(folder / "equilibrium.png", "The ratio of alignment to uniformity over the logit scale")
    page.table(["batch size", "shuffled", "batches", "equilibrium at scale", "that temperature"],
               [[f"{c.batch_size:,}", f"{100 * c.shuffled:g}%", str(c.batches), _scale(c.scale, found.factor),
                 "–" if c.scale is None else f"{1 / c.scale:.4g}"] for c in curves])  # fmt: skip
    page.text("The ratio is exp(-loss) of a mean pair (the geometric mean), as in Fig. 1 of Sun & Li: below 1 the loss "
              "mostly pushes negatives apart, above 1 it mostly pulls positives together. Larger batches and noisier "
              "pairs need a larger scale. The arithmetic mean, which the paper draws, is in analysis.json: a few pairs "
              "that fit very well are most of it.")  # fmt: skip
    for text in _judged(found, curves):
        page.note(text)
    return _finish(folder, page, "equilibrium", {
        "pairs": len(found.images), "geometry": found.geometry, "logit_scale": found.scale, "factor": found.factor,
        "scales": list(scales), "seed": source.seed,
        "curves": [{"batch_size": c.batch_size, "shuffled": c.shuffled, "batches": c.batches, "equilibrium": c.scale,
                    "geometric": _numbers(c.geometric), "arithmetic": _numbers(c.arithmetic)} for c in curves],
    })  # fmt: skip


def _scale(scale: Optional[float], factor: float) -> str:
    if scale is None:
        return "not in this range"
    return in_both_units(scale, factor)


def _judged(found: Pairs, curves: Sequence[equilibrium.Curve]) -> list[str]:
    if found.scale is None:
        return []
    largest = max((c for c in curves if c.shuffled == curves[0].shuffled), key=lambda c: c.batch_size)
    said = [f"The model's own logit scale is {_scale(found.scale, found.factor)}."]
    if largest.scale is not None:
        said.append(
            f"At batches of {largest.batch_size:,} these pairs are in equilibrium at "
            f"{_scale(largest.scale, found.factor)}, {'above' if largest.scale > found.scale else 'below'} that."
        )
    if found.scale > 99.5 and found.factor >= 1:
        said.append("It stands at OpenCLIP's clamp of 100: training wanted a larger one, or noise keeps it there.")
    return said


# -- Fig. 8 -----------------------------------------------------------------------------------------------------------

_TITLES = {"positive": "positive pairs", "negative": "negative pairs", "image_image": "images with images",
           "text_text": "texts with texts"}  # fmt: skip


def look_at_distances(source: Source, folder: Path, bins: int) -> list[Path]:
    """Write the histograms of similarities."""
    found = pairs(source)
    with tqdm(total=distances.blocks(len(found.images)), desc="blocks", disable=None) as bar:
        seen = distances.histogram(
            found.images, found.texts, found.similarity, found.low, found.high, bins, lambda: bar.update()
        )
    figure, panels = new_figure(3.4)
    middles = (seen.edges[1:] + seen.edges[:-1]) / 2
    width = seen.edges[1] - seen.edges[0]
    for kind, color in zip(distances.KINDS, (MMTS, MIDDLE, PLAIN, TAIL)):
        density = seen.counts[kind] / max(1, seen.counts[kind].sum()) / width
        panels[0].fill_between(middles, density, color=color, alpha=0.35, linewidth=0)
        panels[0].plot(middles, density, color=color, label=_TITLES[kind], linewidth=1.2)
    used = np.flatnonzero(sum(seen.counts.values()))
    panels[0].set_xlim(seen.edges[max(0, used[0] - 2)], seen.edges[min(bins, used[-1] + 3)])
    negative = found.low < -1 or found.high < 1
    panels[0].set(xlabel="- distance" if negative else "similarity", ylabel="density")
    legend_above(figure, panels[0])
    save(figure, folder / "distances.png")
    page = _page("Distribution of similarities", source, found)
    page.picture(folder / "distances.png", "Histograms of similarities of positive and negative pairs")
    page.table(["", "pairs", "mean"], [[_TITLES[kind], f"{int(seen.counts[kind].sum()):,}", f"{seen.mean[kind]:.4f}"]
                                       for kind in distances.KINDS])  # fmt: skip
    page.text(
        f"{100 * seen.overlap:.2f}% of the negative pairs are at least as alike as the middling positive pair. Where "
        "images are more like other images than like their texts (the right-most hills are not the positive "
        "pairs'), the modalities lie apart: the loss never compares within one. As in Fig. 8 of Sun & Li."
    )
    return _finish(folder, page, "distances", {
        "pairs": len(found.images), "geometry": found.geometry, "logit_scale": found.scale,
        "edges": seen.edges.tolist(), "counts": {kind: seen.counts[kind].tolist() for kind in distances.KINDS},
        "mean": seen.mean, "overlap": seen.overlap,
    })  # fmt: skip


# -- Fig. 4 -----------------------------------------------------------------------------------------------------------


def look_at_landscape(
    source: Source, folder: Path, scales: Sequence[float], rows: int, grid: int, gradient_grid: int, radius: float
) -> list[Path]:
    """Write the loss around the weights, and the gradient's norm, at several logit scales."""
    model, preprocess, tokenizer, device = load(source)
    files, captions, notes = _read(source)
    if len(files) < 2:
        raise ConfigError(f"{source.shown}: a batch has two pairs or more")
    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(source.seed))[:rows].tolist()
    images = load_images(preprocess, [files[i] for i in chosen])
    texts = tokenizer([captions[i] for i in chosen])

    def encode(part: slice) -> tuple[Tensor, Tensor]:
        of_images = model.encode_image(images[part].to(device), normalize=True)
        return of_images.float().cpu(), model.encode_text(texts[part].to(device), normalize=True).float().cpu()

    own = float(model.logit_scale.detach().exp().mean())
    similarity = similarity_of(model)
    total = grid**2 + gradient_grid * len(scales)
    with tqdm(total=total, desc="places", disable=None) as bar:
        seen = landscape.landscape(
            model, encode, len(images), scales, similarity, grid, gradient_grid, radius, source.batch_size, source.seed,
            bar.update,
        )  # fmt: skip
    from ..report.plots import blank_figure

    columns = min(3, len(scales))
    lines = -(-len(scales) // columns)
    figure = blank_figure(3.0 * columns, 2.8 * (lines + 1))
    places = figure.add_gridspec(lines + 1, columns)
    for number, (scale, losses) in enumerate(zip(seen.scales, seen.losses)):
        axes = figure.add_subplot(places[divmod(number, columns)])
        shown = axes.contourf(seen.steps, seen.steps, losses.T, levels=15, cmap="viridis")
        axes.plot(0, 0, "+", color="white")
        axes.set_title(f"loss at scale {scale:g}", fontsize=10)
        figure.colorbar(shown, ax=axes)
    axes = figure.add_subplot(places[lines, :])
    for number, (scale, norms) in enumerate(zip(seen.scales, seen.gradients)):
        axes.plot(seen.gradient_steps, norms, color=SERIES[number % len(SERIES)], label=f"scale {scale:g}")
    axes.set(xlabel="multiple of the first direction", ylabel="gradient norm", yscale="log")
    axes.legend(frameon=False, fontsize=8, ncols=3)
    save(figure, folder / "landscape.png")
    page = Page("Loss landscape over the temperature")
    page.text(f"{source.shown}; a batch of {len(images):,} pairs.", small=True)
    for note in notes:
        page.note(note)
    page.picture(folder / "landscape.png", "Contours of the loss around the weights, and gradient norms")
    page.table(
        ["logit scale", "loss of the model", "highest around it", "gradient norm of the model"],
        [
            [f"{scale:g}", f"{loss:.4f}", f"{around.max():.4f}", f"{norms[gradient_grid // 2]:.4g}"]
            for scale, loss, around, norms in zip(seen.scales, seen.centre, seen.losses, seen.gradients)
        ],
    )
    page.text(
        "Two random directions, normalised filter by filter (Li et al. 2018); the middle is the model. A landscape "
        "that is steep and whose gradients are large at the model's own scale is what gradient clipping is for: "
        "Sun & Li, Fig. 4."
    )
    page.text(f"The model's own logit scale is {own:.4g}.", small=True)
    return _finish(folder, page, "landscape", {
        "pairs": len(images), "logit_scale": own, "scales": list(seen.scales), "steps": seen.steps.tolist(),
        "losses": seen.losses.tolist(), "gradient_steps": seen.gradient_steps.tolist(),
        "gradients": seen.gradients.tolist(), "centre": seen.centre.tolist(), "seed": source.seed,
    })  # fmt: skip


# -- the probe --------------------------------------------------------------------------------------------------------


def look_by_probe(
    source: Source, test: sets.Reading, folder: Path, solver: str, epochs: int, decay: float
) -> list[Path]:
    """Train a linear classifier on the image tower's output and write its accuracies."""
    model, preprocess, _, device = load(source)
    assert source.reading is not None
    train_set, test_set = (sets.read(each) for each in (source.reading, test))
    names = sorted(set(train_set.image_labels))
    unknown = sorted(set(test_set.image_labels) - set(names))
    if unknown:
        raise MMTSError(f"{test.data}: the class {unknown[0]!r} is not among the {len(names)} of the training set")
    if len(names) < 2:
        raise MMTSError(f"{source.reading.data}: a probe needs two classes or more, found {len(names)}")
    features = []
    with probe.without_projection(model):
        for each in (train_set, test_set):
            features.append(_tower(model, preprocess, each.images, source.batch_size, device))
    labels = [torch.tensor([names.index(label) for label in each.image_labels]) for each in (train_set, test_set)]
    rounds = epochs if solver == probe.SGD else max(1, epochs // 10)
    with tqdm(total=rounds, desc="epochs", disable=None) as bar:
        seen = probe.probe((features[0], labels[0]), (features[1], labels[1]), len(names), solver, epochs, decay,
                           seed=source.seed, watch=bar.update)  # fmt: skip
    figure, panels = new_figure(2.2)
    panels[0].barh(["test", "training"], [100 * seen.test, 100 * seen.train], color=[MMTS, PLAIN])
    panels[0].set(xlim=(0, 100), xlabel="accuracy, %")
    save(figure, folder / "probe.png")
    page = Page("Linear probe")
    page.text(f"{source.shown}; tested on {test.data}; {len(names)} classes; {solver}.", small=True)
    page.picture(folder / "probe.png", "Accuracy of a linear classifier")
    page.table(["", "images", "accuracy"], [["training", f"{len(labels[0]):,}", f"{100 * seen.train:.2f}%"],
                                             ["test", f"{len(labels[1]):,}", f"{100 * seen.test:.2f}%"]])  # fmt: skip
    page.text(
        "A linear classifier on what the image tower gives before its projection; of class tokens all, one behind "
        "the other (Sun & Li, App. B). Images are not augmented, where the paper's are: compare with one another, "
        "not with the paper."
    )
    return _finish(folder, page, "probe", {
        "classes": len(names), "features": features[0].shape[1], "solver": solver, "train": seen.train,
        "test": seen.test, "loss": seen.loss, "seed": source.seed,
    })  # fmt: skip


def _tower(model: Any, preprocess: Any, files: Sequence[Any], batch_size: int, device: str) -> Tensor:
    class Tower(torch.nn.Module):
        def encode_image(self, images: Tensor) -> Tensor:
            found = model.visual(images)
            return found[0] if isinstance(found, tuple) else found

    return encode_images(Tower(), preprocess, files, batch_size, device, normalize=False)
