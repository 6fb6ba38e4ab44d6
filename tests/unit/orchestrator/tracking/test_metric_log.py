"""The file of metrics, and what of it a store has received."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.files import StorageError
from bim.orchestrator.tracking.metric_log import BATCH, MetricLog
from bim.orchestrator.tracking.records import MetricPoint


class Store:
    """Takes points, unless it is unavailable."""

    def __init__(self) -> None:
        self.points: list[MetricPoint] = []
        self.unavailable = False
        self.calls = 0

    def __call__(self, points: Sequence[MetricPoint]) -> None:
        self.calls += 1
        if self.unavailable:
            raise ConnectionError("connection refused\nand a long story")
        assert len(points) <= BATCH
        self.points += points

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(p.step, p.value) for p in self.points if p.name == name]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def metrics(tmp_path: Path) -> MetricLog:
    return MetricLog(tmp_path / "run" / "metrics.jsonl")


def test_every_point_arrives_once_and_in_order(metrics: MetricLog, store: Store) -> None:
    for step in range(3):
        metrics.append(step, {"a/loss": step / 2, "b": 1})
    assert metrics.deliver(store) == 6
    metrics.append(3, {"a/loss": 9.0})
    assert metrics.deliver(store) == 1
    assert metrics.deliver(store) == 0
    assert store.series("a/loss") == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]


def test_deliveries_stay_below_the_stores_limit(metrics: MetricLog, store: Store) -> None:
    for step in range(150):
        metrics.append(step, {f"m{i}": i for i in range(20)})
    assert metrics.deliver(store) == 3000
    assert store.calls == 3


def test_nothing_is_lost_while_the_store_is_unavailable(metrics: MetricLog, store: Store) -> None:
    metrics.append(0, {"loss": 1.0})
    store.unavailable = True
    for step in (1, 2):
        metrics.append(step, {"loss": 1.0})
        with pytest.raises(ConnectionError):
            metrics.deliver(store)
    store.unavailable = False
    metrics.deliver(store)
    assert [step for step, _ in store.series("loss")] == [0, 1, 2]


def test_a_rewound_step_is_written_again_but_not_sent_twice(metrics: MetricLog, store: Store) -> None:
    for step in range(5):
        metrics.append(step, {"loss": float(step)})
    metrics.deliver(store)
    metrics.rewind(2)
    for step in range(3, 7):
        metrics.append(step, {"loss": float(step)})
    metrics.deliver(store)
    assert [step for step, _ in store.series("loss")] == list(range(7))
    assert [step for step, _ in metrics.history("loss")] == list(range(7))


def test_a_second_training_behind_the_first_is_rewound_by_its_prefix(metrics: MetricLog) -> None:
    for step in range(1, 5):
        metrics.append(step, {"loss": float(step)})
    for step in range(1, 5):
        metrics.append(step, {"mae/loss": float(step)})
    metrics.rewind(4)  # the first training is complete
    metrics.rewind(2, "mae/")
    assert [step for step, _ in metrics.history("loss")] == [1, 2, 3, 4]
    assert [step for step, _ in metrics.history("mae/loss")] == [1, 2]


def test_of_a_step_written_twice_the_last_value_counts(metrics: MetricLog) -> None:
    for step, value in ((1, 1.0), (2, 2.0), (2, 2.5), (3, 3.0)):
        metrics.append(step, {"loss": value})
    assert metrics.history("loss") == [(1, 1.0), (2, 2.5), (3, 3.0)]


def test_a_rewind_while_a_batch_is_under_way_is_honored(metrics: MetricLog, store: Store) -> None:
    for step in range(5):
        metrics.append(step, {"loss": float(step)})

    def slow(points: Sequence[MetricPoint]) -> None:
        if not store.points:
            metrics.rewind(1)
            metrics.append(2, {"loss": 2.0, "new": 1.0})
        store(points)

    metrics.deliver(slow)
    assert [step for step, _ in store.series("loss")] == [0, 1, 2, 3, 4]
    assert store.series("new") == [(2, 1.0)]


def test_another_process_goes_on_where_the_store_stands(metrics: MetricLog, store: Store) -> None:
    for step in range(4):
        metrics.append(step, {"loss": float(step)})
    metrics.deliver(store)
    for step in (4, 5):
        metrics.append(step, {"loss": float(step)})  # and then the process died
    again = MetricLog(metrics.path, same_store=True)
    again.rewind(2)
    for step in (3, 4, 5):
        again.append(step, {"loss": float(step)})
    again.deliver(store)
    assert [step for step, _ in store.series("loss")] == [0, 1, 2, 3, 4, 5]


def test_another_store_receives_everything(metrics: MetricLog, store: Store) -> None:
    metrics.append(0, {"loss": 1.0})
    metrics.deliver(Store())
    for _ in range(2):
        MetricLog(metrics.path).deliver(store)
    assert store.series("loss") == [(0, 1.0), (0, 1.0)]


def test_what_arrived_before_a_failure_is_remembered(metrics: MetricLog, store: Store) -> None:
    for step in range(150):
        metrics.append(step, {f"m{i}": i for i in range(20)})

    def breaks(points: Sequence[MetricPoint]) -> None:
        store.unavailable = store.calls == 1
        store(points)

    with pytest.raises(ConnectionError):
        metrics.deliver(breaks)
    store.unavailable = False
    MetricLog(metrics.path, same_store=True).deliver(store)
    assert [step for step, _ in store.series("m7")] == list(range(150))


def test_a_broken_record_of_what_was_sent_is_ignored(metrics: MetricLog, store: Store) -> None:
    metrics.append(0, {"loss": 1.0})
    metrics.path.with_name("metrics.sent.json").write_text("[")
    assert MetricLog(metrics.path, same_store=True).deliver(store) == 1


def test_a_line_cut_short_by_a_kill_is_dropped(metrics: MetricLog) -> None:
    metrics.append(0, {"loss": 1.0})
    with metrics.path.open("a") as file:
        file.write('{"step": 1, "ti')
    again = MetricLog(metrics.path)
    again.append(1, {"loss": 2.0})
    assert again.history("loss") == [(0, 1.0), (1, 2.0)]


def test_infinities_are_kept_in_valid_json(metrics: MetricLog, store: Store) -> None:
    metrics.append(0, {"a": math.nan, "b": -math.inf, "c": 1})
    row = json.loads(metrics.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["a"], row["b"], row["c"]) == ("nan", "-inf", 1.0)
    metrics.deliver(store)
    assert math.isnan(store.series("a")[0][1])
    assert store.series("b") == [(0, -math.inf)]


def test_what_cannot_be_written_is_logged_once_and_never_raised(
    metrics: MetricLog, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.append(0, {"loss": "high"})  # type: ignore[dict-item]
    metrics.path.unlink()
    metrics.path.parent.rmdir()
    metrics.append(1, {"loss": 1.0})
    assert len(caplog.records) == 1


def test_a_full_disk_tears_no_line_and_loses_none(
    metrics: MetricLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.append(0, {"a": 0.0})
    before = metrics.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", half_written)
        for step in (1, 2, 3):
            metrics.append(step, {"a": float(step)})
        assert metrics.path.read_bytes() == before
    assert len(caplog.messages) == 1
    assert "could not be written" in caplog.text
    assert "No space left on device" in caplog.text
    metrics.append(4, {"a": 4.0})
    assert metrics.history("a") == [(step, float(step)) for step in range(5)]


def half_written(path: Path, mode: str, buffering: int = -1) -> Any:
    """`open` on a disk that takes the first half of what is written."""

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[: len(data) // 2])

    return Full(path, mode.replace("b", ""))


def test_metrics_that_were_not_written_are_void_after_a_rewind(
    metrics: MetricLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics.append(1, {"a": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", half_written)
        metrics.append(2, {"a": -2.0})
    metrics.rewind(1)
    metrics.append(2, {"a": 2.0})
    assert metrics.history("a") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize(
    "content",
    [b"\x00\xff", b"[]", b"null", b"3", b'{"step": null}', b'{"step": Infinity}', b'{"step": 1, "a": {}}'],
)
def test_files_of_any_content_are_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content + b"\n")
    (tmp_path / "metrics.sent.json").write_bytes(b'{"a": ' + content + b"}")
    metrics = MetricLog(tmp_path / "metrics.jsonl", same_store=True)
    metrics.append(5, {"a": 5.0})
    assert metrics.history("a") == [(5, 5.0)]
    assert metrics.deliver(lambda points: None) == 1
    metrics.rewind(4)
    assert metrics.history("a") == []


def test_a_directory_in_the_place_of_the_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics.jsonl cannot be read \(Is a directory\)"):
        MetricLog(tmp_path / "metrics.jsonl")


def test_a_history_whose_directory_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    metrics = MetricLog(tmp_path / "run" / "metrics.jsonl")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    for read in (lambda: metrics.history("a"), lambda: metrics.rewind(0)):
        with pytest.raises(StorageError, match="was its folder renamed, removed or unmounted"):
            read()
