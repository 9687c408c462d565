"""What is asked of ``mmts eval``, and its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F

from .. import __version__, markdown
from .._files import replacing
from ..config import THIRDS
from ..data.embeddings import load_npy, read_embeddings
from ..errors import ConfigError, MMTSError, cause, reading, shown
from ..geometry import INNER
from ..tables import CLASS, ClusterTable
from ..versions import installed_version
from . import frequency, relevancy, sets
from .model import encode_images, encode_texts, load_model, similarity_of
from .retrieval import KS, Similarity, class_embeddings, class_ranks, graded, mean_over, ranks
from .statistics import Measure, Queries, cell, class_mean, mean, median, summarise

TEMPLATE = "a photo of a {}."
IMAGES, TEXTS = "image", "text"
WAYS = {IMAGES: "image_to_text", TEXTS: "text_to_image"}
_TITLES = {"image_to_text": "image → text", "text_to_image": "text → image", "mean": "mean", "zero_shot": "zero-shot"}


@dataclass(frozen=True)
class Request:
    """What to evaluate and how: the flags of ``mmts eval``, by their names.

    Attributes:
        data: images and captions, and ``format`` to ``captions_per_image`` how to read them (:class:`~.sets.Reading`).
        model, checkpoint, pretrained: what encodes them, with ``batch_size`` on ``device``; or there are features:
        image_features, text_features, class_features: files of them.
        text_image: without data, the file of each caption's image.
        table: the cluster table of the training set, and ``encoder`` what finds a caption's nearest in it.
        relevancy: a file of graded relevance; ``ek100`` and ``ek100_sentences`` files that it is computed from.
        classes, templates: files of class names and prompts, for zero-shot classification.
        average: over templates, of ``features`` or of ``distances``.
        sub_spheres: how many of a product sphere's to use, drawn with ``seed``; ``None``: all.
        no_retrieval: zero-shot classification alone.
        resamples, seed: of the bootstrap.
    """

    data: Optional[str] = None
    format: str = "auto"
    image_column: Optional[str] = None
    column: Optional[str] = None
    separator: str = "\t"
    match_column: Optional[str] = None
    label_column: Optional[str] = None
    image_root: Optional[str] = None
    split: str = "test"
    captions_per_image: Optional[int] = None
    model: Optional[str] = None
    checkpoint: Optional[str] = None
    pretrained: Optional[str] = None
    batch_size: int = 256
    device: Optional[str] = None
    image_features: Optional[str] = None
    text_features: Optional[str] = None
    class_features: Optional[str] = None
    text_image: Optional[str] = None
    table: Optional[str] = None
    encoder: str = "tfidf"
    relevancy: Optional[str] = None
    ek100: Optional[str] = None
    ek100_sentences: Optional[str] = None
    classes: Optional[str] = None
    templates: Optional[str] = None
    average: str = "features"
    sub_spheres: Optional[int] = None
    no_retrieval: bool = False
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What ``mmts eval`` found.

    Attributes:
        metrics: as :func:`~.statistics.summarise` gives them.
        queries: ``{"image" | "text": {"n", "head", "middle", "tail"}}``, how many queries there are.
        table_hash: content hash of the cluster table, if one was given.
        notes: what the user should know.
    """

    metrics: dict[str, dict[str, Any]]
    queries: dict[str, dict[str, int]]
    table_hash: Optional[str] = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Task:
    """Everything that the numbers are computed from; filled in by the readers below.

    Attributes:
        images: ``[N, D]``; texts ``[M, D]``, None without retrieval; both L2-normalised.
        image_group, text_group: ``[N]`` and ``[M]``; equal numbers belong together.
        relevancy: graded relevance instead of groups.
        image_frequency, text_frequency: ``[N]`` and ``[M]``, None without a table.
        classes: ``[C, D]`` class embeddings, and ``labels`` ``[N]``, None without zero-shot classification.
        similarity: what the model compares by; ``of_classes`` that of images and class embeddings.
    """

    images: torch.Tensor
    texts: Optional[torch.Tensor] = None
    image_group: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    text_group: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    relevancy: Optional[relevancy.BothWays] = None
    image_frequency: Optional[np.ndarray] = None
    text_frequency: Optional[np.ndarray] = None
    classes: Optional[torch.Tensor] = None
    labels: Optional[torch.Tensor] = None
    similarity: Similarity = F.linear
    of_classes: Similarity = F.linear
    notes: list[str] = field(default_factory=list)


