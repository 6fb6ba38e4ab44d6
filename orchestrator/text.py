"""Numbers, durations and paths as text, for tables, messages and figures. A leaf."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

NOT_MEASURED = "-"
"""Cell of a table without a value."""

WIDTH = 98
"""Columns of a line of prose on a terminal."""

_LIST, _NO_BREAK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]"), "\0"


def duration(seconds: float) -> str:
    """`45 s`, `1 min 12 s`, `3 h 05 min`, `2 d 04 h`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600:02d} h"


def short_path(path: Path) -> str:
    """The path relative to the working directory if it lies below it, else as it is."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)


def wrapped(text: str) -> list[str]:
    """Lines of at most `WIDTH` columns, the later ones indented; a list in brackets stays on one line."""
    unbroken = _LIST.sub(lambda match: match[0].replace(" ", _NO_BREAK), text)
    lines = textwrap.wrap(
        unbroken, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def params_text(params: float) -> str:
    """`0.230 M`, `5.50 M`, `85.8 M`, `304 M`; below 0.1 M `12.3 k`."""
    return f"{three_digits(params / 1e6)} M" if params >= 1e5 else f"{three_digits(params / 1e3)} k"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: `0.00123`, `0.810`, `12.3`, `1230`."""
    if value == 0:
        return "0"
    decimals = 0
    while abs(value) * 10**decimals < 99.95 and decimals < 6:
        decimals += 1
    return f"{value:.{decimals}f}"
