"""The metric log under any order of appends, rewinds, deliveries, outages and kills, against a plain list."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bim.orchestrator.tracking.metric_log import MetricLog
from bim.orchestrator.tracking.records import MetricPoint

NAMES = st.sampled_from(["loss", "mae/loss"])


class MetricLogMachine(RuleBasedStateMachine):
    """`rows` holds what the file must, (step, name); `received` what the store got, by name.

    The value of a step is a function of the step, as in a training that is repeated bit for bit.
    """

    @initialize()
    def create(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.batch = patch("bim.orchestrator.tracking.metric_log.BATCH", 3)
        self.batch.start()
        self.path = Path(self.folder.name) / "metrics.jsonl"
        self.log = MetricLog(self.path)
        self.rows: list[tuple[int, str]] = []
        self.received: dict[str, list[tuple[int, float]]] = {"loss": [], "mae/loss": []}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.log.deliver(self.receive)
            for name, points in self.received.items():
                assert set(self.written(name)) <= set(points)
            self.batch.stop()
            self.folder.cleanup()

    def receive(self, points: Sequence[MetricPoint]) -> None:
        for point in points:
            self.received[point.name].append((point.step, point.value))

    def written(self, name: str) -> list[tuple[int, float]]:
        return [(step, step / 2) for step, other in self.rows if other == name]

    @rule(name=NAMES, count=st.integers(1, 8))
    def append(self, name: str, count: int) -> None:
        first = 1 + max((step for step, other in self.rows if other == name), default=-1)
        for step in range(first, first + count):
            self.log.append(step, {name: step / 2})
            self.rows.append((step, name))

    @rule(step=st.integers(0, 20), prefix=st.sampled_from(["", "mae/"]))
    def rewind(self, step: int, prefix: str) -> None:
        self.log.rewind(step, prefix)
        later = (i for i, (s, name) in enumerate(self.rows) if s > step and name.startswith(prefix))
        del self.rows[next(later, len(self.rows)) :]

    @rule()
    def deliver(self) -> None:
        self.log.deliver(self.receive)
        assert self.log.deliver(self.receive) == 0

    @rule(batches=st.integers(0, 3))
    def deliver_until_an_outage(self, batches: int) -> None:
        left = batches

        def send(points: Sequence[MetricPoint]) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise ConnectionError
            self.receive(points)

        try:
            self.log.deliver(send)
        except ConnectionError:
            assert left < 0

    @rule(cut=st.integers(1, 15))
    def kill_while_appending(self, cut: int) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": 99, "time": 1.0, "loss": 0.0})[:cut])
        self.log = MetricLog(self.path, same_store=True)

    @invariant()
    def the_file_equals_the_list(self) -> None:
        if hasattr(self, "folder"):
            for name in self.received:
                assert self.log.history(name) == self.written(name)

    @invariant()
    def no_step_is_sent_twice_or_out_of_order(self) -> None:
        if hasattr(self, "folder"):
            for points in self.received.values():
                assert points == sorted(set(points))


MetricLogMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestAnyOrderOfEvents = MetricLogMachine.TestCase
