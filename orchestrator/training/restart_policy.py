"""When a failed run is rewound to its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.files import StorageError
from bim.orchestrator.training.errors import StageFailure, TrainingError


@dataclass(frozen=True)
class RestartPolicy:
    """Rewind at most `max_restarts` times in one run.

    Errors that a rewind cannot cure are raised at once: `TrainingError`, missing or changed data (`DataError`), and a
    file system that refuses a checkpoint (`StorageError`).
    """

    max_restarts: int

    def restarts(self, error: StageFailure, done: int) -> bool:
        """Whether to rewind after `error`, when the run was rewound `done` times already."""
        return done < self.max_restarts and not isinstance(
            error.cause, TrainingError | DataError | StorageError
        )
