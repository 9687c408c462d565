"""How relevant each caption is to each image: a matrix from a file, or EPIC-KITCHENS-100's from its annotations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch

from ..data.captions import read_samples
from ..data.embeddings import load_npy
from ..data.source import Source
from ..errors import ConfigError, MMTSError, reading, shown
from .retrieval import Relevancy

_CLASSES = re.compile(r"\[\s*\d+(\s*,\s*\d+)*\s*\]")
_PICKLES = (".pkl", ".pickle", ".p")


class BothWays(NamedTuple):
    """The same relevancy seen from either side."""

    of_images: Relevancy
    of_texts: Relevancy


def read_matrix(path: str, images: int, texts: int) -> BothWays:
    """A matrix ``[images, texts]`` of numbers in ``[0, 1]`` from a ``.npy`` (mapped, not read whole) or ``.csv`` file.

    Raises:
        MMTSError: missing, a pickle, unreadable, or of another shape.
    """
    file = Path(path)
    if file.suffix in _PICKLES:
        raise ConfigError(
            f"{path}: a pickle can run any code when it is opened, so it is never read here. If you trust its source: "
            f"python -c \"import numpy, pandas; numpy.save('relevancy.npy', pandas.read_pickle('{file.name}'))\", then "
            "--relevancy relevancy.npy; for EPIC-KITCHENS-100, --ek100 CSV computes the same from the annotations"
        )
    if not file.exists():
        raise MMTSError(f"{path}: no such file (--relevancy)")
    if file.suffix not in (".npy", ".csv"):
        raise ConfigError(f"{path}: --relevancy takes a .npy or a .csv file")
    with reading(path, f"cannot be read as a matrix of numbers ({'.npy' if file.suffix == '.npy' else 'commas'})"):
        matrix = load_npy(path) if file.suffix == ".npy" else _read_csv(file)
    if matrix.shape != (images, texts):
        hint = " (it looks transposed: rows are images)" if matrix.shape == (texts, images) else ""
        raise MMTSError(
            f"{path}: the shape is {list(matrix.shape)}, expected [{images}, {texts}] for {images} images and {texts} "
            f"captions{hint}"
        )
    return BothWays(
        lambda start, stop: torch.from_numpy(np.array(matrix[start:stop], np.float64)),
        lambda start, stop: torch.from_numpy(np.array(matrix[:, start:stop].T, np.float64)),
    )


def _read_csv(file: Path) -> np.ndarray:
    """Not with numpy.loadtxt, whose C code crashes on some damaged files."""
    with open(file, encoding="utf-8-sig") as lines:
        return np.stack([np.array([float(cell) for cell in line.split(",")]) for line in lines if line.strip()])


@dataclass(frozen=True)
class Actions:
    """What a clip or a narration is about: one verb class and a set of noun classes.

    Attributes:
        verb: ``[n]`` int64.
        nouns: ``[n, number of noun classes]`` float32, ones where a class is in the set.
    """

    verb: torch.Tensor
    nouns: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Actions:
        return Actions(self.verb[rows], self.nouns[rows])

    def relevancy_to(self, others: Actions) -> Relevancy:
        """The mean of the intersections over unions of verb classes and of noun classes (Damen et al.)."""

        def block(start: int, stop: int) -> torch.Tensor:
            nouns = self.nouns[start:stop]
            shared = nouns @ others.nouns.T
            union = nouns.sum(1, keepdim=True) + others.nouns.sum(1) - shared
            same_verb = self.verb[start:stop, None] == others.verb
            return (same_verb.double() + shared.double() / union.double()) / 2

        return block


@dataclass(frozen=True)
class EK100:
    """The multi-instance retrieval set of EPIC-KITCHENS-100.

    Attributes:
        captions: ``[M]`` narrations.
        clip_of: ``[M]`` the row of the clip whose narration each caption is.
        clips: ``[N]`` actions.
        labels: ``[N]`` the class of each clip, as asked for.
    """

    captions: list[str]
    clip_of: np.ndarray
    clips: Actions
    labels: list[str]

    def relevancy(self) -> BothWays:
        """Between all clips and all captions."""
        texts = self.clips[torch.from_numpy(self.clip_of)]
        return BothWays(self.clips.relevancy_to(texts), texts.relevancy_to(self.clips))


def read_ek100(path: str, sentences: Optional[str], label_column: str = "noun_class") -> EK100:
    """Read ``EPIC_100_retrieval_test.csv`` and say which narrations are the captions.

    Args:
        path: the annotations of the clips.
        sentences: ``EPIC_100_retrieval_test_sentence.csv``, whose narration ids are the captions in the order of the
            text features. None: the first clip of every distinct narration, then the first of every verb and noun that
            has none yet, each in the order of the file: the published set, whose last few stand in no stated order.
        label_column: the class that says how common a clip is; several columns, joined by ``_``, with commas.

    Raises:
        MMTSError: a file or column is missing, or does not have the form of EPIC-KITCHENS-100.
    """
    with reading(path, "cannot be read as annotations of EPIC-KITCHENS-100"):
        return _read_ek100(path, sentences, label_column)


def _read_ek100(path: str, sentences: Optional[str], label_column: str) -> EK100:
    def columns(file: str, *names: str) -> list[list[str]]:
        source = Source(file, "csv", separator=",", label_flag="a column of EPIC-KITCHENS-100")
        return [read_samples(source, [name], captions=False).labels for name in names]

    ids, narrations, verbs, nouns, all_nouns = columns(
        path, "narration_id", "narration", "verb_class", "noun_class", "all_noun_classes"
    )
    for row, text in enumerate(all_nouns):
        if not _CLASSES.fullmatch(text):
            raise MMTSError(
                f"{path}: line {row + 2}: all_noun_classes is {shown(text)}, expected a list such as [2, 5]"
            )
    if sentences:
        where = {narration_id: row for row, narration_id in enumerate(ids)}
        wanted = columns(sentences, "narration_id")[0]
        unknown = [narration_id for narration_id in wanted if narration_id not in where]
        if unknown:
            raise MMTSError(f"{sentences}: narration_id {shown(unknown[0])} is not in {path} ({len(unknown)} are not)")
        clip_of = [where[narration_id] for narration_id in wanted]
    else:
        clip_of = _first_of_each(narrations)
        covered = {(verbs[row], nouns[row]) for row in clip_of}
        clip_of += [row for row in _first_of_each(list(zip(verbs, nouns))) if (verbs[row], nouns[row]) not in covered]
    verb = torch.tensor(_numbered(path, "verb_class", verbs))
    sets = [re.findall(r"\d+", text) for text in all_nouns]
    classes = _numbered(path, "all_noun_classes", [number for numbers in sets for number in numbers])
    multi_hot = torch.zeros(len(sets), max(classes) + 1)
    multi_hot[np.repeat(np.arange(len(sets)), [len(numbers) for numbers in sets]), classes] = 1
    source = Source(path, "csv", separator=",")
    labels = read_samples(source, label_column.split(","), captions=False).labels
    return EK100([narrations[row] for row in clip_of], np.array(clip_of), Actions(verb, multi_hot), labels)


def _numbered(path: str, column: str, texts: list[str]) -> list[int]:
    """Class ids, numbered from 0 in the order of their appearance: an id of ten digits costs no memory."""
    with reading(path, f"a {column} is not a whole number"):
        ids = [int(text) for text in texts]
    number = {each: place for place, each in enumerate(dict.fromkeys(ids))}
    return [number[each] for each in ids]


def _first_of_each(values: list) -> list[int]:
    first: dict = {}
    for row, value in enumerate(values):
        first.setdefault(value, row)
    return list(first.values())
