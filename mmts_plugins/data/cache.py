"""Embeddings kept by content: nothing is embedded twice, for another k, for another seed or after a kill.

Captions are embedded in parts. A part is a ``.npy`` file in ``$MMTS_CACHE/embeddings``, named by its captions and by
the encoder's own weights, written whole or not at all, and mapped into memory when it is read.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Optional

import numpy as np

from .._files import cache_folder, cached, mapped, replacing, sealing, writing
from ..errors import MMTSError, shown
from .rows import Rows, release

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
    folder, name = (None, "") if identity is None else _place(identity, captions)
    path = None if folder is None else folder / name

    def read(file: BinaryIO, size: int) -> np.ndarray:
        stored = mapped(file, size, "<f2", 2)
        if len(stored) != len(captions):
            raise ValueError(f"it holds {len(stored)} rows for {len(captions)} captions")
        if not np.isfinite(stored).all():
            raise ValueError("it holds NaN or infinity")
        release(stored)
        return stored

    if (found := cached(path, f"{identity} {name}", read, "embedding its captions again", str(folder))) is not None:
        return found
    vectors = encode(captions)
    with np.errstate(over="ignore"):
        halves = vectors.astype(np.float16)
    finite = np.isfinite(halves).all(axis=1)
    if not finite.all():
        caption = captions[int(np.argmin(finite))]
        raise MMTSError(
            f"{label} gives a NaN or an infinity for the caption {shown(caption)}; remove it, or use another encoder"
        )
    if path is None:
        return halves
    full = "the embeddings cannot be cached (make room, move the cache with MMTS_CACHE, or do without it: --no-cache)"
    with writing(path, full), replacing(path, private=True) as temporary:
        with sealing(temporary, f"{identity} {name}") as file:
            np.save(file, np.ascontiguousarray(halves, "<f2"), allow_pickle=False)
    stored = cached(path, f"{identity} {name}", read)  # mapped: what is not used takes no memory
    return halves if stored is None else stored


def _place(identity: str, captions: Sequence[str]) -> tuple[Optional[Path], str]:
    """The folder, if there is a cache, and the name of the file of a part."""
    digest = hashlib.blake2b(digest_size=16)
    for caption in captions:
        text = caption.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    folder = cache_folder("embeddings", hashlib.blake2b(identity.encode(), digest_size=8).hexdigest())
    return folder, f"{digest.hexdigest()}.npy"
