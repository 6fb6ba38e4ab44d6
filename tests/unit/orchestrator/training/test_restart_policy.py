from __future__ import annotations

import errno

import pytest

from bim.orchestrator.data.errors import DataError, DataWorkerError
from bim.orchestrator.training.errors import DeviceMemoryError, StageFailure, TrainingError
from bim.orchestrator.training.restart_policy import RestartBudget, RestartPolicy, Verdict


def lost(step: int | None = 5) -> StageFailure:
    return StageFailure(
        "stage 0 (block 0)", "at a step", RuntimeError("killed"), process_lost=True, step=step
    )


def raised(cause: BaseException, component: str = "stage 0 (block 0)") -> StageFailure:
    return StageFailure(component, "at a step", cause, process_lost=False)


def test_only_a_commit_beyond_the_failed_step_refills_the_budget() -> None:
    budget = RestartBudget(RestartPolicy(2))
    assert budget.judge(lost(), 5) is budget.judge(lost(), 9) is Verdict.RESTART
    budget.commit(8)
    assert budget.judge(lost(), 6) is Verdict.EXHAUSTED
    budget.commit(10)
    assert budget.judge(lost(), 11) is Verdict.RESTART
    assert (budget.used, budget.total) == (1, 3)


def test_the_wait_doubles_without_progress_and_starts_again_with_it() -> None:
    budget = RestartBudget(RestartPolicy(20, backoff_s=2.0, max_backoff_s=10.0))
    delays = []
    for _ in range(5):
        budget.judge(lost(), 5)
        delays.append(budget.delay_s)
    assert delays == [0.0, 2.0, 4.0, 8.0, 10.0]
    budget.commit(6)
    budget.judge(lost(), 7)
    assert budget.delay_s == 0.0


def test_only_the_same_error_of_the_same_part_at_the_same_step_in_a_row_is_a_repetition() -> None:
    budget = RestartBudget(RestartPolicy(20))
    assert budget.judge(raised(KeyError("a")), 5) is Verdict.RESTART
    assert budget.judge(raised(ValueError("a")), 5) is Verdict.RESTART
    assert budget.judge(raised(KeyError("a")), 6) is Verdict.RESTART
    assert budget.judge(raised(KeyError("a"), "the data loader"), 6) is Verdict.RESTART
    assert budget.judge(lost(), 6) is Verdict.RESTART
    assert budget.judge(raised(KeyError("a")), 6) is Verdict.RESTART
    assert budget.judge(raised(KeyError("another text")), 6) is Verdict.REPEATED


@pytest.mark.parametrize(
    "cause",
    [
        TrainingError("a loss"),
        DataError("images changed"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EROFS, "read only"),
    ],
)
def test_what_a_rewind_cannot_cure_ends_the_run(cause: BaseException) -> None:
    budget = RestartBudget(RestartPolicy(20))
    assert budget.judge(raised(cause), 5) is Verdict.INCURABLE
    assert budget.total == 0


def test_full_device_memory_and_other_errors_of_the_system_are_tried_once_more() -> None:
    for cause in (DeviceMemoryError("full"), OSError(errno.EIO, "input/output error")):
        budget = RestartBudget(RestartPolicy(20))
        assert budget.judge(raised(cause), 5) is Verdict.RESTART
        assert budget.judge(raised(cause), 5) is Verdict.REPEATED


def test_a_data_worker_that_dies_again_counts_as_a_lost_process() -> None:
    budget = RestartBudget(RestartPolicy(2))
    failure = raised(DataWorkerError("data worker 1 of 2 was killed by SIGKILL"), "the data loader")
    verdicts = [budget.judge(failure, 5) for _ in range(3)]
    assert verdicts == [Verdict.RESTART, Verdict.RESTART, Verdict.EXHAUSTED]


def test_an_error_of_a_living_process_costs_no_restart_of_a_lost_one() -> None:
    budget = RestartBudget(RestartPolicy(2, backoff_s=2.0))
    verdicts = [
        budget.judge(failure, 5)
        for failure in (lost(), raised(KeyError("a")), lost(), raised(ValueError("b")))
    ]
    assert verdicts == [Verdict.RESTART] * 4
    assert (budget.used, budget.total) == (2, 4)
    assert budget.delay_s == 8.0  # the pause grows with both
    assert budget.judge(lost(), 5) is Verdict.EXHAUSTED
    assert budget.judge(raised(TypeError("c")), 5) is Verdict.EXHAUSTED  # errors without end are bounded too


def test_the_pause_after_any_number_of_restarts_is_bounded() -> None:
    budget = RestartBudget(RestartPolicy(10_000, max_backoff_s=60.0))
    for _ in range(5_000):
        budget.judge(lost(), 5)
    assert budget.delay_s == 60.0
