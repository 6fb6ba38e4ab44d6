from __future__ import annotations

import pytest

from orchestrator.schedules import CosineSchedule


def test_warms_up_linearly_then_falls_as_a_cosine_to_zero() -> None:
    lr = CosineSchedule(peak=2.0, warmup_steps=4, total_steps=12)
    assert [lr(s) for s in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert lr(8) == pytest.approx(1.0)
    assert lr(12) == pytest.approx(0.0)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert CosineSchedule(1.0, 0, 10)(0) == pytest.approx(1.0)
