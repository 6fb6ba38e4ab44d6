"""What Tune's events mean: a hand-made trial goes through its life."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.search import controller as controller_module
from bim.orchestrator.search.controller import SearchController, SearchSpec, grace_period
from bim.orchestrator.search.results import SearchResult, TrialRow, load_result
from bim.orchestrator.search.trial import TrialSpec
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError

BASELINE = {"mask.ratio": 0.75}


@dataclass
class Trial:
    """What is used of Tune's."""

    trial_id: str
    config: dict[str, Any]


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
    controller: SearchController
    callback: Recorder
    stop: StopRequest
    interrupts: list[str]
    out: Path


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    layout = StageLayout(((0,),), 0.0, 0.5, 0.4, 1)
    trial = TrialSpec({}, layout, "fp32", str(tmp_path / "search" / "trials"), EvalConfig(), "")
    initial = SearchResult("knn_top1", 100, 4, BASELINE)
    callback, stop, interrupts = Recorder(), StopRequest(), list[str]()
    spec = SearchSpec(load_settings([]), {}, trial, initial)
    controller = SearchController(
        spec, initial, tmp_path, callback, stop, interrupt=lambda: interrupts.append("interrupted")
    )
    return Scene(controller, callback, stop, interrupts, tmp_path)


def scored(epoch: int, score: float = 0.5) -> dict[str, Any]:
    return {"epoch": epoch, "score": score, "depths": {"2": score}, "gflops": 1.5, "images_per_s": 10.0}


def test_a_trial_is_numbered_when_it_is_first_seen_and_followed_to_its_end(scene: Scene) -> None:
    own, other = Trial("a", {"mask.ratio": "0.75"}), Trial("b", {"mask.ratio": "[0.5, 0.6]"})
    scene.controller.on_step([own, other])
    scene.controller.on_start(own)
    scene.controller.on_result(own, scored(2))
    scene.controller.on_result(own, scored(2))  # Tune tells the last result twice
    scene.controller.on_result(own, scored(4))
    scene.controller.on_complete(own)
    scene.controller.on_start(other)
    scene.controller.on_result(other, scored(2, 0.1))
    scene.controller.on_complete(other)
    assert scene.callback.events == [
        ("begin", 0, "running"), ("score 2", 0, "running"), ("score 4", 0, "running"), ("end", 0, "finished"),
        ("begin", 1, "running"), ("score 2", 1, "running"), ("end", 1, "stopped early"),
    ]  # fmt: skip
    assert [row.changes["mask.ratio"] for row in scene.controller.result.rows] == [0.75, [0.5, 0.6]]
    assert load_result(scene.out) == scene.controller.result  # at any time
    assert scene.interrupts == []


def test_infeasible_and_failed_trials_keep_their_reason_and_do_not_end_the_search(scene: Scene) -> None:
    trials = [Trial(name, {"mask.ratio": str(0.1 * n)}) for n, name in enumerate("abcd", 1)]
    scene.controller.on_step(trials)
    for trial in trials[1:]:
        scene.controller.on_start(trial)
    scene.controller.on_result(trials[1], {"infeasible": "nothing is visible"})
    scene.controller.on_complete(trials[1])
    scene.controller.on_result(trials[2], {"failed": "the loss is not finite"})
    scene.controller.on_error(trials[2])
    scene.controller.on_error(trials[3])
    rows = scene.controller.result.rows[1:]
    assert [(row.status, row.status_reason) for row in rows] == [
        ("infeasible", "nothing is visible"),
        ("failed", "the loss is not finite"),
        ("failed", "its process died, possibly out of memory"),
    ]
    assert scene.controller.error is None


