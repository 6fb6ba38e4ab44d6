"""The courses of several backbones: each trained and assessed in room of its own, as it comes free, all at the same time.

Every backbone has a thread of this process for its training loop; in the room of its stages it is assessed by a process of
its own when it is trained. Signals are heard by the thread that calls `run_concurrently`. One backbone that fails does not
stop the others. Without Ray they take turns.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.distributed.cluster import run_in_bundle
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.distributed.placement_group import (
    PlacementGroup,
    create_placement_group,
    release_placement_group,
)
from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.jobs.evaluate_checkpoint import EvaluationTask, evaluate_checkpoint
from bim.orchestrator.jobs.job import Say, evaluation_task
from bim.orchestrator.jobs.records import card_facts
from bim.orchestrator.reporting.console import Progress
from bim.orchestrator.runs.output_dir import OutputError
from bim.orchestrator.runs.prepare import PreparedJob, ResolvedRun
from bim.orchestrator.runs.provenance import Provenance
from bim.orchestrator.runs.signals import stop_on_signals
from bim.orchestrator.runs.train import train
from bim.orchestrator.text import rank_text
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError
from bim.orchestrator.training.spec import Precision

PATIENCE_S = 120.0
"""How long a backbone waits for room that no other one holds."""

LOG_WAIT_AFTER_S = 5.0
"""How long it waits without a word; Ray takes a moment for room that is there."""

SHUTDOWN_TIMEOUT_S = 20.0
"""How long the threads get to end when a second signal wants the end at once."""

USER_FACING_ERRORS = (TrainingError, DataError, OutputError, PlacementError)
"""Errors whose message is meant for the person who started the run."""


@dataclass
class BackboneRun:
    """How one backbone fares. Its own thread writes, the main thread reads when that has ended."""

    name: str
    prepared: PreparedJob
    plans: list[tuple[ResolvedRun, StageLayout]]
    precision: Precision
    provenance: Provenance
    tracker: Tracker
    say: Say
    jobs: list[EvaluationTask] = field(default_factory=list)
    found: list[EvaluationResult] = field(default_factory=list)
    failed: str | None = None

    @property
    def measured(self) -> bool:
        """Whether everything of it was trained and assessed."""
        return len(self.found) == len(self.plans)

    @property
    def latency_pending(self) -> bool:
        """Whether its latencies wait until nothing else runs."""
        wanted = self.prepared.family.settings.evaluation.latency
        return wanted and not self.found[0].reports[0].device


class PlacementGroupPool:
    """Who holds room on the cluster; without Ray there is one room for all, in turns."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._held: list[PlacementGroup] = []

    @contextmanager
    def taken(
        self, course: BackboneRun, family: ResolvedRun, layout: StageLayout
    ) -> Iterator[PlacementGroup | None]:
        """Room for the stages of a layout, waited for as long as others hold some. Yields None without Ray."""
        if family.settings.placement.backend != "ray":
            with self._turn:
                yield None
            return
        began, told = time.monotonic(), False

        def others() -> bool:
            nonlocal told
            with self._lock:
                held = bool(self._held)
            if held and not told and time.monotonic() - began > LOG_WAIT_AFTER_S:
                told = True
                course.say("waits until another backbone gives its room back")
            return held

        wait_s = max(PATIENCE_S, family.settings.placement.wait_s)
        group = create_placement_group(layout, wait_s, others, lambda: self._stop.reason is not None)
        if group is None:
            raise RunCancelled
        with self._lock:
            self._held.append(group)
        try:
            yield group
        finally:
            with self._lock:
                self._held.remove(group)
            release_placement_group(group)

    def clear(self) -> None:
        """End everything that lives in any room."""
        with self._lock:
            held = list(self._held)
        for group in held:
            release_placement_group(group)


class RunCancelled(Exception):
    """A signal came while there was nothing to save."""


