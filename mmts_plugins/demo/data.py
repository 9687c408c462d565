"""scikit-learn's handwritten digits as a long-tail image-caption set in OpenCLIP's CSV form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {word}",
    "the number {digit} written by hand",
    "a scan of the digit {word}",
    "somebody wrote the figure {digit}",
    "the numeral {word} in grey ink",
)
HEAD, TAIL = 140, 7
HELD_OUT = 30
IMAGE_SIZE = 32
IMAGE_KEY, CAPTION_KEY, LABEL_KEY = "filepath", "title", "digit"


def captions_of(digit: int) -> list[str]:
    """The wordings that all images of a digit share."""
    return [template.format(word=WORDS[digit], digit=digit) for template in TEMPLATES]


@dataclass(frozen=True)
class Split:
    """Which images are trained on and which are held out, as rows of scikit-learn's digits.

    Attributes:
        order: the ten digits, most common in training first.
        train: ``{digit: rows}``, exponentially fewer along ``order``.
        held_out: ``{digit: rows}``, equally many of each, none of them in ``train``.
    """

    order: list[int]
    train: dict[int, np.ndarray]
    held_out: dict[int, np.ndarray]

    def groups(self) -> dict[str, list[int]]:
        """The three most common digits, the three rarest, and those between."""
        return {"head": self.order[:3], "middle": self.order[3:-3], "tail": self.order[-3:]}


def split(target: np.ndarray, seed: int) -> Split:
    """Set a balanced part apart, then thin the rest out to class sizes that fall from HEAD to TAIL geometrically.

    Args:
        target: ``[N]`` the digit of each image.
        seed: decides which digits are common, and which images are taken.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(10).tolist()
    sizes = np.geomspace(HEAD, TAIL, 10).round().astype(int)
    train, held_out = {}, {}
    for digit, size in zip(order, sizes):
        rows = random.permutation(np.flatnonzero(target == digit))
        held_out[digit] = rows[:HELD_OUT]
        train[digit] = rows[HELD_OUT : HELD_OUT + size]
    return Split(order, train, held_out)


def write(folder: Path, seed: int) -> Split:
    """Write ``train.tsv``, ``val.tsv`` and ``images/*.png`` below ``folder/data``.

    The paths in both files are relative to ``folder``: OpenCLIP opens them as they are, so it must run there.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    parts = split(digits.target, seed)
    images = folder / "data" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, rows_of in (("train", parts.train), ("val", parts.held_out)):
        lines = [f"{IMAGE_KEY}\t{CAPTION_KEY}\t{LABEL_KEY}"]
        for digit, rows in rows_of.items():
            captions = captions_of(digit)
            for number, row in enumerate(rows.tolist()):
                pixels = (digits.images[row] * (255 / 16)).astype(np.uint8)
                path = images / f"{name}_{digit}_{number:03d}.png"
                Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB").save(
                    path
                )
                # In turn, not by chance: a rare digit shall not lack a wording.
                caption = captions[number % len(captions)]
                lines.append(f"{path.relative_to(folder).as_posix()}\t{caption}\t{digit}")
        (folder / "data" / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return parts
