"""Numbers that flags take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from ..errors import shown

_MOST = 2**31 - 1  # seeds beyond it are not all packages'


def whole(least: int, most: int) -> Callable[[str], int]:
    """A type for ``argparse``: whole numbers from ``least`` to ``most``."""

    def number(text: str) -> int:
        value = int(text) if re.fullmatch("[0-9]{1,10}", text) else -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {least} to {most}")
        return value

    return number


positive, seed = whole(1, _MOST), whole(0, _MOST)


def at_least(least: int, otherwise: str) -> Callable[[str], int]:
    """A type for ``argparse``: what Python takes for a whole number, of ``least`` or more."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} {otherwise}")
        return value

    return number
