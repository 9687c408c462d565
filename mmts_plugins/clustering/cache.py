"""Embeddings kept by content: nothing is embedded twice, for another k, for another seed or after a kill.

Captions are embedded in parts. A part is a ``.npy`` file in ``$MMTS_CACHE/embeddings``, named by its captions and by
the encoder's own weights, written whole or not at all, and mapped into memory when it is read.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

import numpy as np

from .._files import cache_folder, replacing
from ..errors import MMTSError
from .rows import Rows

logger = logging.getLogger(__name__)

PART = 16_384  # captions: about a minute of a small sentence encoder on one core, the most that a kill can cost


def embed(
    encode: Callable[[Sequence[str]], np.ndarray], identity: Optional[str], captions: Sequence[str], label: str
) -> Rows:
    """``[n, d]`` float16 rows, from the cache where they are in it.

    Args:
        encode: ``[m]`` captions to ``[m, d]``; not called for parts that the cache holds.
        identity: what the embeddings depend on beside the captions; ``None``: not cached.
        label: names the encoder in messages.

    Raises:
        MMTSError: an embedding is not finite in half precision, or the cache cannot be written (a full disk).
    """
    from tqdm import tqdm

    starts = range(0, len(captions), PART)
    parts = []
    for start in tqdm(starts, desc="embedding", unit="part", file=sys.stderr, disable=len(starts) == 1):
        parts.append(embed_part(encode, identity, captions[start : start + PART], label))
    return Rows(parts)


def embed_part(
    encode: Callable[[Sequence[str]], np.ndarray], identity: Optional[str], captions: Sequence[str], label: str
) -> np.ndarray:
    """``[m, d]`` float16 of one part; arguments as :func:`embed`'s."""
    path = None if identity is None else _path(identity, captions)
    if path is not None and path.exists():
        try:
            stored: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            if len(stored) == len(captions):
                return stored
            reason = f"{len(stored)} rows"
        except (OSError, ValueError, EOFError) as error:
            reason = str(error)
        logger.warning("MM-TS: %s cannot be used (%s); embedding its captions again", path, reason)
    vectors = encode(captions)
    with np.errstate(over="ignore"):
        halves = vectors.astype(np.float16)
    finite = np.isfinite(halves).all(axis=1)
    if not finite.all():
        caption = captions[int(np.argmin(finite))]
        raise MMTSError(
            f"{label} gives a NaN or an infinity for the caption {caption[:80]!r}; remove it, or use another encoder"
        )
    if path is None:
        return halves
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, halves)
    except OSError as error:
        raise MMTSError(
            f"{path}: the embeddings cannot be cached: {error}; make room, move the cache (MMTS_CACHE=FOLDER), or do "
            "without it (--no-cache)"
        ) from error
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _path(identity: str, captions: Sequence[str]) -> Path:
    folder = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    digest = hashlib.blake2b(digest_size=16)
    for caption in captions:
        text = caption.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return cache_folder() / "embeddings" / folder / f"{digest.hexdigest()}.npy"