def evaluate(asked: Request) -> Result:
    """Read, encode and measure.

    Raises:
        MMTSError: a file or a flag cannot be used.
    """
    table = ClusterTable.load(asked.table) if asked.table else None
    if asked.ek100:
        task = _ek100(asked, table)
    elif asked.data is None:
        task = _bare_features(asked)
    else:
        task = _from_data(asked, table)
    return _measured(task, table, asked.resamples, asked.seed)


# --- tasks ------------------------------------------------------------------------------------------------------------


def _ek100(asked: Request, table: Optional[ClusterTable]) -> Task:
    assert asked.ek100 is not None
    assert asked.image_features is not None
    assert asked.text_features is not None
    annotations = relevancy.read_ek100(asked.ek100, asked.ek100_sentences, asked.label_column or "noun_class")
    images = read_features(asked.image_features, "--image-features")
    texts = read_features(asked.text_features, "--text-features", images, asked.image_features)
    clips, captions = len(annotations.labels), len(annotations.captions)
    _check_rows(asked.image_features, len(images), clips, f"clips in {asked.ek100}")
    if len(texts) == clips:  # as AVION has them: one text per clip
        texts = texts[torch.from_numpy(annotations.clip_of)]
    _check_rows(asked.text_features, len(texts), captions, f"captions of {asked.ek100} (or {clips}, one per clip)")
    task = Task(images, texts, np.arange(clips), np.arange(captions), annotations.relevancy())
    if not asked.ek100_sentences and captions != clips:
        task.notes.append(
            f"{captions} captions in the order of {asked.ek100}; --ek100-sentences gives the published order"
        )
    if table is not None:
        task.image_frequency, notes = frequency.of_classes(table, annotations.labels)
        task.text_frequency = task.image_frequency[annotations.clip_of]
        task.notes.extend(notes)
    return task


def _bare_features(asked: Request) -> Task:
    assert asked.image_features is not None
    assert asked.text_features is not None
    images = read_features(asked.image_features, "--image-features")
    texts = read_features(asked.text_features, "--text-features", images, asked.image_features)
    owner = np.arange(len(texts))
    if asked.text_image:
        owner = _read_index(asked.text_image, len(texts), len(images))
    elif not asked.relevancy and len(texts) != len(images):
        raise ConfigError(
            f"{len(images)} images and {len(texts)} captions: whose is each caption? Give --text-image FILE, or DATA"
        )
    task = Task(images, texts, np.arange(len(images)), owner)
    if asked.relevancy:
        task.relevancy = relevancy.read_matrix(asked.relevancy, len(images), len(texts))
    return task


def _from_data(asked: Request, table: Optional[ClusterTable]) -> Task:
    assert asked.data is not None
    samples = sets.read(
        sets.Reading(
            data=asked.data,
            format=asked.format,
            image_column=asked.image_column,
            caption_column=asked.column,
            separator=asked.separator,
            match_column=asked.match_column,
            label_column=asked.label_column,
            image_root=asked.image_root,
            split=asked.split,
            captions_per_image=asked.captions_per_image,
            captions=not asked.no_retrieval,
        )
    )
    names = _lines(asked.classes, "--classes") if asked.classes else []
    labels = _label_numbers(samples.image_labels, names, asked.classes) if names and asked.classes else None
    task = _saved(asked, samples, names) if asked.image_features else _encoded(asked, samples, names)
    task.labels, task.image_group, task.text_group = labels, samples.image_group, samples.caption_group
    task.notes[:0] = samples.notes
    if asked.relevancy:
        task.relevancy = relevancy.read_matrix(asked.relevancy, len(samples.images), len(samples.captions))
    if table is not None:
        _look_up(task, samples, table, asked.encoder)
    return task


def _look_up(task: Task, samples: sets.Samples, table: ClusterTable, encoder: str) -> None:
    """Frequencies by class where the table has classes, else by caption; an image has the mean of its captions."""
    if table.kind == CLASS and samples.image_labels:
        task.image_frequency, notes = frequency.of_classes(table, samples.image_labels)
        if samples.captions:
            task.text_frequency = frequency.of_classes(table, samples.caption_labels)[0]
    elif not samples.captions:
        raise ConfigError(
            f"{table.source}: is keyed by captions, which --no-retrieval leaves out; use a table of classes"
        )
    else:
        task.text_frequency, notes = frequency.of_captions(table, samples.captions, encoder)
        task.image_frequency = np.array([task.text_frequency[rows].mean() for rows in samples.image_rows])
    task.notes.extend(notes)


