"""What Tune's events mean: a hand-made trial goes through its life."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.runs.lease import LeaseLostError
from bim.orchestrator.search import controller as controller_module
from bim.orchestrator.search.controller import SearchController, epochs_of_trials, grace_period
from bim.orchestrator.search.record import load_result
from bim.orchestrator.search.results import SearchResult, TrialRow, best_line
from bim.orchestrator.search.spec import SearchSpec, TrialSpec
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError

BASELINE = {"mask.ratio": 0.75}


class Recorder:
    """A callback that keeps the events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, str]] = []

    def on_begin(self, result: SearchResult, row: TrialRow) -> None:
        self.events.append(("begin", row.number, row.status))

    def on_score(self, result: SearchResult, row: TrialRow) -> None:
        self.events.append((f"score {row.epoch}", row.number, row.status))

    def on_retry(self, result: SearchResult, row: TrialRow) -> None:
        self.events.append((f"again: {row.status_reason}", row.number, row.status))

    def on_end(self, result: SearchResult, row: TrialRow) -> None:
        self.events.append(("end", row.number, row.status))


@dataclass
class Scene:
    """A search of three trials in a temporary folder, driven by hand as Tune drives it."""

    out: Path
    trials: int = 3
    callback: Recorder = field(default_factory=Recorder)
    stop: StopRequest = field(default_factory=StopRequest)
    lease: Any = None

    def start(self) -> SearchController:
        """The controller of a process that starts the search, or continues it from its record."""
        self.out.mkdir(exist_ok=True)
        layout = StageLayout(((0,),), 0.0, 0.5, 0.4, 1)
        trial = TrialSpec({}, layout, "fp32", str(self.out / "search" / "trials"), EvalConfig(), "")
        initial = load_result(self.out) or SearchResult("knn_top1", 100, 4, BASELINE)
        changes = {"search.grace_epochs": 2, "search.every_epochs": 1}
        spec = SearchSpec(with_changes(load_settings([]), changes), {}, trial, initial)

        def propose(result: SearchResult) -> dict[str, Any] | None:
            number = len(result.rows)
            return {"mask.ratio": 0.75 - number / 10} if number < self.trials else None

        return SearchController(spec, propose, self.out, self.callback, self.stop, self.lease)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def scored(epoch: int, score: float = 0.5) -> dict[str, Any]:
    return {"epoch": epoch, "score": score, "depths": {"2": score}, "gflops": 1.5, "images_per_s": 10.0}


def begun(controller: SearchController) -> int:
    """The number of the next trial, which is started."""
    row = controller.next_trial()
    assert row is not None
    controller.on_start(row.number)
    return row.number


def test_a_trial_is_followed_from_its_proposal_to_its_end(scene: Scene) -> None:
    controller = scene.start()
    baseline = begun(controller)
    assert not controller.on_report(baseline, scored(2))
    assert not controller.on_report(baseline, scored(2))  # Tune passes the last report twice
    assert not controller.on_report(baseline, scored(4))
    controller.on_complete(baseline)
    other = begun(controller)
    assert controller.on_report(other, scored(2, 0.1))
    controller.on_complete(other)
    assert scene.callback.events == [
        ("begin", 0, "running"), ("score 2", 0, "running"), ("score 4", 0, "finished"), ("end", 0, "finished"),
        ("begin", 1, "running"), ("score 2", 1, "stopped early"), ("end", 1, "stopped early"),
    ]  # fmt: skip
    assert controller.result.rows[1].status_reason == "by ASHA: below the median at rung 2"
    assert load_result(scene.out) == controller.result  # at any time


def test_there_are_as_many_trials_as_are_proposed(scene: Scene) -> None:
    controller = scene.start()
    assert [begun(controller) for _ in range(3)] == [0, 1, 2]
    assert controller.next_trial() is None


