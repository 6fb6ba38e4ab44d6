"""The one renderer of tables: aligned text for terminals and notes, Markdown for model cards. A leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal, TypeVar

from bim.orchestrator.text import NOT_MEASURED

Key = str | tuple[str, str]
"""A column: its heading, or the heading of a group of columns and its own below that."""

AnyKey = TypeVar("AnyKey", bound=Key)

GAP = "  "


def render(
    rows: Sequence[Mapping[AnyKey, str]],
    style: Literal["plain", "markdown"] = "plain",
    align: Literal["left", "right", "label"] = "right",
) -> str:
    """Rows by column; the columns are the keys in order of appearance, without those in which nothing was measured.

    plain: aligned columns; a long cell of the first column runs over empty cells to its right.
    align: of plain columns; label: the first one left, the others right.
    markdown: a right-aligned table with pipes; groups are left out.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys = [key for key in keys if any(row.get(key, "") not in ("", NOT_MEASURED) for row in rows)]
    header = [key if isinstance(key, str) else key[1] for key in keys]
    body = [[row.get(key, "") for key in keys] for row in rows]
    if style == "markdown":
        return "\n".join([_piped(header), "|" + " ---: |" * len(keys), *map(_piped, body)])
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    widths[0] = max(len(line[0]) for line in [header, *body] if line is header or line[1:2] != [""])
    lines = [_aligned(line, widths, align) for line in [header, *body]]
    groups = _groups(keys, widths)
    return "\n".join([groups, *lines] if groups else lines)


def note_lines(notes: Sequence[tuple[str, str]]) -> list[str]:
    """Terms and what they mean, a line each, in two columns."""
    width = max((len(term) for term, _ in notes), default=0)
    return [f"{term.ljust(width)}{GAP}{text}" for term, text in notes]


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _aligned(cells: Sequence[str], widths: Sequence[int], align: str) -> str:
    padded = [
        cell.ljust(width) if align == "left" or (align == "label" and column == 0) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    overflow = len(padded[0]) - widths[0]
    return (padded[0] + GAP.join(["", *padded[1:]])[overflow:]).rstrip()


def _groups(keys: Sequence[Key], widths: Sequence[int]) -> str:
    """The line above the header: the heading of a group starts where its first column does."""
    line, left = "", 0
    columns = zip(keys, widths, strict=True)
    for group, members in groupby(columns, lambda column: "" if isinstance(column[0], str) else column[0][0]):
        line = line.ljust(left) + group
        left += sum(width + len(GAP) for _, width in members)
    return line.rstrip()