def _saved(asked: Request, samples: sets.Samples, names: Sequence[str]) -> Task:
    assert asked.image_features is not None
    images = read_features(asked.image_features, "--image-features")
    _check_rows(asked.image_features, len(images), len(samples.images), f"images in {asked.data}")
    task = Task(images)
    if not asked.no_retrieval:
        assert asked.text_features is not None
        task.texts = read_features(asked.text_features, "--text-features", images, asked.image_features)
        _check_rows(asked.text_features, len(task.texts), len(samples.captions), f"captions in {asked.data}")
    if names:
        assert asked.class_features is not None
        task.classes = read_features(asked.class_features, "--class-features", images, asked.image_features)
        _check_rows(asked.class_features, len(task.classes), len(names), f"classes in {asked.classes}")
    return task


def _encoded(asked: Request, samples: sets.Samples, names: Sequence[str]) -> Task:
    assert asked.model is not None
    prompts = _prompts(asked.templates, names)
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, preprocess, tokenizer = load_model(asked.model, asked.checkpoint, device, asked.pretrained)
    part = _sub_spheres(model, asked)
    task = Task(part(encode_images(model, preprocess, samples.images, asked.batch_size, device)))
    task.similarity = task.of_classes = similarity_of(model)
    if not asked.no_retrieval:
        task.texts = part(encode_texts(model, tokenizer, samples.captions, asked.batch_size, device))
    if names:
        features, many = (
            part(encode_texts(model, tokenizer, prompts, asked.batch_size, device)),
            len(prompts) // len(names),
        )
        if asked.average == "distances" or task.similarity is not F.linear:
            task.classes, task.of_classes = features.view(len(names), -1), mean_over(many, task.similarity)
        else:
            task.classes = class_embeddings(features, torch.arange(len(names)).repeat_interleave(many), len(names))
    return task


def _sub_spheres(model: Any, asked: Request) -> Callable[[torch.Tensor], torch.Tensor]:
    """What leaves of features only the sub-spheres that were asked for (Sun & Li, App. H), as unit vectors again."""
    if asked.sub_spheres is None:
        return lambda features: features
    geometry = getattr(model, "mmts_geometry", None)
    if geometry is None or geometry.distance != INNER or not 1 <= asked.sub_spheres <= geometry.m:
        have = f"is of {geometry}" if geometry is not None else "has no product sphere"
        raise ConfigError(f"--sub-spheres {asked.sub_spheres}: the model {have}")
    drawn = torch.randperm(geometry.m, generator=torch.Generator().manual_seed(asked.seed))[: asked.sub_spheres]
    scale = (geometry.m / asked.sub_spheres) ** 0.5
    return lambda features: scale * features.unflatten(1, (geometry.m, -1))[:, drawn].flatten(1)


# --- readers ----------------------------------------------------------------------------------------------------------


def read_features(path: str, flag: str, images: Optional[torch.Tensor] = None, of: str = "") -> torch.Tensor:
    """``[n, D]`` L2-normalised float32, as wide as ``images``, which came from the file ``of``."""
    with reading(path, f"cannot be read as features ({flag})"):
        points = np.asarray(read_embeddings(path, flag=flag, largest=np.inf))
    points = points.astype(np.result_type(points.dtype, np.float32))  # whole numbers become float64
    if images is not None and points.shape[1] != images.shape[1]:
        raise MMTSError(f"{path}: {points.shape[1]} dimensions, but {of} has {images.shape[1]} ({flag})")
    largest = np.abs(points).max(axis=1)
    if not largest.all():
        raise MMTSError(f"{path}: row {int(largest.argmin())} (counting from 0) is all zeros ({flag})")
    # By a power of two, which changes no digit: squares of 1e30 or 1e-30 do not fit into float32.
    points = np.ldexp(points, -np.frexp(largest)[1][:, None])
    return F.normalize(torch.from_numpy(points.astype(np.float32)), dim=1)


def _check_rows(path: str, rows: int, expected: int, what: str) -> None:
    if rows != expected:
        raise MMTSError(f"{path}: {rows} rows for {expected} {what}")


