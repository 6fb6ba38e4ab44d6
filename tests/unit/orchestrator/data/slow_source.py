"""A source for tests of worker processes; a module of its own, so that workers import it."""

from __future__ import annotations

import os
import time

from torch import Tensor

from bim.orchestrator.data.digits import DigitsSource


class SlowSource(DigitsSource):
    """The digits, each read in `seconds` by another process than the one that made the source."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds, self._maker = seconds, os.getpid()

    def load(self, index: int) -> Tensor:
        if os.getpid() != self._maker:
            time.sleep(self._seconds)
        return super().load(index)
