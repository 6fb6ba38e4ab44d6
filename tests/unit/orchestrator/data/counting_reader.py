"""A reader for tests of the prefetcher; a module of its own, so that workers import it, without torch."""

from __future__ import annotations

import numpy as np


class CountingReader:
    """Item i of batch n holds the numbers (n, i); the first item of every slice counts as bad."""

    def __init__(self, batch_size: int) -> None:
        self.batch_shape = (batch_size, 2)

    def fill(self, out: np.ndarray, number: int, start: int) -> list[tuple[str, str]]:
        out[:, 0], out[:, 1] = number, np.arange(start, start + len(out))
        return [(f"item {start}", f"batch {number}")]


class PluginReader:
    """Every item holds the number of plugins that the worker has imported."""

    batch_shape = (2, 1)

    def fill(self, out: np.ndarray, number: int, start: int) -> list[tuple[str, str]]:
        from bim.orchestrator.plugins import imported_plugins

        out[:] = len(imported_plugins())
        return []
