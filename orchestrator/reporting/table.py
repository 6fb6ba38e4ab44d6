"""The one renderer of aligned text tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from bim.orchestrator.text import NOT_MEASURED

GAP = "  "


@dataclass(frozen=True)
class Column:
    """One column of the text: `group` stands over it and the ones that follow, `pixels` is its cell for raw pixels."""

    title: str
    cells: tuple[str, ...]
    group: str = ""
    pixels: str = ""

    @property
    def measured(self) -> bool:
        return any(cell not in ("", NOT_MEASURED) for cell in self.cells)

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.title, self.pixels, *self.cells))


def table_lines(costs: Sequence[Column], scores: Sequence[Column]) -> list[str]:
    """Header, one line per depth, and one for raw pixels; columns are right-aligned and two spaces apart."""
    costs = [column for column in costs if column.measured]
    scores = [column for column in scores if column.measured]
    left = sum(column.width + len(GAP) for column in costs)
    groups, pixels = " " * left, "raw pixels".ljust(left)
    for column in scores:
        if column.group:  # the title starts where its first column does
            groups = groups.rstrip().ljust(len(pixels)) + column.group
        pixels += column.pixels.rjust(column.width) + GAP
    columns = [*costs, *scores]
    rows = [[column.title for column in columns], *zip(*(column.cells for column in columns), strict=True)]
    lines = [
        GAP.join(cell.rjust(column.width) for cell, column in zip(row, columns, strict=True)) for row in rows
    ]
    if groups.strip():
        lines.insert(0, groups)
    if any(column.pixels for column in scores):
        lines.append(pixels.rstrip())
    return lines


def note_lines(notes: Sequence[tuple[str, str]]) -> list[str]:
    """Words and what they mean, a line each, in two columns."""
    width = max((len(word) for word, _ in notes), default=0)
    return [f"{word.ljust(width)}  {text}" for word, text in notes]
