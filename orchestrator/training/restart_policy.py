"""When a failed run is rewound to its last checkpoint, and how long is waited before."""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from bim.orchestrator.data.errors import DataError, DataWorkerError
from bim.orchestrator.files import StorageError, os_error_text
from bim.orchestrator.training.errors import DeviceMemoryError, StageFailure, TrainingError

FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that the same write meets again."""


_Kind = Literal["loss", "error"]
"""What a restart is counted as: a process that was lost, or an error that the code of a living one raised."""


class Verdict(Enum):
    """What follows from a failure."""

    RESTART = "restart"
    INCURABLE = "incurable"
    """A rewind cannot help: a loss that is not finite, missing data, a full disk."""
    REPEATED = "repeated"
    """The same code raised the same error at the same step again."""
    EXHAUSTED = "exhausted"
    """As many restarts as allowed, and no checkpoint beyond the failed step since."""


@dataclass(frozen=True)
class RestartPolicy:
    """Rewind at most `max_restarts` times without progress after lost processes, and as often after errors of their code.

    Progress is a committed checkpoint beyond the step that failed. Before the first restart nothing is waited for,
    then `backoff_s` seconds, and each time twice as long, at most `max_backoff_s`. An error of code costs no restart of a
    lost process: a run on machines that are taken away would end by it.
    """

    max_restarts: int
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0


class RestartBudget:
    """The restarts of one run against its policy."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self.total = 0
        """Restarts of the whole run."""
        self._without_progress = Counter[_Kind]()
        self._kind: _Kind = "loss"
        self._failed_step = -1
        self._last_error: tuple[int, str, str] | None = None

    def commit(self, step: int) -> None:
        """A checkpoint after `step` updates is committed."""
        if step > self._failed_step:
            self._without_progress.clear()

    @property
    def used(self) -> int:
        """Restarts since the last progress that count as the last failure does."""
        return self._without_progress[self._kind]

    def judge(self, failure: StageFailure, at_step: int) -> Verdict:
        """Decide about a failure; on `RESTART` one is counted.

        Args:
            at_step: the step that failed or, outside of a step, the first one that was not complete.
        """
        error = (at_step, failure.component, type(failure.cause).__name__)
        if is_incurable(failure.cause):
            return Verdict.INCURABLE
        is_repeatable = failure.raised_by_code and not isinstance(failure.cause, DataWorkerError)
        if is_repeatable and error == self._last_error:
            return Verdict.REPEATED
        self._kind = "error" if is_repeatable else "loss"
        if self.used >= self._policy.max_restarts:
            return Verdict.EXHAUSTED
        self._last_error = error if is_repeatable else None
        self._failed_step = max(self._failed_step, at_step)
        self._without_progress[self._kind] += 1
        self.total += 1
        return Verdict.RESTART

    @property
    def delay_s(self) -> float:
        """Seconds to wait before the restart that was counted last."""
        restarts = self._without_progress.total()
        if restarts < 2:
            return 0.0
        return min(self._policy.max_backoff_s, self._policy.backoff_s * 2.0 ** min(restarts - 2, 60))


def is_incurable(error: BaseException) -> bool:
    """Whether a rewind cannot help."""
    if isinstance(error, TrainingError):
        return not isinstance(error, DeviceMemoryError)
    return isinstance(error, DataError | StorageError) or is_disk_error(error)


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk or a storage refuses: full, read-only or gone."""
    return isinstance(error, StorageError) or (
        isinstance(error, OSError) and error.errno in FULL_OR_READ_ONLY
    )


def final_error(failure: StageFailure, verdict: Verdict, used: int, last_checkpoint: str) -> BaseException:
    """What ends a run after a failure and `used` restarts: a sentence, or what foreign code raised."""
    cause = failure.cause
    if is_disk_error(cause):
        return TrainingError(disk_sentence(cause, last_checkpoint))
    if verdict is Verdict.INCURABLE:
        return cause
    if verdict is Verdict.REPEATED and isinstance(cause, TrainingError):
        return TrainingError(f"{failure}, twice; last checkpoint: {last_checkpoint}")
    names_cause = isinstance(cause, TrainingError | DataWorkerError) or not failure.raised_by_code
    if verdict is Verdict.EXHAUSTED and names_cause:
        return TrainingError(
            f"{failure}, after {used} restart{'s' * (used != 1)} without a new checkpoint "
            f"(failures.max_restarts); last checkpoint: {last_checkpoint}"
        )
    return cause


def disk_sentence(error: BaseException, last_checkpoint: str) -> str:
    """The end of a run by a disk or a storage that refuses, for the user."""
    reason = os_error_text(error) if isinstance(error, OSError) else str(error)
    return (
        f"{reason}; make room or repair it, then continue with --resume; last checkpoint: {last_checkpoint}"
    )
