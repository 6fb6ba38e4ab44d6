"""Durations as people write them."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """Seconds of a duration such as `90s`, `10m`, `1.5h`, `2d`; of a bare number. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"'{text}' is no duration; write 90s, 10m, 1.5h or 2d")
    return float(match[1]) * _UNITS[match[2] or "s"]
