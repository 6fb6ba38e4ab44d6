"""When a stage counts as hung: it has worked on one micro-batch for much longer than it usually does."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

LOADER = -1
"""The data loader's number among the stages 0, 1, ..."""


@dataclass(frozen=True)
class WatchdogLimits:
    """Limits of the time for one micro-batch.

    Args:
        factor: times the median of the component's last `window` micro-batches ...
        least_s: ... but at least this many seconds.
        unknown_s: seconds while fewer than `known` micro-batches were measured, and for one that saves a checkpoint.
        pause_s: a gap between two looks that is longer shows that this process was stopped (SIGTSTP, a laptop's lid) or
            had other work; it does not count.
    """

    factor: float = 20.0
    least_s: float = 600.0
    unknown_s: float = 1800.0
    window: int = 100
    known: int = 20
    pause_s: float = 10.0


SLOW_FACTOR = 3.0
"""Times the median of the other stages from which on a stage is named as slow."""


class Watchdog:
    """Follows the component that the oldest micro-batch in flight waits for. Times are those of `clock`, in seconds."""

    def __init__(
        self, limits: WatchdogLimits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._clock = limits or WatchdogLimits(), clock
        self.reset()

    def reset(self) -> None:
        """Forget what was measured: steps after a restart or of another image size include a warm-up or a compilation."""
        self._durations: defaultdict[int, deque[float]] = defaultdict(
            lambda: deque(maxlen=self._limits.window)
        )
        self._awaited: tuple[object, int] | None = None
        self._waited_s = 0.0
        self._looked_at = self._clock()

    def record(self, component: int, seconds: float) -> None:
        """A component worked on a micro-batch for so long."""
        self._durations[component].append(seconds)

    def limit_s(self, component: int, saves: bool = False) -> float:
        """How long a component may work on one micro-batch.

        saves: whether it saves a checkpoint with it.
        """
        durations, limits = self._durations[component], self._limits
        if saves or len(durations) < limits.known:
            return limits.unknown_s
        return max(limits.least_s, limits.factor * statistics.median(durations))

    def slow_stage(self, stages: int) -> tuple[int, float] | None:
        """The slowest of the stages 0..stages-1 and how many times slower than the others it is, if `SLOW_FACTOR` times."""
        if stages < 2 or any(len(self._durations[k]) < self._limits.known for k in range(stages)):
            return None
        usual = [max(1e-9, statistics.median(self._durations[k])) for k in range(stages)]
        slowest = max(range(stages), key=usual.__getitem__)
        ratio = usual[slowest] / statistics.median(usual[:slowest] + usual[slowest + 1 :])
        return (slowest, ratio) if ratio >= SLOW_FACTOR else None

    def usual_s(self, component: int) -> float | None:
        """The median of its last micro-batches, None if there are none."""
        durations = self._durations[component]
        return statistics.median(durations) if durations else None

    def hung_for(self, micro_batch: object, component: int, saves: bool = False) -> float | None:
        """Look at the component that `micro_batch` waits for. Returns the seconds of its work if they exceed the limit."""
        now = self._clock()
        gap, self._looked_at = now - self._looked_at, now
        if self._awaited != (micro_batch, component):
            self._awaited, self._waited_s = (micro_batch, component), 0.0
            return None
        if gap <= self._limits.pause_s:
            self._waited_s += gap
        return self._waited_s if self._waited_s > self.limit_s(component, saves) else None
