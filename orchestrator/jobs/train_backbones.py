"""The backbones of a job trained and evaluated: a single one by the main thread, several by a thread each.

Every one has CPUs and GPUs of its own, as they become free, in which it is also evaluated. Without Ray they take turns.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from bim.orchestrator.distributed.cluster import run_in_bundle
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.distributed.placement_group import (
    LostNodeWatch,
    PlacementGroup,
    create_placement_group,
    release_placement_group,
)
from bim.orchestrator.distributed.streaming import stream_from_bundle
from bim.orchestrator.evaluation.progress import reported_to
from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.jobs.backbone_run import BackboneRun, scores_line
from bim.orchestrator.jobs.evaluate_checkpoint import evaluate_checkpoint
from bim.orchestrator.jobs.evaluation_task import EvaluationTask, evaluation_task
from bim.orchestrator.jobs.measuring import MeasuringLines, ProgressFile, evaluate_with_progress
from bim.orchestrator.jobs.record_variants import begin_variants
from bim.orchestrator.jobs.remote_evaluation import evaluate_and_send, receive
from bim.orchestrator.jobs.training_scores import TrainingScores
from bim.orchestrator.reporting.console import Progress
from bim.orchestrator.reporting.log import line_prefix
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.signals import stop_on_signals
from bim.orchestrator.runs.train import placement_timeout_s, train
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.storage import is_url

LOG_WAIT_AFTER_S = 5.0
"""How long a backbone waits for free resources without a line; Ray takes a moment for those that are there."""

SHUTDOWN_TIMEOUT_S = 10.0
"""How long the threads get to end after a second signal."""

log = logging.getLogger(__name__)

Record = Callable[[BackboneRun], None]


class RunCancelled(Exception):
    """A stop was requested while there was nothing to save."""


class PlacementGroupPool:
    """Who holds resources of the cluster. Without Ray there is one process for all, which they hold in turns."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._process, self._lock = threading.Lock(), threading.Lock()
        self._held: dict[str, PlacementGroup] = {}

    @contextmanager
    def acquire(self, name: str, run: ResolvedRun, layout: StageLayout) -> Iterator[PlacementGroup | None]:
        """A placement group for the stages of a layout, waited for as long as others hold one; None without Ray.

        Raises:
            PlacementError: the cluster has no room that another backbone holds.
            RunCancelled: a stop was requested before.
        """
        if run.settings.placement.backend != "ray":
            with self._process:
                yield None
            return
        start, logged = time.monotonic(), False

        def held_by_others() -> bool:
            nonlocal logged
            with self._lock:
                holders = ", ".join(self._held)
            if holders and not logged and time.monotonic() - start > LOG_WAIT_AFTER_S:
                logged = True
                log.info("waiting for %s (held by: %s)", "GPUs" if layout.gpus else "CPUs", holders)
            return bool(holders)

        timeout_s = placement_timeout_s(run.settings)
        placement_group = create_placement_group(
            layout, timeout_s, held_by_others, lambda: self._stop.reason is not None
        )
        if placement_group is None:
            raise RunCancelled
        with self._lock:
            self._held[name] = placement_group
        try:
            yield placement_group
        finally:
            with self._lock:
                del self._held[name]
            release_placement_group(placement_group)

    def release_all(self) -> None:
        """End everything that lives in any of the placement groups."""
        with self._lock:
            groups = list(self._held.values())
        for placement_group in groups:
            release_placement_group(placement_group)


def train_backbones(backbones: Sequence[BackboneRun], stop: StopRequest, record: Record) -> None:
    """Train and evaluate all of them, until `stop` is set.

    Args:
        record: called in the main thread for a backbone of which more is evaluated, and for one that has ended.

    Raises:
        TrainingError, PlacementError, DataError, OutputError: of a single backbone; one of several records its own.
    """
    pool = PlacementGroupPool(stop)
    if not backbones or backbones[0].name:
        _train_concurrently(backbones, pool, stop, record)
    else:
        with suppress(RunCancelled):
            _train_and_evaluate(backbones[0], pool, stop, record, alone=True)


def _train_concurrently(
    backbones: Sequence[BackboneRun], pool: PlacementGroupPool, stop: StopRequest, record: Record
) -> None:
    progressed: queue.SimpleQueue[BackboneRun] = queue.SimpleQueue()
    alone = len(backbones) == 1

    def follow(backbone: BackboneRun) -> None:
        with backbone.lines(), backbone.isolated(), suppress(RunCancelled):
            _train_and_evaluate(backbone, pool, stop, progressed.put, alone)
            if backbone.evaluated:
                log.info(scores_line(backbone.evaluations[0].reports))
        progressed.put(backbone)

    threads = [
        threading.Thread(target=follow, args=(backbone,), name=backbone.name, daemon=True)
        for backbone in backbones
    ]
    with stop_on_signals(stop):
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) or not progressed.empty():
                try:
                    record(progressed.get(timeout=0.2))  # a signal is handled between two waits
                except queue.Empty:
                    continue
        except BaseException:
            stop.reason = stop.reason or "SIGINT"
            pool.release_all()
            deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            raise


