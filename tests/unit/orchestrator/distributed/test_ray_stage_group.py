from __future__ import annotations

import pytest
from ray.exceptions import RayActorError, RayError

from bim.orchestrator.distributed.ray_stage_group import exit_reason
from bim.orchestrator.training.errors import StageFailure

KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: StageActor
\tpid: 19149
\tip: 10.0.0.3
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RayActorError(error_msg=KILLED),
            "The actor is dead because its worker process has died (node 10.0.0.3, possibly out of memory)",
        ),
        (RayError("The node is gone."), "The node is gone"),
        (RayError(""), "RayError"),
    ],
)
def test_the_reason_of_a_lost_process_is_one_sentence_with_its_node(error: RayError, reason: str) -> None:
    assert exit_reason(error) == reason
    failure = StageFailure(
        "stage 2 (block 2)", "at step 40", RuntimeError(exit_reason(error)), process_lost=True
    )
    assert str(failure) == f"stage 2 (block 2) died at step 40: {reason}"