def run_concurrently(
    courses: list[BackboneRun], stop: StopRequest, say: Say, note: Callable[[BackboneRun], None]
) -> None:
    """Train and assess all of them at once; each is noted, by this thread, when it has come to an end of any kind."""
    rooms = PlacementGroupPool(stop)
    ended: queue.SimpleQueue[BackboneRun] = queue.SimpleQueue()

    def follow(course: BackboneRun) -> None:
        try:
            _train_and_assess(course, rooms, stop)
        except RunCancelled:
            pass
        except Exception as error:  # one that fails does not stop the others, whatever it is
            record_failure(course, error)
        finally:
            ended.put(course)

    threads = [
        threading.Thread(target=follow, args=(course,), name=course.name, daemon=True) for course in courses
    ]
    with stop_on_signals(stop, say):
        try:
            for thread in threads:
                thread.start()
            left = len(courses)
            while left:
                try:
                    course = ended.get(timeout=0.2)  # a signal is heard between two waits
                except queue.Empty:
                    continue
                left -= 1
                note(course)
        except BaseException:
            stop.reason = stop.reason or "SIGINT"
            rooms.clear()
            deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            raise


def _train_and_assess(course: BackboneRun, rooms: PlacementGroupPool, stop: StopRequest) -> None:
    for number, (family, layout) in enumerate(course.plans):
        with rooms.taken(course, family, layout) as group:
            if stop.reason is not None:
                return
            if number:
                course.say("the baseline: one end-to-end MAE run (K = 1), to be truncated at each depth")
            series = "mae" if number else ""
            with Progress(
                course.tracker, series, f"{course.name}  {series}".strip(), family.total_steps
            ) as progress:
                train(family, layout, course.precision, progress, stop, group)
            if stop.reason is not None:
                return
            depths = course.prepared.family.depths
            if not number:
                course.say(
                    f"measuring and exporting depth{'s' * (len(depths) > 1)} {', '.join(map(str, depths))}"
                )
            facts = card_facts(family, course.provenance)
            job = evaluation_task(family, layout, facts, depths, references=not number)
            found = _assess(job, group, layout, stop)
            if found is None:
                return
            course.jobs.append(job)
            course.found.append(found)
    course.say(_scores(course.found[0].reports))


def _assess(
    job: EvaluationTask, group: PlacementGroup | None, layout: StageLayout, stop: StopRequest
) -> EvaluationResult | None:
    """In this process if there is no Ray, else in the room of the stages; None if a signal came."""
    if group is None:
        return evaluate_checkpoint(job)
    if layout.gpus < 1:  # others compute on the same device: what is timed now would be wrong
        job = replace(job, evaluation=replace(job.evaluation, latency=False))
    if not layout.gpus:
        job = replace(job, threads=max(1, int(layout.cpus * len(layout.stage_blocks) + layout.loader_cpus)))
    return run_in_bundle(evaluate_checkpoint, group, layout, lambda: stop.reason is not None, job)


def _scores(reports: tuple[DepthReport, ...]) -> str:
    accuracies = [100 * report.knn_top1 for report in reports if report.knn_top1 is not None]
    if len(accuracies) == len(reports):
        return f"kNN top-1 by depth {', '.join(f'{accuracy:.1f}' for accuracy in accuracies)} %"
    ranks = [rank_text(report.rankme) for report in reports if report.rankme is not None]
    if len(ranks) == len(reports):
        return f"RankMe by depth {', '.join(ranks)}"
    return f"measured and exported {len(reports)} depths"


def record_failure(course: BackboneRun, error: Exception) -> None:
    """Tell why in a line; of what is no error of ours keep the traceback in `failure.txt`."""
    course.failed = format_error(error)
    kept = _traceback_file(course)
    kept.unlink(missing_ok=True)
    if not isinstance(error, USER_FACING_ERRORS):
        kept.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    course.say(f"failed: {course.failed}")
    course.tracker.log_event(f"failed: {course.failed}")


def clear_failure(course: BackboneRun) -> None:
    """Take away what an earlier process left of a failure that this one has got over; `events.log` keeps its line."""
    _traceback_file(course).unlink(missing_ok=True)
    course.tracker.remove_tag("failed")


def format_error(error: Exception) -> str:
    """An error in one line, for the reader; what is no error of ours begins with its kind."""
    lines = str(error).strip().splitlines() or ["without a word"]
    return " ".join(lines) if isinstance(error, USER_FACING_ERRORS) else f"{type(error).__name__}: {lines[0]}"


def _traceback_file(course: BackboneRun) -> Path:
    return course.prepared.family.out / "failure.txt"
