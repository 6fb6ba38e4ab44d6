"""Faults of transport and of devices met by the Ray stage group, over a double of Ray's `get` and `wait`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, ObjectFetchTimedOutError, RayActorError, RayTaskError

from bim.orchestrator.distributed import actor_group, ray_stage_group
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.distributed.ray_stage_group import Pending, RayStages
from bim.orchestrator.training.errors import StageFailure
from bim.orchestrator.training.messages import StageReport, StepReport, StepRequest
from bim.orchestrator.training.watchdog import LOADER

REQUEST = StepRequest(7, 0.1)


class Object:
    """An object reference: `errors` are raised one after the other, then `value` is there, if it ever is."""

    def __init__(self, value: Any = None, *errors: Exception, never: bool = False) -> None:
        self.value, self.errors, self.never = value, list(errors), never


class Ray:
    """`ray.get` and `ray.wait` over such objects."""

    def get(self, refs: Any, timeout: float | None = None) -> Any:
        if isinstance(refs, list):
            return [self.get(ref, timeout) for ref in refs]
        if refs.errors:
            raise refs.errors.pop(0) if len(refs.errors) > 1 or refs.value is not None else refs.errors[0]
        if refs.never:
            raise GetTimeoutError("not ready")
        return refs.value

    def wait(self, refs: list[Object], **options: Any) -> tuple[list[Object], list[Object]]:
        return [ref for ref in refs if not ref.never], [ref for ref in refs if ref.never]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> RayStages:
    for module in (ray_stage_group, actor_group):
        monkeypatch.setattr(module, "ray", Ray())
    monkeypatch.setattr(ray_stage_group, "DRAIN_TIMEOUT_S", 0.01)
    layout = StageLayout(((0,), (1,)), 0.0, 0.3, 0.2, 1)
    group = RayStages(None, None, layout, Path("."))  # type: ignore[arg-type]
    killed: list[int] = []
    monkeypatch.setattr(group._actors, "kill", killed.append)
    group.killed = killed  # type: ignore[attr-defined]
    return group


def pending(*stage_errors: tuple[Exception, ...], never: int | None = None) -> Pending:
    reports = []
    for number, errors in enumerate(stage_errors):
        report = StageReport({number: {"loss": 1.0}}, (), 0.1, 0.0)
        reports.append(Object(report, *errors, never=number == never))
    return Pending(REQUEST, Object(((), 0.1)), tuple(reports))


def test_a_get_that_fails_once_and_then_has_all_values_is_no_failure(stages: RayStages) -> None:
    report = stages.wait(pending((ObjectFetchTimedOutError("ab", None, ""),), ()), 1.0)
    assert isinstance(report, StepReport)
    assert len(report.stages) == 2


def test_a_micro_batch_that_is_not_done_in_time_is_no_failure_and_names_who_works_on_it(
    stages: RayStages,
) -> None:
    late = pending((), (), never=1)
    assert stages.wait(late, 0.01) is None
    assert stages.awaited(late) == 1
    late.load_info.never = True
    assert stages.awaited(late) == LOADER


def failed(number: int, error: Exception) -> Pending:
    """Stage `number` failed, and with it the calls of the later stages."""
    reports = [
        Object(None, error) if n >= number else Object(StageReport({}, (), 0.1, 0.0)) for n in range(2)
    ]
    return Pending(REQUEST, Object(((), 0.1)), tuple(reports))


@pytest.mark.parametrize("number", [0, 1])
def test_only_the_actor_whose_device_is_broken_is_replaced(stages: RayStages, number: int) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    broken = RayTaskError("train_step", "a traceback", error).as_instanceof_cause()
    with pytest.raises(StageFailure, match=rf"stage {number} .* failed at step 7 \(RuntimeError: CUDA error"):
        stages.wait(failed(number, broken), 1.0)
    assert stages.killed == [number]  # type: ignore[attr-defined]


def test_an_error_of_the_code_leaves_the_actor_alive(stages: RayStages) -> None:
    error = RayTaskError("train_step", "a traceback", KeyError("their own")).as_instanceof_cause()
    with pytest.raises(StageFailure) as raised:
        stages.wait(failed(1, error), 1.0)
    assert isinstance(raised.value.cause, KeyError)
    assert raised.value.step == 7
    assert stages.killed == []  # type: ignore[attr-defined]


def test_a_stage_that_hangs_after_another_one_died_is_killed(stages: RayStages) -> None:
    both = failed(0, RayActorError())
    both.reports[1].errors.clear()
    both.reports[1].never = True
    with pytest.raises(StageFailure, match=r"stage 0 \(block 0\) died at step 7"):
        stages.wait(both, 1.0)
    assert stages.killed == [1]  # type: ignore[attr-defined]