def test_a_trial_that_died_is_told_and_begins_again(scene: Scene) -> None:
    trial = Trial("a", {"mask.ratio": "0.75"})
    scene.controller.on_start(trial)
    scene.controller.on_result(trial, scored(2))
    scene.controller.on_retry(trial)
    scene.controller.on_start(trial)
    scene.controller.on_result(trial, scored(4))
    scene.controller.on_complete(trial)
    died = "again: its process died, possibly out of memory"
    assert scene.callback.events == [
        ("begin", 0, "running"), ("score 2", 0, "running"), (died, 0, "failed"),
        ("begin", 0, "running"), ("score 4", 0, "running"), ("end", 0, "finished"),
    ]  # fmt: skip
    assert scene.controller.error is None
    assert scene.controller.result.rows[0].status_reason == "trained for all 4 epochs"


@pytest.mark.parametrize(
    "report", [{"failed": "the loss is not finite"}, {"infeasible": "nothing is visible"}]
)
def test_without_trial_0_there_is_nothing_to_compare_with(scene: Scene, report: dict[str, str]) -> None:
    own = Trial("a", {"mask.ratio": "0.75"})
    scene.controller.on_start(own)
    scene.controller.on_result(own, report)
    scene.controller.on_complete(own) if "infeasible" in report else scene.controller.on_error(own)
    assert isinstance(scene.controller.error, TrainingError)
    assert str(scene.controller.error).endswith(next(iter(report.values())))
    scene.controller.on_step([own])
    scene.controller.on_step([own])
    assert scene.interrupts == ["interrupted"]  # once


def test_a_signal_ends_the_search_at_the_next_step(scene: Scene) -> None:
    scene.controller.on_step([])
    assert scene.interrupts == []
    scene.stop.reason = "SIGTERM"
    scene.controller.on_step([])
    assert scene.interrupts == ["interrupted"]
    assert scene.controller.error is None


def test_a_cluster_without_room_for_a_trial_is_not_waited_for_without_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "PLACEMENT_TIMEOUT_S", 0.0)
    time.sleep(0.01)
    scene.controller.on_step([])
    assert isinstance(scene.controller.error, PlacementError)
    assert "a placement group of 1 x {CPU: 0.5, GPU: 0} is not available" in str(scene.controller.error)
    assert scene.interrupts == ["interrupted"]


def test_trials_that_the_record_knows_as_completed_are_reported_and_failed_ones_may_be_retried(
    scene: Scene,
) -> None:
    trials = [Trial(name, {"mask.ratio": str(0.1 * n)}) for n, name in enumerate("abc", 1)]
    for trial in trials:
        scene.controller.on_start(trial)
    scene.controller.on_result(trials[0], scored(4))
    scene.controller.on_complete(trials[0])
    scene.controller.on_result(trials[1], {"infeasible": "so"})
    scene.controller.on_complete(trials[1])
    scene.controller.on_error(trials[2])
    completed = scene.controller.completed_trials()
    assert completed["b"] == {"infeasible": "so"}
    assert completed["a"]["epoch"] == 4
    assert "c" not in completed


@pytest.mark.parametrize(("grace", "every", "soonest"), [(1, 1, 1), (1, 5, 5), (4, 2, 4), (9, 1, 6)], ids=str)
def test_no_trial_is_stopped_before_its_first_score(grace: int, every: int, soonest: int) -> None:
    changes = {"search.trials": 2, "search.grace_epochs": grace, "search.every_epochs": every}
    assert grace_period(with_changes(load_settings([]), changes), epochs=6) == soonest


@pytest.mark.parametrize(("epochs", "warmup", "soonest"), [(6, 2, 3), (7, 0.5, 4), (6, 4.5, 5), (1, 0, 1)])
def test_where_nothing_is_said_a_trial_has_half_of_its_epochs_and_its_warm_up(
    epochs: int, warmup: float, soonest: int
) -> None:
    changes = {"search.trials": 2, "search.grace_epochs": None, "schedule.warmup_epochs": warmup}
    assert (
        grace_period(with_changes(load_settings([]), {**changes, "search.every_epochs": 1}), epochs)
        == soonest
    )
