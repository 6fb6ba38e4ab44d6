"""Printed text that is compared with a file. `UPDATE_SNAPSHOTS=1 pytest ...` rewrites the files; read their diff."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "snapshots"


def assert_snapshot(name: str, text: str) -> None:
    """Compare with `tests/data/snapshots/NAME.txt`, without blanks at the ends of lines."""
    lines = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    path = FOLDER / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS") == "1":
        path.write_text(lines, encoding="utf-8")
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    assert lines == expected, f"{path} differs; if that is meant, run the test with UPDATE_SNAPSHOTS=1"
