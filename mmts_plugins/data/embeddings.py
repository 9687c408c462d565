"""Embeddings of files: one array of numbers each, checked; nothing is unpickled."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Optional, cast

import numpy as np

from ..errors import ConfigError, MMTSError, listed, reading, shown
from .rows import Rows, release

LARGEST = 1e12  # of an embedding: squares, summed over a set of any size, stay far from float32's end


def read_embeddings(
    path: str, tensor: Optional[str] = None, flag: str = "--embeddings", largest: float = LARGEST
) -> np.ndarray:
    """``[n, d]`` numbers from a ``.npy`` or ``.safetensors`` file, checked to be finite; nothing is unpickled.

    ``flag`` is the one that named the file, for messages; ``largest`` as in :func:`check_finite`.
    """
    file = Path(path)
    if not os.path.exists(path):
        raise MMTSError(f"{path}: no such file ({flag})")
    if file.suffix not in (".npy", ".safetensors"):
        raise ConfigError(f"{path}: {flag} takes a .npy or a .safetensors file")
    if tensor is not None and file.suffix == ".npy":
        raise ConfigError(f"{path}: --tensor names a tensor of a .safetensors file; a .npy file holds a single one")
    points = load_npy(path) if file.suffix == ".npy" else _load_safetensors(path, tensor)
    if points.ndim != 2 or 0 in points.shape:
        raise MMTSError(f"{path}: the shape is {list(points.shape)}, expected [samples, dimensions]")
    check_finite(points, path, largest)
    return points


def read_embedding_parts(path: str, tensor: Optional[str] = None) -> Rows:
    """:func:`read_embeddings` of a file, or of all ``.npy`` files of a folder in the order of their names."""
    if not Path(path).is_dir():
        return Rows(read_embeddings(path, tensor))
    files = sorted(Path(path).glob("*.npy"))
    if not files:
        raise MMTSError(f"{path}: the folder holds no .npy file (--embeddings)")
    parts = [read_embeddings(str(file), tensor) for file in files]
    for file, part in zip(files, parts):
        if part.shape[1] != parts[0].shape[1]:
            raise MMTSError(
                f"{file}: {part.shape[1]} dimensions, but {files[0].name} has {parts[0].shape[1]}; all parts must come "
                "from one encoder"
            )
    return Rows(parts)


def load_npy(path: str) -> np.ndarray:
    """One array of numbers from a ``.npy`` file, mapped, not read; nothing is unpickled."""
    what = "cannot be read as .npy (truncated, pickled or foreign?); write it with numpy.save"
    with reading(path, what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that NumPy can read, but does not like
        points = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(points, np.ndarray) or points.dtype.kind not in "fiu":
        found = f"an array of {shown(points.dtype)}" if isinstance(points, np.ndarray) else "an .npz archive"
        raise MMTSError(f"{path}: holds {found}, expected one array of numbers")
    return points


def _load_safetensors(path: str, tensor: Optional[str]) -> np.ndarray:
    from safetensors import safe_open

    with reading(path, "cannot be read as safetensors (truncated or foreign?)"):
        with safe_open(path, framework="pt") as file:  # NumPy has no bfloat16
            names = list(file.keys())
            if tensor is None and len(names) != 1:
                raise ConfigError(f"{path}: holds {len(names)} tensors ({listed(names)}); choose one with --tensor")
            if tensor is not None and tensor not in names:
                raise ConfigError(f"{path}: no tensor {shown(tensor)} (--tensor); found: {listed(names)}")
            found = file.get_tensor(names[0] if tensor is None else tensor)
            if found.is_complex() or str(found.dtype) == "torch.bool":
                raise MMTSError(f"{path}: holds an array of {found.dtype}, expected one of numbers")
            return cast(np.ndarray, found.float().numpy())


def check_finite(points: np.ndarray, source: str, largest: float = np.inf) -> None:
    """Raise an MMTSError that names the first row that cannot be computed with (rows count from 0, as in NumPy).

    ``largest`` is the largest size of a number, where it is taken as it is and not scaled to a length of 1.
    """
    step = 65536  # the mask of a mapped file must not be as large as the file
    for start in range(0, len(points), step):
        block = np.asarray(points[start : start + step])
        if block.dtype.kind != "f":  # the size of the least whole number is no whole number
            block = block.astype(np.float64)
        with np.errstate(over="ignore"):  # the largest is infinite in half precision, and then bounds nothing
            good = (np.isfinite(block) & (np.abs(block) <= largest)).all(axis=1)
        if not good.all():
            row = int(np.argmin(good))
            what = "a number whose square is too large; scale the rows"
            if not np.isfinite(block[row]).all():
                what = "a NaN or an infinity; fix or drop it"
            raise MMTSError(f"{source}: row {start + row} (counting from 0) holds {what}")
        release(points)
