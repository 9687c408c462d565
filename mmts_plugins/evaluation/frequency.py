"""How common evaluated samples are in the training set, read from its cluster table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data import encoders
from ..errors import TableError, shown
from ..tables import CLASS, ClusterTable


def of_classes(table: ClusterTable, labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The frequency of each sample's class, 0 for a class that was not in training (so it counts to the tail).

    Returns:
        ``[n]`` float64, and notes for the user.

    Raises:
        TableError: the table is keyed by captions, or knows none of the classes.
    """
    if table.kind != CLASS:
        raise TableError(f"{table.source}: is keyed by captions, but these samples have classes only")
    frequency, known = _looked_up(table, labels)
    if not known.any():
        raise TableError(f"{table.source}: holds none of the {len(set(labels))} classes, such as {shown(labels[0])}")
    absent = int((~known).sum())
    return frequency, [f"{absent} samples are of classes that {table.source} lacks: tail"] if absent else []


def of_captions(
    table: ClusterTable, captions: Sequence[str], encoder: str = encoders.TFIDF, block_size: int = 256
) -> tuple[np.ndarray, list[str]]:
    """The frequency of each caption; one that training never saw takes that of the nearest caption of the table.

    Nearest is by cosine between embeddings of ``encoder``, not of the model that is evaluated: the thirds of two models
    that are compared hold the same samples.

    Returns:
        ``[n]`` float64, and notes for the user.

    Raises:
        TableError: the table is keyed by classes.
    """
    if table.kind == CLASS:
        raise TableError(f"{table.source}: is keyed by classes; name the column that holds them (--label-column)")
    frequency, known = _looked_up(table, captions)
    if known.all():
        return frequency, []
    unseen = sorted({caption for caption, hit in zip(captions, known) if not hit})
    keys = table.keys.to_pylist()
    points = np.asarray(encoders.encode(encoder, [*keys, *unseen]), np.float32)
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    nearest = np.empty(len(unseen), np.int64)
    for start in range(0, len(unseen), block_size):
        block = points[len(keys) + start : len(keys) + start + block_size]
        nearest[start : start + block_size] = (block @ points[: len(keys)].T).argmax(1)
    taken = dict(zip(unseen, table.frequency[nearest].tolist()))
    for row in np.flatnonzero(~known).tolist():
        frequency[row] = taken[captions[row]]
    note = (
        f"{int((~known).sum())} of {len(captions)} captions are not in {table.source}; each counts as common as the "
        f"caption in it that is nearest by {encoders.public_name(encoder)}"
    )
    return frequency, [note]


def _looked_up(table: ClusterTable, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """``[n]`` frequencies, 0 where unknown, and ``[n]`` whether known."""
    rows = table.rows_of(keys)
    return np.where(rows >= 0, table.frequency[rows], 0.0), rows >= 0
