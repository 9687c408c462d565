"""One hash of a string: by it keys are found, and samples drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def hash_strings(strings: Iterable[str]) -> np.ndarray:
    """``[n]`` uint64, the same on every machine and in every process."""
    # surrogatepass: JSON may hold half a character, which no table does.
    digests = (hashlib.blake2b(each.encode(errors="surrogatepass"), digest_size=8).digest() for each in strings)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