def _read_index(path: str, texts: int, images: int) -> np.ndarray:
    """``[M]`` the row of each caption's image."""
    if not Path(path).exists():
        raise MMTSError(f"{path}: no such file (--text-image)")
    with reading(path, "expected a whole number per line (--text-image)"):
        if path.endswith(".npy"):
            numbers = load_npy(path)
        else:  # not with numpy.loadtxt, whose C code crashes on some damaged files
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
            numbers = np.array([int(line) for line in lines if line.strip()], np.int64)
    if numbers.dtype.kind not in "iu" or numbers.shape != (texts,):
        raise MMTSError(
            f"{path}: {list(numbers.shape)} of {numbers.dtype}, expected {texts} whole numbers (--text-image)"
        )
    if numbers.min() < 0 or numbers.max() >= images:
        raise MMTSError(f"{path}: numbers from {numbers.min()} to {numbers.max()} for {images} images (--text-image)")
    if len(np.unique(numbers)) < images:
        raise MMTSError(f"{path}: {images - len(np.unique(numbers))} of {images} images have no caption (--text-image)")
    return np.array(numbers, np.int64)


def _lines(path: str, flag: str) -> list[str]:
    with reading(path, f"cannot be read as text ({flag})"):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if not lines:
        raise MMTSError(f"{path}: is empty ({flag})")
    return lines


def _label_numbers(labels: Sequence[str], names: Sequence[str], path: str) -> torch.Tensor:
    """``[N]`` line numbers of the labels, which are names or the numbers themselves."""
    if len(set(names)) < len(names):
        raise MMTSError(f"{path}: a class name occurs twice (--classes)")
    known = {name: number for number, name in enumerate(names)}
    if not set(labels) <= known.keys():
        known = {str(number): number for number in range(len(names))}
    unknown = next((label for label in labels if label not in known), None)
    if unknown is not None:
        raise MMTSError(
            f"{path}: the label {shown(unknown)} is neither one of its {len(names)} names nor a line number from 0"
        )
    return torch.tensor([known[label] for label in labels])


def _prompts(path: Optional[str], names: Sequence[str]) -> list[str]:
    """All templates of the first class, then of the second, and so on."""
    templates = [line.replace("{c}", "{}") for line in (_lines(path, "--templates") if path else [TEMPLATE])]
    bad = next((template for template in templates if template.count("{}") != 1), None)
    if bad is not None:
        raise MMTSError(f"{path}: the template {shown(bad)} needs one {{}} (or {{c}}) in the place of the class")
    return [template.replace("{}", name) for name in names for template in templates]


# --- numbers ----------------------------------------------------------------------------------------------------------


def _measured(task: Task, table: Optional[ClusterTable], resamples: int, seed: int) -> Result:
    measures: list[Measure] = []
    # Captions of an image are drawn together; with graded relevance there are no such families.
    families = {IMAGES: np.arange(len(task.images))}
    if task.texts is not None:
        families[TEXTS] = task.text_group
        measures += _graded(task) if task.relevancy else _ranked(task)
        if task.relevancy:
            families[TEXTS] = np.arange(len(task.texts))
    if task.classes is not None and task.labels is not None:
        measures += _classified(task, task.classes, task.labels)
    queries = {}
    for kind, units in families.items():
        common = task.image_frequency if kind == IMAGES else task.text_frequency
        queries[kind] = Queries(units, table.thirds(common) if table is not None and common is not None else None)
    metrics = summarise(measures, queries, resamples, seed)
    for name in ("mAP", "mAP_binary", "nDCG"):
        if f"{WAYS[IMAGES]}_{name}" in metrics:
            metrics[f"mean_{name}"] = _between(*(metrics[f"{way}_{name}"] for way in WAYS.values()))
    counts = {kind: {"n": len(known.units), **_third_counts(known.thirds)} for kind, known in queries.items()}
    return Result(metrics, counts, table.content_hash if table is not None else None, task.notes)


def _ranked(task: Task) -> list[Measure]:
    assert task.texts is not None
    image_group, text_group = torch.from_numpy(task.image_group), torch.from_numpy(task.text_group)
    sides = {
        IMAGES: ranks(task.images, task.texts, image_group, text_group, similarity=task.similarity),
        TEXTS: ranks(task.texts, task.images, text_group, image_group, similarity=task.similarity),
    }
    measures = []
    for kind, rank in sides.items():
        places = (rank + 1).double().numpy()
        measures += [Measure(f"{WAYS[kind]}_R@{k}", (places <= k).astype(float), mean, kind) for k in KS]
        measures.append(Measure(f"{WAYS[kind]}_mean_rank", places, mean, kind))
        measures.append(Measure(f"{WAYS[kind]}_median_rank", places, median, kind))
    return measures


