"""A run that was cut off and resumed equals the unbroken one, bit for bit; in one process, where the cut can be exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from bim.orchestrator.data.phases import PhaseSpec
from bim.orchestrator.training.stage_group import InProcessStages
from tests.integration.tiny import (
    AtStep,
    data,
    differing,
    growing,
    hierarchy,
    in_process,
    state,
    tiny_spec,
    train,
)


class CutOff(BaseException):
    """The driver is gone."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    train(in_process(), out)
    return out


def cut_off_at(*steps: int) -> AtStep:
    """Ends the training once at each of these steps."""
    left = list(steps)

    def at_step(done: int) -> None:
        if left and done == left[0]:
            left.pop(0)
            raise CutOff

    return AtStep(at_step)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([20], id="on a mark"),
        # Before the first checkpoint, one step after it, in the last epoch.
        pytest.param([7, 21, 47], id="three times", marks=pytest.mark.slow),
    ],
)
def test_cut_off_at_a_step_and_resumed(tmp_path: Path, unbroken: Path, steps: list[int]) -> None:
    callback = cut_off_at(*steps)
    for _ in steps:
        with pytest.raises(CutOff):
            train(in_process(), tmp_path, callback=callback)
    train(in_process(), tmp_path, callback=callback)
    assert differing(state(unbroken, 50), state(tmp_path, 50)) == []


@pytest.mark.slow
def test_accumulated_micro_batches_resume_too(tmp_path: Path) -> None:
    def stages() -> InProcessStages:
        two_micro_batches = data(phases=(PhaseSpec(0, (16, 16), 16, grad_accum_steps=2),))
        return InProcessStages(tiny_spec(), two_micro_batches.train_batches, ((0, 1), (2, 3)), threads=1)

    train(stages(), tmp_path / "whole", steps=20, every=6, grad_accum_steps=2)
    with pytest.raises(CutOff):
        train(stages(), tmp_path / "cut", steps=20, every=6, grad_accum_steps=2, callback=cut_off_at(13))
    train(stages(), tmp_path / "cut", steps=20, every=6, grad_accum_steps=2)
    assert differing(state(tmp_path / "whole", 20), state(tmp_path / "cut", 20)) == []


@pytest.mark.slow
def test_a_run_of_growing_resolution_resumes_inside_any_phase(tmp_path: Path) -> None:
    spec, images, phases = growing()
    assert [(p.first_step, p.steps_per_epoch) for p in phases] == [(0, 4), (4, 4), (12, 9)]

    def stages() -> InProcessStages:
        return InProcessStages(spec, images.train_batches, ((0, 1), (2, 3)), threads=1)

    train(stages(), tmp_path / "whole", steps=21, every=5, phases=phases)
    cuts = (2, 4, 7, 12, 14)
    callback, out = cut_off_at(*cuts), tmp_path / "cut"
    for _ in cuts:
        with pytest.raises(CutOff):
            train(stages(), out, steps=21, every=5, phases=phases, callback=callback)
    train(stages(), out, steps=21, every=5, phases=phases, callback=callback)
    assert differing(state(tmp_path / "whole", 21), state(out, 21)) == []


@pytest.mark.slow
def test_a_hierarchy_of_growing_resolution_resumes_in_its_second_phase(tmp_path: Path) -> None:
    spec, images, phases = hierarchy()
    assert [(p.first_step, p.size) for p in phases] == [(0, (64, 64)), (4, (96, 96))]

    def stages() -> InProcessStages:
        return InProcessStages(spec, images.train_batches, ((0, 1), (2, 3)), threads=1)

    train(stages(), tmp_path / "whole", steps=8, every=5, phases=phases)
    with pytest.raises(CutOff):
        train(stages(), tmp_path / "cut", steps=8, every=5, phases=phases, callback=cut_off_at(6))
    train(stages(), tmp_path / "cut", steps=8, every=5, phases=phases)
    assert differing(state(tmp_path / "whole", 8), state(tmp_path / "cut", 8)) == []