def _train_and_evaluate(
    backbone: BackboneRun, pool: PlacementGroupPool, stop: StopRequest, record: Record, alone: bool
) -> None:
    """Train and evaluate a backbone and then its baseline; returns early when `stop` is set."""
    depths = backbone.prepared.run.depths
    for run, layout in backbone.placements:
        series = backbone.series_of(run)
        with pool.acquire(backbone.name, run, layout) as placement_group:
            if stop.reason is not None:
                return
            begin_variants(backbone.tracker, run, depths, series)
            if series:
                log.info("the baseline: one end-to-end MAE run (K = 1), to be truncated at each depth")
            label = "  ".join(filter(None, (backbone.name, series)))
            progress = Progress(backbone.tracker, series, label, run.total_steps)
            with line_prefix(series), progress:
                scores = TrainingScores(progress, backbone, run, layout, placement_group, stop, series)
                final_step = _train(scores, backbone, run, layout, placement_group, stop)
            if stop.reason is not None:
                return
            if not series:
                log.info(
                    f"measuring and exporting depth{'s' * (len(depths) > 1)} {', '.join(map(str, depths))}"
                )
            task = evaluation_task(
                run, layout, backbone.provenance, depths, final_step, with_baselines=not series
            )
            evaluation = _evaluate(backbone, task, layout, placement_group, stop, alone)
            if evaluation is None:
                return
        backbone.tasks.append(task)
        backbone.evaluations.append(evaluation)
        record(backbone)


def _train(
    scores: TrainingScores,
    backbone: BackboneRun,
    run: ResolvedRun,
    layout: StageLayout,
    placement_group: PlacementGroup | None,
    stop: StopRequest,
) -> int:
    """Train a run to its end, which its scores may bring early. Returns the step of the checkpoint that is its result."""
    try:
        if not scores.has_ended:
            train(
                run,
                layout,
                backbone.precision,
                scores,
                stop,
                placement_group,
                lease=backbone.lease,
                on_machines=scores.on_machines,
                score_epochs=scores.every_epochs,
                is_kept=scores.is_kept,
            )
            scores.finish()
    finally:
        scores.close()
    best = scores.best
    if not scores.has_ended or best is None or stop.reason is not None:
        return run.total_steps
    log.info(
        f"no better scores in {run.settings.evaluation.patience} evaluations: the training ends early, and its result "
        f"is the checkpoint of epoch {best.epoch}"
    )
    return best.step


def _evaluate(
    backbone: BackboneRun,
    task: EvaluationTask,
    layout: StageLayout,
    placement_group: PlacementGroup | None,
    stop: StopRequest,
    alone: bool,
) -> EvaluationResult | None:
    """In this process without Ray, else in the placement group of the stages; None if a stop was requested.

    Logs a line now and then of how far it is.
    """

    def is_stopped() -> bool:
        if backbone.lease is not None:
            backbone.lease.raise_if_lost()
        return stop.reason is not None

    def check() -> None:
        if is_stopped():
            raise RunCancelled

    if placement_group is None:
        with reported_to(MeasuringLines(check)):
            return evaluate_checkpoint(task)
    if not layout.gpus:
        # Alone it computes with as many threads as this process would, else with the CPUs of its stages.
        cpus = max(1, int(layout.cpus * len(layout.stage_blocks) + layout.loader_cpus))
        task = replace(task, threads=torch.get_num_threads() if alone else cpus)
    if task.evaluation.latency and layout.gpus < 1 and not alone:
        # Others compute on the same device.
        backbone.latency_pending = True
        task = replace(task, evaluation=replace(task.evaluation, latency=False))
    watch = LostNodeWatch(placement_group, placement_timeout_s(backbone.prepared.run.settings), "measuring")

    def should_cancel() -> bool:
        watch.check()
        return is_stopped()

    if is_url(task.checkpoint):
        # The node of the stages need not see the output directory.
        items = stream_from_bundle(evaluate_and_send, placement_group, layout, should_cancel, task)
        return receive(items, Path(task.out), MeasuringLines())
    lines, file = MeasuringLines(), ProgressFile(Path(task.out))

    def should_cancel_with_lines() -> bool:
        lines(file.read())
        return should_cancel()

    try:
        return run_in_bundle(evaluate_with_progress, placement_group, layout, should_cancel_with_lines, task)
    finally:
        file.remove()