def _graded(task: Task) -> list[Measure]:
    assert task.texts is not None
    assert task.relevancy is not None
    sides = {
        IMAGES: graded(task.images, task.texts, task.relevancy.of_images, similarity=task.similarity),
        TEXTS: graded(task.texts, task.images, task.relevancy.of_texts, similarity=task.similarity),
    }
    names = {"mAP": "AP", "mAP_binary": "AP_binary", "nDCG": "nDCG"}
    return [
        Measure(f"{WAYS[kind]}_{name}", values[column].numpy(), mean, kind)
        for kind, values in sides.items()
        for name, column in names.items()
    ]


def _classified(task: Task, classes: torch.Tensor, labels: torch.Tensor) -> list[Measure]:
    places = class_ranks(task.images, classes, labels, task.of_classes).numpy() + 1
    hits = (places <= 1).astype(float)
    measures = [Measure("zero_shot_top1", hits, mean, IMAGES)]
    if len(classes) > 5:
        measures.append(Measure("zero_shot_top5", (places <= 5).astype(float), mean, IMAGES))
    by_class = np.stack([labels.numpy(), hits], axis=1)
    return [*measures, Measure("zero_shot_class_mean", by_class, class_mean, IMAGES)]


def _between(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The mean of two directions, as papers print it; no interval: the queries are not one sample."""
    known = one["value"] is not None and other["value"] is not None
    middle = (one["value"] + other["value"]) / 2 if known else None
    thirds = {third: _between(one[third], other[third]) for third in THIRDS if third in one}
    return {"value": middle, "low": None, "high": None, "n": None, **thirds}


def _third_counts(thirds: Optional[np.ndarray]) -> dict[str, int]:
    return {} if thirds is None else {name: int((thirds == number).sum()) for number, name in enumerate(THIRDS)}


# --- the printed table ------------------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """The numbers in Markdown: shares in per cent, ranks as they are, 95% intervals in brackets."""
    columns = ["all", *(THIRDS if result.table_hash else ())]
    rows = [["%, ranks from 1", *columns]]
    for name, entry in result.metrics.items():
        prefix = next(prefix for prefix in _TITLES if name.startswith(prefix))
        title = f"{_TITLES[prefix]} {name[len(prefix) + 1 :].replace('_', ' ')}"
        entries = [entry, *(entry[third] for third in columns[1:])]
        rows.append([title, *(cell(each, percent="rank" not in name) for each in entries)])
    said = []
    for kind, counts in result.queries.items():
        parts = ", ".join(f"{name} {number:,}" for name, number in counts.items() if name != "n")
        said.append(f"{counts['n']:,} {kind} queries" + (f" ({parts})" if parts else ""))
    return "\n".join([*markdown.padded(rows), "", "; ".join(said)])


# --- the file ---------------------------------------------------------------------------------------------------------


def write(asked: Request, result: Result, output: Path) -> None:
    """Write the numbers as JSON.

    Raises:
        MMTSError: that is impossible; then they have been printed.
    """
    text = json.dumps(_record(asked, result), indent=2, allow_nan=False) + "\n"
    try:
        with replacing(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:  # a full disk: the work is not to be lost
        print(table(result))
        raise MMTSError(f"{output}: cannot be written: {cause(error)}; the numbers stand above") from error


def _record(asked: Request, result: Result) -> dict[str, Any]:
    """The content of the JSON file; docs/evaluation.md describes it."""
    packages = ("numpy", "torch", *(["open_clip_torch"] if asked.model else []))
    given = ("data", "model", "checkpoint", "pretrained", "table", "image_features", "text_features", "class_features",
             "relevancy", "ek100", "classes", "templates", "average", "sub_spheres")  # fmt: skip
    return {
        "format": 1,
        "metrics": result.metrics,
        "queries": result.queries,
        **{name: getattr(asked, name) for name in given},
        "table_hash": result.table_hash,
        "bootstrap": {"resamples": asked.resamples, "seed": asked.seed, "level": 0.95},
        "notes": result.notes,
        "versions": {"mmts-plugins": __version__, **{name: installed_version(name) for name in packages}},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
