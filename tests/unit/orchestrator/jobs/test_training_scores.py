"""Scores of a training beside it: one process for all, and what fails there costs a line."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.jobs import training_scores as module
from bim.orchestrator.jobs.score_depths import ScoreResult, ScoreTask, score_depths_of_one_run
from bim.orchestrator.jobs.training_scores import TrainingScores
from bim.orchestrator.runs.depth_scores import read_scores
from bim.orchestrator.runs.prepare import ResolvedRun, resolve_run
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError

SETTINGS = """--blocks 2 --data.workers 0 --data.batch_size 256 --decoder.dim 32 --decoder.num_heads 1
--backbone.model_args {img_size:\\ 16,patch_size:\\ 4,embed_dim:\\ 32,depth:\\ 2,num_heads:\\ 2}
--schedule.epochs 5 --schedule.warmup_epochs 0 --evaluation.every_epochs 1"""

LAYOUT = StageLayout(((0,), (1,)), gpus=0.0, cpus=1.0, loader_cpus=0.0, threads=1)

RESULT = ScoreResult("knn_top1", {1: 0.5, 2: 0.25}, 100, b"")

DIED = TrainingError("its process died: SIGKILL")


@dataclass
class FakeTask:
    outcome: ScoreResult | Exception
    done: bool = True
    cancelled: bool = False

    def is_done(self, timeout_s: float = 0.0) -> bool:
        return self.done

    def result(self) -> ScoreResult:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeProcess:
    """Gives out `tasks`, whether in free resources or not."""

    tasks: list[FakeTask]
    has_free_cpu: bool = True
    places: list[str] = field(default_factory=list)
    closed: int = 0

    def start_in_free_resources(self, function: Callable[..., Any], task: Any) -> FakeTask | None:
        return self._start("free") if self.has_free_cpu else None

    def start_beside_first_stage(self, function: Callable[..., Any], task: Any) -> FakeTask:
        return self._start("first stage")

    def _start(self, place: str) -> FakeTask:
        self.places.append(place)
        return self.tasks[len(self.places) - 1]

    def close(self) -> None:
        self.closed += 1


class FakeTracker:
    def log_metrics(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_depth_metrics(self, step: int, metrics: Any, series: str) -> None: ...


class FakeProgress:
    scores = ""

    def on_checkpoint(self, step: int) -> None: ...

    def on_step(self, step: int, metrics: dict[str, float]) -> None: ...


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> ResolvedRun:
    return resolve_run(load_settings(shlex.split(SETTINGS)), tmp_path_factory.mktemp("nowhere"))[0]


@dataclass
class Training:
    scores: TrainingScores
    progress: FakeProgress
    stop: StopRequest
    out: Path
    steps_per_epoch: int

    def end_epoch(self, epoch: int) -> None:
        self.scores.on_checkpoint(epoch * self.steps_per_epoch)

    @property
    def scored(self) -> list[int]:
        return [score.epoch for score in read_scores(self.out)]


@pytest.fixture
def begin(
    resolved: ResolvedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[FakeProcess], Training]:
    def begin(process: FakeProcess) -> Training:
        monkeypatch.setattr(module, "SideProcess", lambda layout, group: process)
        monkeypatch.setattr(module, "score_task", lambda *arguments: FakeScoreTask())
        monkeypatch.setattr(module, "LostNodeWatch", lambda *arguments, **options: FakeWatch())
        run, stop = replace(resolved, out=tmp_path), StopRequest()
        backbone = SimpleNamespace(lease=None, tracker=FakeTracker(), prepared=SimpleNamespace(run=run))
        group, progress = cast(Any, object()), FakeProgress()
        scores = TrainingScores(cast(Any, progress), cast(Any, backbone), run, LAYOUT, group, stop, series="")
        return Training(scores, progress, stop, tmp_path, run.phases[0].steps_per_epoch)

    return begin


@dataclass(frozen=True)
class FakeScoreTask:
    threads: int | None = None
    visible_gpus: str | None = None


class FakeWatch:
    def check(self) -> None: ...


Begin = Callable[[FakeProcess], Training]


def test_one_process_computes_all_scores_and_ends_with_the_training(begin: Begin) -> None:
    process = FakeProcess([FakeTask(RESULT) for _ in range(3)])
    training = begin(process)
    for epoch in (1, 2, 3):
        training.end_epoch(epoch)
    training.scores.finish()
    assert training.scored == [1, 2, 3]
    assert training.progress.scores == "kNN top-1 by depth 50.0, 25.0 %"
    assert process.places == ["free"] * 3
    assert not process.closed
    training.scores.close()
    assert process.closed == 1


def test_without_a_free_cpu_they_are_there_before_the_next_step(begin: Begin) -> None:
    process = FakeProcess([FakeTask(RESULT)], has_free_cpu=False)
    training = begin(process)
    training.end_epoch(1)
    assert (process.places, training.scored) == (["first stage"], [1])


def test_a_process_that_dies_costs_a_line_and_the_next_score_is_tried(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    process = FakeProcess([FakeTask(DIED), FakeTask(RESULT)])
    training = begin(process)
    with caplog.at_level(logging.WARNING, "bim"):
        training.end_epoch(1)
        training.end_epoch(2)
        training.scores.finish()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("epoch 1 cannot be scored: ")
    assert caplog.messages[0].endswith("its process died: SIGKILL; the training goes on")
    assert training.scored == [2]


def test_a_stop_cancels_the_score_that_is_being_computed(begin: Begin) -> None:
    task = FakeTask(RESULT, done=False)
    process = FakeProcess([task])
    training = begin(process)
    training.end_epoch(1)
    training.stop.reason = "SIGTERM"
    training.scores.finish()
    assert task.cancelled
    training.end_epoch(2)
    training.scores.close()
    assert (len(process.places), process.closed, training.scored) == (1, 1, [])


def test_the_process_of_the_scores_opens_the_images_once(
    resolved: ResolvedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def only_opened(task: ScoreTask, open_data: Any) -> None:
        opened.append(open_data(task.data))

    monkeypatch.setattr("bim.orchestrator.jobs.score_depths.score_depths", only_opened)
    for seed in (0, 0, 1):
        score_depths_of_one_run(cast(Any, SimpleNamespace(data=replace(resolved.data, split_seed=seed))))
    first, second, other = opened
    assert first is second
    assert other is not first
    source, splits = resolved.data.open()
    assert first[0].fingerprint() == source.fingerprint()
    assert (first[1].val == splits.val).all()