def test_infeasible_and_failed_trials_keep_their_reason_and_do_not_end_the_search(scene: Scene) -> None:
    scene.trials = 4
    controller = scene.start()
    numbers = [begun(controller) for _ in range(4)]
    controller.on_report(numbers[1], {"infeasible": "nothing is visible"})
    controller.on_complete(numbers[1])
    controller.on_report(numbers[2], {"failed": "the loss is not finite"})
    controller.on_error(numbers[2], "its process died")
    controller.on_error(numbers[3], "its process died")
    assert [(row.status, row.status_reason) for row in controller.result.rows[1:]] == [
        ("infeasible", "nothing is visible"),
        ("failed", "the loss is not finite"),
        ("failed", "its process died"),
    ]
    assert not controller.should_stop()


def test_a_trial_that_died_is_told_and_begins_again(scene: Scene) -> None:
    controller = scene.start()
    number = begun(controller)
    controller.on_report(number, scored(2))
    controller.on_retry(number, "its process died")
    controller.on_start(number)
    controller.on_report(number, scored(4))
    controller.on_complete(number)
    assert scene.callback.events == [
        ("begin", 0, "running"), ("score 2", 0, "running"), ("again: its process died", 0, "failed"),
        ("begin", 0, "running"), ("score 4", 0, "finished"), ("end", 0, "finished"),
    ]  # fmt: skip
    assert controller.result.rows[0].status_reason == "trained for all 4 epochs"


@pytest.mark.parametrize(
    "report", [{"failed": "the loss is not finite"}, {"infeasible": "nothing is visible"}]
)
def test_without_trial_0_the_search_goes_on(scene: Scene, report: dict[str, str]) -> None:
    controller = scene.start()
    baseline, other = begun(controller), begun(controller)
    controller.on_report(baseline, report)
    controller.on_complete(baseline) if "infeasible" in report else controller.on_error(baseline, "")
    controller.on_report(other, scored(4))
    controller.on_complete(other)
    assert not controller.should_stop()
    result = controller.finish()
    assert result.finished
    assert result.best.number == 1
    assert best_line(result).startswith("best: trial 1, mask.ratio 0.65: kNN top-1 0.500 (")


def test_a_search_of_which_every_trial_fails_ends_with_the_cause_and_can_be_tried_again(scene: Scene) -> None:
    controller = scene.start()
    for _ in range(3):
        number = begun(controller)
        controller.on_report(number, {"failed": f"cause {number}"})
        controller.on_error(number, "")
    with pytest.raises(
        TrainingError, match=r"no trial .* trial 0, the baseline config: failed, cause 0; --resume"
    ):
        controller.finish()
    again = scene.start()
    assert [begun(again) for _ in range(3)] == [0, 1, 2]


def test_a_signal_ends_the_search_and_leaves_its_trials_to_be_continued(scene: Scene) -> None:
    controller = scene.start()
    numbers = [begun(controller), begun(controller)]
    controller.on_report(numbers[0], scored(2))
    assert not controller.should_stop()
    scene.stop.reason = "SIGTERM"
    assert controller.should_stop()
    controller.on_complete(numbers[0])  # Tune ends its trials
    controller.on_error(numbers[1], "its process died")
    assert not controller.finish().finished
    assert [row.status for row in controller.result.rows] == ["running", "running"]
    scene.stop.reason = None
    again = scene.start()
    assert [begun(again) for _ in range(3)] == [0, 1, 2]
    assert again.result.rows[0].epoch == 2


def test_a_cluster_without_room_for_a_trial_is_not_waited_for_without_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "PLACEMENT_TIMEOUT_S", -1.0)
    controller = scene.start()
    controller.next_trial()
    assert controller.should_stop()
    with pytest.raises(
        PlacementError, match=r"a placement group of 1 x \{CPU: 0.5, GPU: 0\} is not available"
    ):
        controller.finish()


