"""What is in a cluster table: its concepts from the most common to the rarest, their telling words, their examples."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..tables import ClusterTable

_WORD = re.compile(r"[^\W\d_]\w+")
_KEYS_READ = 200_000  # for words; enough to tell clusters apart, and seconds for a table of any size
_MEMBERS_READ = 2_000
_LONGEST = 300  # characters of a caption on a page


@dataclass(frozen=True, eq=False)
class Concepts:
    """The clusters (or classes) of a table, the most common first.

    Attributes:
        ids: ``[K]`` their numbers in the table; only those that have a key.
        samples: ``[K]`` int64, how many training samples each holds.
        frequency: ``[K]`` float64, ``K_c`` of Eq. 6 as training reads it, mean over the samples.
        shift: ``[K]`` float64, mean over the samples.
        place: ``[M]`` for each key of the table the row of its cluster here.
    """

    ids: np.ndarray
    samples: np.ndarray
    frequency: np.ndarray
    shift: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, table: ClusterTable, shift: np.ndarray) -> Concepts:
        """Group a table's keys; ``shift`` is ``[M]``, one for each key."""
        ids, cluster = np.unique(table.cluster, return_inverse=True)
        count = np.bincount(cluster, weights=table.count)
        frequency, shifts = (
            np.bincount(cluster, weights=each * table.count) / count for each in (table.frequency, shift)
        )
        order = np.argsort(-frequency, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return cls(ids[order], count[order].astype(np.int64), frequency[order], shifts[order], rank[cluster])

    def __len__(self) -> int:
        return len(self.ids)

    def members(self, concept: int) -> np.ndarray:
        """Rows of the table that belong to a concept (its row here)."""
        return np.flatnonzero(self.place == concept)


def examples(table: ClusterTable, members: np.ndarray, many: int) -> list[str]:
    """Some of a concept's keys, spread over it: neighbours in a file often describe the same image."""
    spread = np.linspace(0, len(members) - 1, min(many, len(members))).astype(int)
    return [shortened(key) for key in table.keys.take(members[spread]).to_pylist()]


def shortened(caption: str) -> str:
    """A caption on one line, and cut where it is very long."""
    line = " ".join(caption.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def telling_words(
    table: ClusterTable, concepts: Concepts, shown: Iterable[int], many: int = 5, seed: int = 0
) -> list[list[str]]:
    """The words that set each concept apart, most telling first: a class-based TF-IDF.

    A word's score is the share of the concept's samples that have it, times ``log(1 + A / f)``: f samples of all have
    the word, and A words are in a concept on average (Grootendorst, arXiv 2203.05794, with samples for documents).

    Args:
        table: of captions.
        concepts: of the table.
        shown: concepts whose members are read even where a large table is only sampled.
        many: how many words at most.
        seed: of that sample.
    """
    rows = np.arange(len(table))
    if len(rows) > _KEYS_READ:
        drawn = [np.random.default_rng(seed).choice(len(table), _KEYS_READ, replace=False)]
        rows = np.unique(np.concatenate(drawn + [concepts.members(each)[:_MEMBERS_READ] for each in shown]))
    inside: list[Counter[str]] = [Counter() for _ in range(len(concepts))]
    read = np.zeros(len(concepts))
    captions = table.keys.take(rows).to_pylist()
    for caption, place, count in zip(captions, concepts.place[rows].tolist(), table.count[rows].tolist()):
        read[place] += count
        for word in set(_WORD.findall(caption.lower())):
            inside[place][word] += count
    overall: Counter[str] = Counter()
    for words in inside:
        overall.update(words)
    average = sum(overall.values()) / max(len(concepts), 1)

    def best(concept: int) -> list[str]:
        samples = read[concept]
        score = {
            word: times / samples * math.log(1 + average / overall[word]) for word, times in inside[concept].items()
        }
        return sorted(score, key=lambda word: (-score[word], word))[:many]

    return [best(concept) for concept in range(len(concepts))]
