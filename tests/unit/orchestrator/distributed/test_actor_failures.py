"""Ray's errors as sentences: the texts are those of Ray 2.60."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import (
    ActorUnavailableError,
    ObjectFetchTimedOutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from bim.orchestrator.distributed.actor_failures import exit_reason, stage_failure
from bim.orchestrator.distributed.actors import ActorProcess

DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: StageActor
\tpid: 19149
\tip: 10.0.0.3
"""

KILLED = (
    DIED
    + "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)

EXITED = DIED + (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "exits unexpectedly. Worker exits with an exit code 4."
)

NODE_LOST = DIED + "The actor died because its node has died. Node Id: ab12\n\tthe actor's node was dead"

KILLED_BY_RAY = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.3, ID: ab) where the lease was running was 15.2GB / 16GB (0.95), which exceeds 0.95."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RayActorError(error_msg=KILLED),
            "the process ended without a message, as after signal 9 (SIGKILL): possibly the system was out of memory (node "
            "10.0.0.3)",
        ),
        (RayActorError(error_msg=EXITED), "the process ended with exit status 4 (node 10.0.0.3)"),
        (RayActorError(error_msg=NODE_LOST), "the node is lost (node 10.0.0.3)"),
        (
            RayActorError(error_msg=DIED, preempted=True),
            "the node was taken away by its provider (preemption)",
        ),
        (
            OutOfMemoryError(KILLED_BY_RAY),
            "killed by Ray because the memory of the node was nearly full (node 10.0.0.3)",
        ),
        (ActorUnavailableError("connection refused", None), "the process cannot be reached"),
        (RayError("The raylet is gone. Or so."), "The raylet is gone"),
        (RayError(""), "RayError"),
    ],
)
def test_the_cause_is_one_sentence(error: RayError, reason: str) -> None:
    assert exit_reason(error).startswith(reason)
    assert "\n" not in exit_reason(error)


def process(log: Path) -> ActorProcess:
    return ActorProcess(19149, 0.0, "ab12", "10.0.0.3 (gpu-worker-2)", str(log))


def test_a_lost_process_is_told_with_its_node_its_log_and_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    log.write_text(":job_id:01\nFatal Python error: Segmentation fault\n\nCurrent thread 0x1\n")
    error = RayActorError(error_msg=KILLED)
    failure = stage_failure("stage 2 (block 2)", "at step 40", error, 40, process(log))
    assert str(failure) == (
        "stage 2 (block 2) died at step 40: the process crashed with signal 11 (SIGSEGV) (node 10.0.0.3 "
        f"(gpu-worker-2)), its log: {log}"
    )
    assert (failure.process_lost, failure.raised_by_code, failure.step) == (True, False, 40)
    assert "Worker exit type: SYSTEM_ERROR" in failure.details
    assert "Fatal Python error" in failure.details
    assert ":job_id:" not in failure.details


def test_a_log_on_another_machine_is_named_and_not_read(tmp_path: Path) -> None:
    error = RayActorError(error_msg=KILLED)
    failure = stage_failure("stage 2 (block 2)", "at step 40", error, 40, process(tmp_path / "gone"))
    assert "signal 9" in str(failure)
    assert str(failure).endswith(f"its log: {tmp_path / 'gone'}")


def test_what_the_users_code_raised_is_the_cause_and_its_traceback_a_detail() -> None:
    error = RayTaskError("train_step", 'File "stage.py", line 3\nKeyError: their own', KeyError("their own"))
    failure = stage_failure("stage 0 (block 0)", "at step 3", error.as_instanceof_cause(), 3, None)
    assert isinstance(failure.cause, KeyError)
    assert (failure.process_lost, failure.raised_by_code) == (False, True)
    assert 'File "stage.py", line 3' in failure.details


def test_a_transfer_that_failed_is_neither_a_lost_process_nor_the_codes_error() -> None:
    error = ObjectFetchTimedOutError("ab", None, "train_step()")
    failure = stage_failure("stage 1 (block 1)", "at step 3", error, 3, None)
    assert (failure.process_lost, failure.raised_by_code) == (False, False)
