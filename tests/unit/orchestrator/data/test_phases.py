from __future__ import annotations

import pytest

from bim.orchestrator.data.phases import PhaseSpec, constant, phase_at, phases_on, steps_until

SPECS = (PhaseSpec(0, (16, 16), 8), PhaseSpec(2, (24, 24), 4, grad_accum_steps=3), PhaseSpec(3, (32, 32), 4))


def test_steps_are_counted_through_all_phases() -> None:
    phases = phases_on(SPECS, images=50)
    assert [p.steps_per_epoch for p in phases] == [6, 4, 12]
    assert [p.first_step for p in phases] == [0, 12, 16]
    assert [steps_until(phases, epoch) for epoch in range(6)] == [0, 6, 12, 16, 28, 40]


def test_every_step_belongs_to_one_epoch_of_one_phase() -> None:
    phases = phases_on(SPECS, images=50)
    positions = [phase_at(phases, step).epoch_of(step) for step in range(40)]
    expected = [(epoch, within) for epoch, steps in enumerate((6, 6, 4, 12, 12)) for within in range(steps)]
    assert positions == expected


def test_a_steady_run_is_one_phase_without_an_end() -> None:
    (phase,) = constant(5, 8, grad_accum_steps=2)
    assert phase.images_per_step == 16
    assert phase_at((phase,), 10_000).epoch_of(10_001) == (2000, 1)


@pytest.mark.parametrize(
    ("specs", "images", "message"),
    [
        ([], 10, "begins with epoch 0"),
        ([PhaseSpec(1, (8, 8), 2)], 10, "begins with epoch 0"),
        ([PhaseSpec(0, (8, 8), 2), PhaseSpec(0, (16, 16), 2)], 10, "begins with epoch 0, and the one before"),
        (
            [PhaseSpec(0, (8, 8), 2), PhaseSpec(1, (16, 16), 4, 3)],
            10,
            "10 images .* data.batch_size=4 x data.accumulate=3; with data.accumulate 1 and data.batch_size 1 an epoch has "
            "10 steps",
        ),
        (
            [PhaseSpec(0, (8, 8), 512, 8)],
            1050,
            "with data.accumulate 1 and data.batch_size 32 an epoch has 32 steps",
        ),
        (
            [PhaseSpec(0, (8, 8), 500, 400)],
            100_000,
            "data.accumulate 10 and data.batch_size 500 an epoch has 20 steps",
        ),
        ([PhaseSpec(0, (8, 8), 64)], 50, "data.batch_size=64; with data.batch_size 2 an epoch has 25 steps"),
    ],
)
def test_impossible_phases_are_refused(specs: list[PhaseSpec], images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phases_on(specs, images)
