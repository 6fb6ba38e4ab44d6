from __future__ import annotations

import pytest

from bim.orchestrator.data.phases import PhaseSpec, constant, phases_on
from bim.orchestrator.training.lr_schedule import CosineSchedule, peak_rate


def test_warms_up_linearly_then_falls_as_a_cosine_to_zero() -> None:
    lr = CosineSchedule(blr=2.0, warmup_epochs=1, epochs=3, phases=constant(4, 256))
    assert [lr(s) for s in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert lr(8) == pytest.approx(1.0)
    assert lr(12) == pytest.approx(0.0)


def test_the_peak_follows_the_effective_batch() -> None:
    assert peak_rate(1.5e-4, PhaseSpec(0, (8, 8), 512, grad_accum_steps=8)) == pytest.approx(
        1.5e-4 * 4096 / 256
    )


def test_no_warm_up_starts_at_the_peak() -> None:
    assert CosineSchedule(1.0, 0, 1, constant(10, 256))(0) == pytest.approx(1.0)


def test_a_phase_with_another_batch_follows_the_same_curve_with_its_own_peak() -> None:
    specs = [PhaseSpec(0, (8, 8), 64), PhaseSpec(2, (16, 16), 16, grad_accum_steps=2)]
    changing, steady = phases_on(specs, 640), phases_on(specs[:1], 640)
    lr, plain = CosineSchedule(1.0, 0, 4, changing), CosineSchedule(1.0, 0, 4, steady)
    assert [lr(s) for s in range(20)] == [plain(s) for s in range(20)]
    # Step 20 opens epoch 2: twenty steps of 32 images per epoch instead of ten of 64.
    assert lr(20) == pytest.approx(plain(20) / 2)
    assert lr(40) == pytest.approx(plain(30) / 2)
