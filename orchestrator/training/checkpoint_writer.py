"""Writing a stage's part of a checkpoint in the background, so that training waits for a copy in memory alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from torch import Tensor

from bim.orchestrator.training.checkpoint import save_block
from bim.orchestrator.training.manifest import FileRecord
from bim.orchestrator.training.messages import SavedBlocks

BlockState = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Weights and optimizer state of a block, on the CPU."""


class CheckpointWriter:
    """Writes one checkpoint at a time on a thread. For one thread that uses it."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[SavedBlocks] | None = None
        self._done: list[SavedBlocks] = []

    def save(self, checkpoint: str, copy_blocks: Callable[[], Mapping[int, BlockState]]) -> None:
        """Write what `copy_blocks` returns, block -> copied state, to a checkpoint folder in the background.

        Waits for an earlier checkpoint that is still being written, so that there is one copy at most.

        Raises:
            StorageError: the earlier one could not be written.
        """
        self.flush()
        self._pending = self._executor.submit(_write, checkpoint, copy_blocks())

    def finished(self) -> tuple[SavedBlocks, ...]:
        """What was written since the last call; does not wait. Raises OSError if a file could not be written."""
        if self._pending is not None and self._pending.done():
            self.flush()
        done, self._done = tuple(self._done), []
        return done

    def flush(self) -> None:
        """Wait until everything is written. Raises OSError if a file could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._done.append(pending.result())

    def discard(self) -> None:
        """Wait until nothing is being written, and forget it, also an error."""
        with suppress(Exception):
            self.flush()
        self._done = []


def _write(checkpoint: str, blocks: Mapping[int, BlockState]) -> SavedBlocks:
    files: list[FileRecord] = []
    for index, (weights, state) in blocks.items():
        files += save_block(checkpoint, index, weights, state)
    return SavedBlocks(checkpoint, tuple(files))
