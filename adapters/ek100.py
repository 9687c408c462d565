"""EK-100's annotation files: the classes of their segments, counted, and narrations by the class they are of."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ..data.classes import counted, read_rows
from ..errors import TableError, shown
from ..tables import CAPTION, ClusterTable

DISTRIBUTIONS = ("noun", "verb", "verb_noun")


def key_of(distribution: str, verb: int, noun: int) -> str:
    """The name of a segment's class, as the authors have it."""
    return {"verb": f"{verb}", "noun": f"{noun}", "verb_noun": f"{verb}_{noun}"}[distribution]


def _class(metadata: str, line: int, distribution: str, verb: str, noun: str) -> str:
    try:
        return key_of(distribution, int(verb), int(noun))
    except ValueError as error:
        raise TableError(
            f"{metadata}, line {line}: verb_class {shown(verb)}, noun_class {shown(noun)}: not whole numbers"
        ) from error


def count_classes(metadata: str, distribution: str) -> ClusterTable:
    """The classes of an annotation file in EK-100's form, counted.

    Raises:
        TableError: it cannot be read, has no column ``verb_class`` or ``noun_class``, or one holds no whole number.
    """
    counts: Counter[str] = Counter()
    for line, *pair in read_rows(metadata, ("verb_class", "noun_class"), "an EK-100 annotation file"):
        counts[_class(metadata, line, distribution, *pair)] += 1
    return counted(counts, metadata)


def narrations(metadata: str, distribution: str, classes: ClusterTable) -> ClusterTable:
    """A table of the narrations of an annotation file: each as frequent as its class in ``classes``.

    A narration whose segments are of several classes counts as the commonest of its own.

    Raises:
        TableError: see :func:`count_classes`; or no narration's class is in ``classes``.
    """
    columns = ("narration", "verb_class", "noun_class")
    of: dict[str, Counter[str]] = {}
    for line, narration, *pair in read_rows(metadata, columns, "an EK-100 annotation file"):
        of.setdefault(narration, Counter())[_class(metadata, line, distribution, *pair)] += 1
    rows = classes.rows_of([seen.most_common(1)[0][0] for seen in of.values()])
    known = sorted((narration, row) for narration, row in zip(of, rows.tolist()) if row >= 0)
    if not known:
        raise TableError(f"{classes.source}: knows none of the {distribution} classes of {metadata}")
    keys, cluster = [narration for narration, _ in known], [row for _, row in known]
    count = [sum(of[key].values()) for key in keys]
    table = ClusterTable.build(keys, cluster, classes.frequency[cluster], count, CAPTION)
    return replace(table, source=classes.source)
