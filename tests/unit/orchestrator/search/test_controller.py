"""What Tune's events mean: a hand-made trial goes through its life."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.search import controller as search_watch
from bim.orchestrator.search.controller import SearchController, SearchSpec, grace_of
from bim.orchestrator.search.objective import ObjectiveSpec
from bim.orchestrator.search.results import SearchResult, TrialRow, load_result
from bim.orchestrator.search.trial import TrialSpec
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError

OWN = {"mask.ratio": 0.75}


@dataclass
class Trial:
    """What is used of Tune's."""

    trial_id: str
    config: dict[str, Any]


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, str]] = []

    def on_begin(self, result: SearchResult, row: TrialRow) -> None:
        self.events.append(("begin", row.number, row.status))

    def on_score(self, result: SearchResult, row: TrialRow) -> None:
        self.events.append((f"score {row.epoch}", row.number, row.status))

    def on_retry(self, result: SearchResult, row: TrialRow) -> None:
        self.events.append((f"again: {row.why}", row.number, row.status))

    def on_end(self, result: SearchResult, row: TrialRow) -> None:
        self.events.append(("end", row.number, row.status))


@dataclass
class Scene:
    watch: SearchController
    heard: Heard
    stop: StopRequest
    ended: list[str]
    out: Path


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    layout = StageLayout(((0,),), 0.0, 0.5, 0.4, 1)
    plan = TrialSpec({}, layout, "fp32", str(tmp_path / "search" / "trials"), ObjectiveSpec(), "")
    empty = SearchResult("knn_top1", 100, 4, OWN)
    heard, stop, ended = Heard(), StopRequest(), list[str]()
    spec = SearchSpec(load_settings([]), {}, plan, empty)
    watch = SearchController(spec, tmp_path, heard, stop, end=lambda: ended.append("ended"))
    return Scene(watch, heard, stop, ended, tmp_path)


def scored(epoch: int, score: float = 0.5) -> dict[str, Any]:
    return {"epoch": epoch, "score": score, "depths": {"2": score}, "gflops": 1.5, "images_per_s": 10.0}


def test_a_trial_is_numbered_when_it_is_first_seen_and_followed_to_its_end(scene: Scene) -> None:
    own, other = Trial("a", {"mask.ratio": "0.75"}), Trial("b", {"mask.ratio": "[0.5, 0.6]"})
    scene.watch.on_step([own, other])
    scene.watch.on_start(own)
    scene.watch.on_result(own, scored(2))
    scene.watch.on_result(own, scored(2))  # Tune tells the last result twice
    scene.watch.on_result(own, scored(4))
    scene.watch.on_complete(own)
    scene.watch.on_start(other)
    scene.watch.on_result(other, scored(2, 0.1))
    scene.watch.on_complete(other)
    assert scene.heard.events == [
        ("begin", 0, "running"), ("score 2", 0, "running"), ("score 4", 0, "running"), ("end", 0, "finished"),
        ("begin", 1, "running"), ("score 2", 1, "running"), ("end", 1, "stopped early"),
    ]  # fmt: skip
    assert [row.changes["mask.ratio"] for row in scene.watch.result.rows] == [0.75, [0.5, 0.6]]
    assert load_result(scene.out) == scene.watch.result  # at any time
    assert scene.ended == []


def test_infeasible_and_failed_trials_keep_their_reason_and_do_not_end_the_search(scene: Scene) -> None:
    trials = [Trial(name, {"mask.ratio": str(0.1 * n)}) for n, name in enumerate("abcd", 1)]
    scene.watch.on_step(trials)
    for trial in trials[1:]:
        scene.watch.on_start(trial)
    scene.watch.on_result(trials[1], {"infeasible": "nothing is visible"})
    scene.watch.on_complete(trials[1])
    scene.watch.on_result(trials[2], {"failed": "the loss is not finite"})
    scene.watch.on_error(trials[2])
    scene.watch.on_error(trials[3])
    rows = scene.watch.result.rows[1:]
    assert [(row.status, row.why) for row in rows] == [
        ("infeasible", "nothing is visible"),
        ("failed", "the loss is not finite"),
        ("failed", "its process died, perhaps for want of memory"),
    ]
    assert scene.watch.error is None


