from __future__ import annotations

import pytest

from bim.orchestrator.config.durations import seconds


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2 d", 172_800), ("1H", 3600)]
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "0", "0h", "-1h", "1w", "ten minutes", "1e9", "nan", "1h30m"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration; write 90s, 10m"):
        seconds(text)
