"""Captions read and embedded: what an estimate starts from."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Optional

import numpy as np

from ..data import embed, encoders
from ..data.captions import read_samples, refuse_blank, told
from ..data.embeddings import read_embedding_parts
from ..data.images import stamped
from ..data.rows import Rows
from ..data.source import Samples, Source
from ..errors import ConfigError, one_line
from ..tables.hashing import hash_strings
from . import build
from .estimate import Recipe


@dataclass(frozen=True)
class Embedding:
    """How captions become embeddings: flags of ``mmts cluster``.

    Attributes:
        encoder: of captions (:class:`~..data.encoders.TextEncoder`, or ``tfidf``), or of images.
        batch_size, device: of the encoder.
        cached: whether embeddings are kept, and taken where they are.
        images: the column that names images, which are embedded instead of the captions.
        image_root: what their paths are relative to.
        frames: of a folder of images at most so many.
        embeddings: a file, or a folder of them, that is taken instead of all this.
        tensor: of a file that holds several.
    """

    encoder: str
    batch_size: int = 256
    device: Optional[str] = None
    cached: bool = True
    images: Optional[str] = None
    image_root: Optional[str] = None
    frames: int = 8
    embeddings: Optional[str] = None
    tensor: Optional[str] = None


@dataclass(frozen=True)
class Prepared:
    """Captions, embedded: what every estimate starts from.

    Attributes:
        keys: ``[M]`` the distinct captions.
        count: ``[M]`` int64, how many samples each has.
        points: ``[n, d]`` one row per distinct caption, or per sample where embeddings were given.
        rows: ``[n]`` the key of each row (with ``point``: of each sample).
        weight: ``[n]`` float64, samples per row.
        hashes: ``[n]`` uint64 by which samples of rows are drawn.
        encoder: as a table names it.
        packages: the distributions whose versions matter.
        point: ``[samples]`` the row of each sample where rows are images; ``None``: a row belongs to one key.
    """

    keys: list[str]
    count: np.ndarray
    points: Rows
    rows: np.ndarray
    weight: np.ndarray
    hashes: np.ndarray
    encoder: str
    packages: tuple[str, ...]
    point: Optional[np.ndarray] = None


def read(source: Source, how: Embedding, keep_blank: bool) -> Samples:
    """The captions, and as labels what is embedded in their place; what is odd about them is said.

    Raises:
        MMTSError: they cannot be read, or some are blank and not to be kept.
    """
    samples = read_samples(source, [how.images] if how.images else ())
    refuse_blank(samples.captions, source.data, keep_blank)
    tell(source, samples)
    return samples


def tell(source: Source, samples: Samples) -> None:
    """Say what was read, and what is odd about it."""
    say(told(source, samples))
    warn(samples.notes)


def prepare(how: Embedding, recipe: Recipe, samples: Samples, source: str) -> Prepared:
    """Embed what :func:`read` gave, or read its embeddings.

    Args:
        how: it is embedded.
        recipe: of the estimate; there must be captions enough for it, and ``tfidf`` takes its seed.
        samples: as read.
        source: names them in messages.

    Raises:
        ConfigError, MMTSError: too few captions, embeddings of others, or an encoder that cannot be used.
    """
    captions = samples.captions
    keys, rows = build.distinct(captions)
    weight = samples.weight
    count = build.counted(rows, weight)
    if recipe.clusters > len(keys):
        raise ConfigError(
            f"{len(keys)} distinct captions cannot make {recipe.clusters} clusters; lower -k (a tenth of the captions "
            "or less)"
        )
    if how.embeddings:
        points = read_embedding_parts(how.embeddings, how.tensor)
        if len(points) != len(captions):
            raise ConfigError(
                f"{how.embeddings}: {len(points)} rows for {len(captions)} captions of {source}; "
                "--embeddings needs one row per caption, repeated ones too, in the order of the file"
            )
        each = np.ones(len(points)) if weight is None else weight.astype(float)
        return Prepared(keys, count, points, rows, each, np.arange(len(points), dtype=np.uint64),
                        f"embeddings {file_name(how.embeddings)}", ())  # fmt: skip
    if samples.labels:
        return _prepare_images(how, keys, rows, count, samples, source)
    say(f"embedding {len(keys):,} distinct captions with {how.encoder}")
    if how.encoder in (encoders.TFIDF, encoders.HASHING) and (many := encoders.unspaced(keys)):
        say(f"{many:,} captions in scripts without spaces are compared by their characters ({how.encoder})")
    points = embed.texts(how.encoder, keys, how.batch_size, how.device, how.cached, recipe.seed)
    return Prepared(keys, count, points, np.arange(len(keys)), count.astype(float), hash_strings(keys),
                    encoders.public_name(how.encoder), encoders.packages(how.encoder))  # fmt: skip


def _prepare_images(
    how: Embedding, keys: list[str], rows: np.ndarray, count: np.ndarray, samples: Samples, source: str
) -> Prepared:
    paths, point = build.distinct(samples.labels)
    stamps = stamped(paths, how.image_root, source)
    say(f"embedding {len(paths):,} distinct images with {how.encoder}")
    points = embed.images(how.encoder, stamps, how.frames, min(how.batch_size, 64), how.device, how.cached)
    packages = ("timm", "torch") if how.encoder.startswith("timm:") else ("open_clip_torch", "torch")
    return Prepared(keys, count, points, rows, build.counted(point, samples.weight).astype(float), hash_strings(paths),
                    f"images {encoders.public_name(how.encoder)}", packages, point)  # fmt: skip


def file_name(data: str) -> str:
    """The file's name alone: parents, commands and signed URLs are nobody's business in a table that is shared."""
    return data.rsplit("/", 1)[-1].partition("?")[0]


def say(line: str) -> None:
    """On standard error, where progress goes."""
    print(line, file=sys.stderr)


def warn(notes: Iterable[str]) -> None:
    """Say what is odd about the input, before the long work."""
    for note in notes:
        say(f"warning: {one_line(note)}")
