"""What a pilot trains and tests on: pairs of features that never change, in files that worker processes map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .._files import replacing
from ..data.captions import read_samples, refuse_blank
from ..data.embeddings import read_embeddings
from ..data.source import Source
from ..errors import ConfigError, MMTSError, reading, shown
from ..tables import ClusterTable

FOLDER = "features"
_FILES = ("texts", "others", "test_texts", "test_others")


@dataclass(frozen=True)
class Side:
    """Where the features of one side come from: a file, or an encoder of a column.

    Attributes:
        file: ``.npy`` or ``.safetensors``, a row for each sample of the data; ``None``: they are made.
        encoder: of ``mmts cluster --encoder``; of images ``timm:MODEL`` or ``openclip:MODEL/PRETRAINED``.
        column: that the encoder reads; ``None``: the captions.
        images: whether the column names images.
    """

    file: Optional[str] = None
    encoder: Optional[str] = None
    column: Optional[str] = None
    images: bool = False


@dataclass(frozen=True)
class Pairs:
    """Samples of a data set: a text and something that goes with it.

    Attributes:
        captions: ``[n]``, by which tables know them.
        texts, others: ``[n, D1]`` and ``[n, D2]`` float32 features.
        group: ``[n]`` int64; samples of one group (the captions of an image) are right answers for one another.
    """

    captions: list[str]
    texts: np.ndarray
    others: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: np.ndarray) -> Pairs:
        captions = [self.captions[row] for row in rows.tolist()]
        return Pairs(captions, self.texts[rows], self.others[rows], self.group[rows])


def read(
    source: Source, texts: Side, others: Side, group: Optional[str], keep_blank: bool, image_root: Optional[str] = None
) -> Pairs:
    """Read captions, and read or make the features of both sides.

    Raises:
        ConfigError, MMTSError: a file is missing or damaged, or is of other samples.
    """
    samples = read_samples(source)
    refuse_blank(samples.captions, source.data, keep_blank)
    captions = samples.captions
    sides = [
        _features(source, captions, side, flag, image_root) for side, flag in ((texts, "--texts"), (others, "--others"))
    ]
    if group is not None:
        names = read_samples(source, [group], captions=False).labels
    else:
        names = samples.images if len(samples.images) == len(captions) else []
    _, numbers = np.unique(np.asarray(names), return_inverse=True) if names else (None, np.arange(len(captions)))
    return Pairs(captions, sides[0], sides[1], numbers.astype(np.int64))


def _features(source: Source, captions: list[str], side: Side, flag: str, image_root: Optional[str]) -> np.ndarray:
    if side.file is not None:
        found = read_embeddings(side.file, flag=flag)
        if len(found) != len(captions):
            raise ConfigError(f"{side.file}: {len(found)} rows for {len(captions)} samples of {source.data} ({flag})")
        return np.asarray(found, np.float32)
    from ..clustering.build import distinct
    from ..data import embed
    from ..data.images import stamped

    values = captions if side.column is None else read_samples(source, [side.column], captions=False).labels
    each, rows = distinct(values)  # in mmts cluster's order, so that its cache is ours
    assert side.encoder is not None
    if side.images:
        made = embed.images(side.encoder, stamped(each, image_root, source.data))
    else:
        made = embed.texts(side.encoder, each)
    return made.take(rows)


def split(pairs: Pairs, share: float, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Hold out a share of the groups, the same for every variant and seed of a pilot.

    Raises:
        ConfigError: too little is left on one side.
    """
    groups = np.random.default_rng(seed).permutation(int(pairs.group.max()) + 1)
    held = np.isin(pairs.group, groups[: round(share * len(groups))])
    parts = pairs.take(np.flatnonzero(~held)), pairs.take(np.flatnonzero(held))
    if min(map(len, parts)) < 20:
        raise ConfigError(f"--hold-out {share:g} leaves {len(parts[0])} pairs to train on and {len(parts[1])} to test")
    return parts


def store(folder: Path, train: Pairs, test: Pairs, table: ClusterTable, about: dict[str, Any]) -> None:
    """Write what worker processes read, and which third of the training samples each test caption is like.

    Raises:
        MMTSError: it cannot be written.
    """
    from ..evaluation.frequency import of_captions

    folder.mkdir(parents=True, exist_ok=True)
    frequency, notes = of_captions(table, test.captions)
    thirds = table.thirds(frequency)
    for name, array in zip(_FILES, (train.texts, train.others, test.texts, test.others)):
        with replacing(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    for name, pairs, more in (("train", train, {}), ("test", test, {"third": thirds})):
        rows = pa.table({"caption": pairs.captions, "group": pairs.group, **more})
        with replacing(folder / f"{name}.parquet") as temporary:
            pq.write_table(rows, temporary)
    with replacing(folder / "about.json") as temporary:
        temporary.write_text(json.dumps({**about, "notes": notes}, indent=2) + "\n", encoding="utf-8")


def refuse_others(folder: Path, features: str) -> None:
    """Raise a ConfigError where a pilot's folder holds results of features other than these (:func:`digest`)."""
    path = folder / FOLDER / "about.json"
    if path.exists() and next((folder / "runs").glob("*.json"), None) is not None:
        with reading(path, "is no description of a pilot's features; take another -o/--output"):
            then = json.loads(path.read_text(encoding="utf-8"))["features"]
        if then != features:
            raise other_results(folder, "other features")


def other_results(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder}: holds results of other features, tables or settings ({what}); take another -o/--output, or "
        "--force to drop them"
    )


def digest(*parts: Pairs) -> str:
    """What the pairs are, for telling results of other features."""
    found = hashlib.blake2b(digest_size=16)
    for pairs in parts:
        found.update("\0".join(pairs.captions).encode(errors="surrogatepass"))
        for array in (pairs.texts, pairs.others, pairs.group):
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def load(folder: Path) -> tuple[Pairs, Pairs, np.ndarray]:
    """What :func:`store` wrote: training pairs, test pairs, and ``[n]`` thirds of the test pairs.

    Raises:
        MMTSError: it is not there any more.
    """
    try:
        tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("train", "test")}
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _FILES}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise MMTSError(f"{folder}: the features of this pilot cannot be read: {shown(str(error))}") from error
    parts = [
        Pairs(tables[name]["caption"].to_pylist(), arrays[f"{prefix}texts"], arrays[f"{prefix}others"],
              tables[name]["group"].to_numpy())
        for name, prefix in (("train", ""), ("test", "test_"))
    ]  # fmt: skip
    return parts[0], parts[1], tables["test"]["third"].to_numpy()


def common_width(parts: Sequence[Pairs]) -> None:
    """Raise a ConfigError where training and test features are of other widths."""
    for name in ("texts", "others"):
        widths = {getattr(part, name).shape[1] for part in parts}
        if len(widths) > 1:
            raise ConfigError(f"--{name} and --test-{name} have {' and '.join(map(str, sorted(widths)))} dimensions")
