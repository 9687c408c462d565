"""Texts and images embedded by an encoder's name, from the cache where it holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from . import cache, encoders
from .images import ImageEncoder
from .rows import Rows


def texts(
    encoder: str,
    captions: Sequence[str],
    batch_size: int = 256,
    device: Optional[str] = None,
    cached: bool = True,
    seed: int = 0,
) -> Rows:
    """``[n, d]`` float16 embeddings of distinct captions; float32 of ``tfidf``, which is fitted to them with the seed.

    Raises:
        ConfigError, MMTSError: the encoder cannot be loaded or finds nothing to encode, or the cache is full.
    """
    if encoder == encoders.TFIDF:
        return Rows(encoders.tfidf(captions, seed))
    model = encoders.TextEncoder(encoder, batch_size, device)
    return cache.embed(model.encode, model.identity() if cached else None, captions, f"--encoder {encoder}")


def images(
    encoder: str,
    stamps: Sequence[str],
    frames: int = 8,
    batch_size: int = 64,
    device: Optional[str] = None,
    cached: bool = True,
) -> Rows:
    """``[n, d]`` float16 embeddings of distinct images, :func:`~.images.stamped`.

    Raises:
        ConfigError, MMTSError: the encoder cannot be loaded, an image cannot be read, or the cache is full.
    """
    model = ImageEncoder(encoder, frames, batch_size, device)
    return cache.embed(model.encode, model.identity() if cached else None, stamps, f"--encoder {encoder}")
