"""Tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def padded(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table that is a table before it is rendered, too; the first of the rows names the columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [line(cell.ljust(width) for cell, width in zip(cells, widths)) for cells in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
