from __future__ import annotations

from typing import Any

from bim.orchestrator.data.phases import constant
from bim.orchestrator.training.checkpoint_marks import CheckpointMarks
from bim.orchestrator.training.manifest import FileRecord
from bim.orchestrator.training.messages import SavedBlocks
from bim.orchestrator.training.schedule import TrainingSchedule

NOTHING: tuple[SavedBlocks, ...] = ()


def schedule(**changes: Any) -> TrainingSchedule:
    settings: dict[str, Any] = {"epochs": 10, "phases": constant(5, 8), "lr": lambda step: 0.1, "window": 4}
    return TrainingSchedule(
        **(settings | {"checkpoint_epochs": 4.0, "max_bad_images": 0, "checkpoint_s": 60.0} | changes)
    )


def part(checkpoint: str, name: str) -> tuple[SavedBlocks, ...]:
    return (SavedBlocks(checkpoint, (FileRecord(name, 1, 2),)),)


def test_a_step_is_saved_when_the_time_is_over_or_by_the_schedule() -> None:
    now = [0.0]
    marks = CheckpointMarks(schedule(), clock=lambda: now[0])
    assert not marks.is_due(0, 0)
    now[0] = 60.0
    assert marks.is_due(1, 0)
    marks.add(2, "two", {})
    now[0] = 200.0
    assert not marks.is_due(2, 0), "the last one is still being written"
    assert marks.is_due(19, 0), "the schedule does not wait"
    marks.add(20, "twenty", {})
    marks.complete([part("two", "a") + part("twenty", "a")])
    assert not marks.is_due(20, 0), "a checkpoint of the schedule counts too"
    now[0] = 260.0
    assert marks.is_due(21, 0)


def test_without_an_interval_only_the_schedule_counts() -> None:
    now = [0.0]
    marks = CheckpointMarks(schedule(checkpoint_s=None), clock=lambda: now[0])
    now[0] = 1e9
    assert [step for step in range(50) if marks.is_due(step, 0)] == [19, 39, 49]


def test_a_checkpoint_is_complete_once_every_stage_has_written_its_part() -> None:
    marks = CheckpointMarks(schedule())
    marks.add(4, "four", {"a.jpg": "empty"})
    marks.add(8, "eight", {})
    assert marks.complete([part("four", "b"), NOTHING]) == []
    assert marks.complete([part("eight", "b"), NOTHING]) == []
    four, eight = marks.complete([NOTHING, part("four", "a") + part("eight", "a")])
    assert (four.step, eight.step) == (4, 8)
    assert [record.name for record in four.files] == ["a", "b"]
    assert four.bad_images == {"a.jpg": "empty"}
    assert marks.complete([NOTHING, NOTHING]) == []


def test_a_request_saves_one_step_and_is_known_by_it() -> None:
    marks = CheckpointMarks(schedule(), saves_requested=2)
    assert not marks.is_due(0, 2)
    assert marks.is_due(1, 3)
    assert not marks.is_due(2, 3)
    marks.add(2, "two", {})
    (two,) = marks.complete([part("two", "a")])
    assert two.requested


def test_a_rewind_forgets_what_was_not_complete() -> None:
    marks = CheckpointMarks(schedule())
    marks.add(4, "four", {})
    marks.complete([part("four", "a"), NOTHING])
    marks.rewind()
    marks.add(4, "four", {})
    assert marks.complete([NOTHING, part("four", "b")]) == []
