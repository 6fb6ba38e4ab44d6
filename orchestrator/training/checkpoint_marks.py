"""Which steps are saved, and which checkpoints are complete: stages write in the background and report later."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bim.orchestrator.training.manifest import FileRecord
from bim.orchestrator.training.messages import SavedBlocks
from bim.orchestrator.training.schedule import TrainingSchedule


@dataclass(frozen=True)
class CompleteCheckpoint:
    """A checkpoint whose files are all on the disk, to be committed.

    Args:
        step: updates that are in it.
        files: of all stages, by name: the manifest is equal for every placement of the blocks.
        bad_images: the unreadable images up to that step, name -> reason.
        requested: whether a signal asked for it.
    """

    step: int
    files: tuple[FileRecord, ...]
    bad_images: dict[str, str]
    requested: bool


@dataclass
class _Pending:
    step: int
    bad_images: dict[str, str]
    files: dict[int, tuple[FileRecord, ...]] = field(default_factory=dict)
    """By stage, once it has written them."""


class CheckpointMarks:
    """Decides which steps are saved: those of the schedule, those after `checkpoint_s` seconds, and those asked for.

    Args:
        saves_requested: how often a checkpoint was asked for until now.
    """

    def __init__(
        self,
        schedule: TrainingSchedule,
        saves_requested: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._schedule, self._saves_requested, self._clock = schedule, saves_requested, clock
        self._requested: set[int] = set()
        self.rewind()

    def rewind(self) -> None:
        """Forget the checkpoints that are not complete; the time to the next one begins."""
        self._pending: dict[str, _Pending] = {}
        self._marked_at = self._clock()
        self._submitted = 0

    def is_due(self, step: int, saves_requested: int) -> bool:
        """Whether the step that is about to be submitted is saved. Called once per step."""
        requested = saves_requested > self._saves_requested
        self._saves_requested = saves_requested
        every_s, now = self._schedule.checkpoint_s, self._clock()
        # On a disk that is slower than the interval there is one checkpoint after the other.
        by_time = every_s is not None and now - self._marked_at >= every_s and not self._submitted
        if not (requested or by_time or self._schedule.is_checkpoint_step(step)):
            return False
        if requested:
            self._requested.add(step + 1)
        self._marked_at = now
        self._submitted += 1
        return True

    def add(self, step: int, checkpoint: str, bad_images: Mapping[str, str]) -> None:
        """All stages have copied their state after `step` updates, or are about to, for the folder `checkpoint`."""
        self._pending[checkpoint] = _Pending(step, dict(bad_images))

    def complete(self, saved: Sequence[tuple[SavedBlocks, ...]]) -> list[CompleteCheckpoint]:
        """Note what every stage has written of the checkpoints that were added.

        Returns those that are complete now, oldest first.
        """
        for stage, parts in enumerate(saved):
            for part in parts:
                self._pending[part.checkpoint].files[stage] = part.files
        done = [name for name, pending in self._pending.items() if len(pending.files) == len(saved)]
        checkpoints = []
        for pending in sorted((self._pending.pop(name) for name in done), key=lambda each: each.step):
            files = sorted((f for files in pending.files.values() for f in files), key=lambda f: f.name)
            self._submitted = max(0, self._submitted - 1)
            checkpoints.append(
                CompleteCheckpoint(
                    pending.step, tuple(files), pending.bad_images, pending.step in self._requested
                )
            )
        return checkpoints
