"""Settings that were renamed: the old key works for one minor version, with a notice.

Recipes, saved settings and the command line may use it, so that `--resume` of an older run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

log = logging.getLogger(__name__)

RENAMED = {
    "mask.score_newly_dropped": "mask.loss_on_newly_masked",
    "backbones.called": "backbones.alias",
}
"""Old dotted key, which works until version 0.3 -> new dotted key in the same section."""


def new_key(key: str) -> str:
    """The key of today for a dotted key of today or of the previous minor version."""
    if key not in RENAMED:
        return key
    _notify(key)
    return RENAMED[key]


def with_new_keys(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Nested plain values with old keys replaced; a value under the new key wins over one under the old key."""
    renamed: dict[str, Any] = {}
    for name, value in values.items():
        key = new_key(f"{section}.{name}").removeprefix(f"{section}.") if section else name
        if key == name or key not in values:
            inside = isinstance(value, Mapping) and not section
            renamed[key] = with_new_keys(value, name) if inside else value
    return renamed


@cache
def _notify(key: str) -> None:
    log.warning("setting '%s' is now '%s'; the old name works until version 0.3", key, RENAMED[key])