def test_a_trial_that_died_is_told_and_begins_again(scene: Scene) -> None:
    trial = Trial("a", {"mask.ratio": "0.75"})
    scene.watch.on_start(trial)
    scene.watch.on_result(trial, scored(2))
    scene.watch.on_retry(trial)
    scene.watch.on_start(trial)
    scene.watch.on_result(trial, scored(4))
    scene.watch.on_complete(trial)
    died = "again: its process died, perhaps for want of memory"
    assert scene.heard.events == [
        ("begin", 0, "running"), ("score 2", 0, "running"), (died, 0, "failed"),
        ("begin", 0, "running"), ("score 4", 0, "running"), ("end", 0, "finished"),
    ]  # fmt: skip
    assert scene.watch.error is None
    assert scene.watch.result.rows[0].why == "trained for all 4 epochs"


@pytest.mark.parametrize(
    "report", [{"failed": "the loss is not finite"}, {"infeasible": "nothing is visible"}]
)
def test_without_trial_0_there_is_nothing_to_compare_with(scene: Scene, report: dict[str, str]) -> None:
    own = Trial("a", {"mask.ratio": "0.75"})
    scene.watch.on_start(own)
    scene.watch.on_result(own, report)
    scene.watch.on_complete(own) if "infeasible" in report else scene.watch.on_error(own)
    assert isinstance(scene.watch.error, TrainingError)
    assert str(scene.watch.error).endswith(next(iter(report.values())))
    scene.watch.on_step([own])
    scene.watch.on_step([own])
    assert scene.ended == ["ended"]  # once


def test_a_signal_ends_the_search_at_the_next_step(scene: Scene) -> None:
    scene.watch.on_step([])
    assert scene.ended == []
    scene.stop.reason = "SIGTERM"
    scene.watch.on_step([])
    assert scene.ended == ["ended"]
    assert scene.watch.error is None


def test_a_cluster_without_room_for_a_trial_is_not_waited_for_without_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_watch, "PLACEMENT_TIMEOUT_S", -1.0)
    scene.watch._began -= 1
    scene.watch.on_step([])
    assert isinstance(scene.watch.error, PlacementError)
    assert "1 stages of 0.5 CPU" in str(scene.watch.error) or "no room for a trial" in str(scene.watch.error)
    assert scene.ended == ["ended"]


def test_what_is_over_by_our_record_is_settled_and_failures_may_be_tried_again(scene: Scene) -> None:
    trials = [Trial(name, {"mask.ratio": str(0.1 * n)}) for n, name in enumerate("abc", 1)]
    for trial in trials:
        scene.watch.on_start(trial)
    scene.watch.on_result(trials[0], scored(4))
    scene.watch.on_complete(trials[0])
    scene.watch.on_result(trials[1], {"infeasible": "so"})
    scene.watch.on_complete(trials[1])
    scene.watch.on_error(trials[2])
    settled = scene.watch.settled()
    assert settled["b"] == {"infeasible": "so"}
    assert settled["a"]["epoch"] == 4
    assert "c" not in settled


@pytest.mark.parametrize(("grace", "every", "soonest"), [(1, 1, 1), (1, 5, 5), (4, 2, 4), (9, 1, 6)], ids=str)
def test_no_trial_is_stopped_before_its_first_score(grace: int, every: int, soonest: int) -> None:
    changes = {"search.trials": 2, "search.grace_epochs": grace, "search.every_epochs": every}
    assert grace_of(with_changes(load_settings([]), changes), epochs=6) == soonest


@pytest.mark.parametrize(("epochs", "warmup", "soonest"), [(6, 2, 3), (7, 0.5, 4), (6, 4.5, 5), (1, 0, 1)])
def test_where_nothing_is_said_a_trial_has_half_of_its_epochs_and_its_warm_up(
    epochs: int, warmup: float, soonest: int
) -> None:
    changes = {"search.trials": 2, "search.grace_epochs": None, "schedule.warmup_epochs": warmup}
    assert grace_of(with_changes(load_settings([]), {**changes, "search.every_epochs": 1}), epochs) == soonest