def test_a_record_that_cannot_be_written_ends_the_search_in_a_sentence(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = scene.start()
    number = begun(controller)

    def full(out: Path, result: SearchResult) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(controller_module, "save_result", full)
    controller.on_report(number, scored(2))
    assert controller.should_stop()
    with pytest.raises(TrainingError, match=r"trials.json cannot be written \(No space left on device\)"):
        controller.finish()


SCORES = {0: [0.3, 0.5, 0.5, 0.6], 1: [0.3, 0.2, 0.9, 0.9], 2: [0.4, 0.6, 0.7, 0.5]}


def drive(controller: SearchController, events: Iterator[int]) -> None:
    """Run trials one after the other on the scores of `SCORES`. Raises StopIteration when there are no more events."""
    while (row := controller.next_trial()) is not None:
        next(events)
        number = row.number
        controller.on_start(number)
        # A trial continues from its last checkpoint, whose score it reports again.
        for epoch in range(max(row.epoch, 1), 5):
            next(events)
            if controller.on_report(number, scored(epoch, SCORES[number][epoch - 1])):
                break
        next(events)
        controller.on_complete(number)


def test_a_search_that_is_killed_at_any_moment_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    whole = Scene(tmp_path / "whole")
    events = iter(range(1000))
    controller = whole.start()
    drive(controller, events)
    expected, num_events = controller.finish(), next(events)
    assert [row.status for row in expected.rows] == ["finished", "stopped early", "finished"]
    assert num_events > 12
    for moment in range(num_events):
        scene = Scene(tmp_path / str(moment))
        with contextlib.suppress(StopIteration):
            drive(scene.start(), iter(range(moment)))
        again = scene.start()
        drive(again, iter(range(1000)))
        assert again.finish() == expected, moment
        scores = [event for event in scene.callback.events if event[0].startswith("score")]
        assert len(set(scores)) == len(scores)


def test_the_checkpoints_of_a_trial_go_when_it_has_ended(scene: Scene) -> None:
    controller = scene.start()
    folders = [scene.out / "search" / "trials" / str(number) for number in range(2)]
    for folder in folders:
        folder.mkdir(parents=True)
    for number in (begun(controller), begun(controller)):
        controller.on_report(number, scored(4))
    controller.on_complete(0)
    assert [folder.exists() for folder in folders] == [False, True]
    scene.start()  # the process was killed before it removed the other one
    assert not folders[1].exists()


@pytest.mark.parametrize(("grace", "every", "soonest"), [(1, 1, 1), (1, 5, 5), (4, 2, 4), (9, 1, 6)], ids=str)
def test_no_trial_is_stopped_before_its_first_score(grace: int, every: int, soonest: int) -> None:
    changes = {"search.trials": 2, "search.grace_epochs": grace, "search.every_epochs": every}
    assert grace_period(with_changes(load_settings([]), changes), epochs=6) == soonest


@pytest.mark.parametrize(("epochs", "warmup", "soonest"), [(6, 2, 3), (7, 0.5, 4), (6, 4.5, 5), (1, 0, 1)])
def test_where_nothing_is_said_a_trial_has_half_of_its_epochs_and_its_warm_up(
    epochs: int, warmup: float, soonest: int
) -> None:
    changes = {"search.trials": 2, "search.grace_epochs": None, "search.every_epochs": 1}
    schedule = {
        "schedule.epochs": 10 * epochs,
        "schedule.warmup_epochs": 10 * warmup,
    }  # ten times those of a trial
    assert grace_period(with_changes(load_settings([]), {**changes, **schedule}), epochs) == soonest


def test_the_epochs_of_a_search_with_half_of_its_trials_ended_early_and_with_none() -> None:
    changes = {"schedule.epochs": 800, "search.trials": 16, "search.trial_epochs": 40}
    settings = with_changes(load_settings([]), {**changes, "search.grace_epochs": 10})
    assert epochs_of_trials(settings) == (400, 640)


def test_a_search_whose_directory_another_process_took_over_ends_and_writes_nothing_more(
    scene: Scene,
) -> None:
    class LostLease:
        lost = False

        def raise_if_lost(self) -> None:
            if self.lost:
                raise LeaseLostError("taken over by process 7")

    scene.lease = LostLease()
    controller = scene.start()
    number = begun(controller)
    checkpoint = scene.out / "search" / "trials" / str(number) / "checkpoints"
    checkpoint.mkdir(parents=True)
    before = load_result(scene.out)
    scene.lease.lost = True
    controller.on_report(number, scored(4))
    controller.on_complete(number)
    assert controller.should_stop()
    assert load_result(scene.out) == before
    assert checkpoint.exists()
    with pytest.raises(LeaseLostError, match="taken over by process 7"):
        controller.finish()
