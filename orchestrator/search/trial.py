"""One trial of a search: its settings, its placement, and its training with a score every few epochs.

A trial drives its own stage actors inside its placement group. It is independent of Tune: reports and scores go through
functions that `tuner` passes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import differing_keys, with_changes
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.phases import Phase
from bim.orchestrator.data.source import Source, given
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.placement import ClusterResources, StageLayout, gpu_capacity
from bim.orchestrator.distributed.placement_group import PlacementGroup
from bim.orchestrator.files import StorageError, temporary_folder
from bim.orchestrator.runs.checkpoints import (
    StorageRecord,
    checkpoint_store,
    committed_folder,
    write_storage_record,
)
from bim.orchestrator.runs.prepare import ResolvedRun, resolve_run
from bim.orchestrator.runs.resolve import data_spec, resolve
from bim.orchestrator.runs.train import resolve_layout, train
from bim.orchestrator.search.objective import training_gflops
from bim.orchestrator.search.results import Score
from bim.orchestrator.search.spec import TrialSpec
from bim.orchestrator.text import first_line
from bim.orchestrator.training.callbacks import EpochReport, NullCallback, StopRequest
from bim.orchestrator.training.errors import StorageUnsupportedError
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.storage import Location, below, is_url, remove_below

log = logging.getLogger(__name__)

DRIVER_CPUS = 0.05
"""CPUs that the driver of a trial requests beside its stages, for which it waits most of the time."""

Scorer = Callable[[PretrainSpec, Location], Score]
Report = Callable[[dict[str, Any]], None]


class InfeasibleSettings(ValueError):
    """A combination of values that the validation of the settings refuses."""


def trial_settings(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The recipe with the changes and the budget of a trial: a complete schedule over fewer epochs.

    Warm-up and the epochs at which images grow are scaled in proportion; phases that fall on one epoch are infeasible.

    Raises SettingsError if these settings contradict each other.
    """
    changed = with_changes(settings, changes)
    epochs = trial_epochs(settings)
    fraction = epochs / settings.schedule.epochs
    budget: dict[str, Any] = {
        "schedule.epochs": epochs,
        "schedule.warmup_epochs": changed.schedule.warmup_epochs * fraction,
        "checkpoint.every_epochs": 1.0,
        "checkpoint.keep": 1,
        "search.trials": 0,
        "baseline": "none",
    }
    if changed.schedule.resolution is not None:
        budget["schedule.resolution"] = [
            [start if isinstance(start, float) else round(start * fraction), *rest]
            for start, *rest in changed.schedule.resolution
        ]
    return with_changes(settings, {**changes, **budget})


def trial_epochs(settings: Settings) -> int:
    """Epochs of a trial that is not stopped early: never more than the run itself has."""
    return min(settings.search.trial_epochs or settings.schedule.epochs, settings.schedule.epochs)


def trial_placement(settings: Settings, cluster: ClusterResources) -> tuple[StageLayout, int]:
    """Layout of the stages of one trial, and the number of concurrent trials.

    Raises PlacementError if not even one fits.
    """
    search, cpus = settings.search, settings.placement.cpus_per_stage
    stages = search.trial_stages or settings.placement.stages
    stages = None if stages is None else min(stages, settings.num_blocks)
    settings = with_changes(settings, {"placement.stages": stages})
    alone = resolve_layout(settings, cluster)  # the layout of a trial that has the cluster to itself
    stages = len(alone.stage_blocks)
    capacity = gpu_capacity(cluster.gpus, alone.gpus) if alone.gpus else int(cluster.cpus / (cpus or 1.0))
    concurrent = min(capacity // stages, search.trials, search.concurrent or search.trials)
    changes: dict[str, Any] = {"placement.stages": stages}
    if cpus is not None:
        cpu_capacity = int(cluster.cpus / (stages * cpus + DRIVER_CPUS))
        concurrent = min(concurrent, cpu_capacity)
        if cpu_capacity == 0:
            # The CPUs of the driver are lacking; the stages get slightly less than requested.
            changes["placement.cpus_per_stage"] = None
    concurrent = max(1, concurrent)
    part = ClusterResources(
        round(cluster.cpus / concurrent - DRIVER_CPUS, 4),
        cluster.gpus,
        max(1, -(-cluster.nodes // concurrent)),
    )
    return resolve_layout(with_changes(settings, changes), part), concurrent


def run_trial(
    trial: TrialSpec,
    changes: Mapping[str, Any],
    name: str,
    scorer: Callable[[ResolvedRun, tuple[Source, Splits]], Scorer],
    report: Report,
    placement_group: PlacementGroup | None = None,
    first_bundle: int = 0,
) -> None:
    """Train one trial to its end, from its last checkpoint, reporting its score every `search.every_epochs`.

    Args:
        scorer: makes the function that scores checkpoints of a run on its images.
        report: takes {"epoch": 4, "score": 0.8, "depths": {2: 0.7, ...}, "gflops": ..., "images_per_s": ...}.

    Raises:
        InfeasibleSettings: the settings contradict each other, or the images do not fill one step of such batches.
        DataError: the images cannot be read, or have changed since the search began.
        Exception: the error that ended the training.
    """
    with given(trial.given), _trial_output(trial, name) as out:
        run, images = _resolve_trial(trial, changes, out)
        checkpoint = checkpoint_store(out).latest()
        if checkpoint is not None and (
            checkpoint.run_id not in ("", trial.run_id)  # earlier versions wrote none
            or differing_keys(settings_from_mapping(checkpoint.settings), run.settings)
        ):
            remove_trial_checkpoints(trial, name)
            checkpoint = None
        every_epochs = settings_from_mapping(trial.settings).search.every_epochs
        callback = _ScoringCallback(run, every_epochs, scorer(run, images), report)
        if checkpoint is not None:
            callback.on_checkpoint(checkpoint.step)  # the process may have died before it reported this score
        train(run, trial.layout, trial.precision, callback, StopRequest(), placement_group, first_bundle)


@contextmanager
def _trial_output(trial: TrialSpec, name: str) -> Iterator[Path]:
    """The output directory of a trial, which holds nothing but its checkpoints, or the record that they are below a URL."""
    if not is_url(trial.folder):
        yield Path(trial.folder) / name
        return
    with temporary_folder("bim-trial-") as out:
        write_storage_record(out, StorageRecord(trial.folder, name))
        yield out


def remove_trial_checkpoints(trial: TrialSpec, name: str | None = None) -> None:
    """Remove the checkpoints of a trial, or of all trials, as far as the storage lets one; never raises."""
    if not is_url(trial.folder):
        shutil.rmtree(Path(trial.folder) / (name or ""), ignore_errors=True)
        return
    try:
        remove_below(str(trial.folder if name is None else below(trial.folder, name)))
    except (StorageError, StorageUnsupportedError) as error:
        log.debug("checkpoints of trials stay: %s", error)


def _resolve_trial(
    trial: TrialSpec, changes: Mapping[str, Any], out: Path
) -> tuple[ResolvedRun, tuple[Source, Splits]]:
    """The run of a trial, and its images. Raises InfeasibleSettings, DataError."""
    recipe = settings_from_mapping(trial.settings)
    images = data_spec(recipe, resolve(recipe)[1]).open()  # the same for all trials
    try:
        settings = trial_settings(recipe, changes)
        if is_url(trial.folder):
            settings = with_changes(settings, {"checkpoint.storage": trial.folder})
        run, source, splits = resolve_run(settings, out, images)
    except ValueError as error:  # SettingsError among them, and too few images for one step
        raise InfeasibleSettings(first_line(error)) from error
    if run.fingerprint != trial.fingerprint:
        raise DataError("the images behind data.source have changed since the search began")
    return replace(run, search_run_id=trial.run_id), (source, splits)


class _ScoringCallback(NullCallback):
    """Scores checkpoints at the ends of some epochs, and reports the scores."""

    def __init__(self, run: ResolvedRun, every_epochs: int, score: Scorer, report: Report) -> None:
        self.started = False
        self._run, self._every_epochs, self._score, self._report = run, every_epochs, score, report
        self._gflops = training_gflops(run.spec, run.phases, run.settings.schedule.epochs)
        self._scoring_s = self._trained_s = 0.0
        self._images = 0

    def on_epoch(self, report: EpochReport) -> None:
        phase = next(p for p in reversed(self._run.phases) if p.first_epoch < report.epoch)
        images = phase.steps_per_epoch * phase.images_per_step
        self._images += images
        # The checkpoint of an epoch is scored at its last step, so the time of the epoch includes the scoring.
        self._trained_s += max(1e-9, images / report.images_per_s - self._scoring_s)
        self._scoring_s = 0.0

    def on_checkpoint(self, step: int) -> None:
        epoch = completed_epochs(self._run.phases, step)
        if epoch is None or (epoch % self._every_epochs and step != self._run.total_steps):
            return
        start = time.perf_counter()
        score = self._score(self._run.spec, committed_folder(self._run.out, step))
        self._scoring_s += time.perf_counter() - start
        result: dict[str, Any] = {
            "epoch": epoch,
            "score": score.mean,
            "depths": {str(depth): value for depth, value in score.by_depth.items()},
            "gflops": self._gflops,
        }
        if self._images:
            result["images_per_s"] = self._images / self._trained_s
        self._report(result)

    def on_rewind(self, step: int) -> None:
        self.started = True
        self._scoring_s = 0.0  # that of `run_trial` was before the first epoch


def completed_epochs(phases: tuple[Phase, ...], step: int) -> int | None:
    """Number of epochs that are complete after `step` steps; None inside an epoch."""
    phase = next(p for p in reversed(phases) if p.first_step < step)
    epochs, within = divmod(step - phase.first_step, phase.steps_per_epoch)
    return None if within else phase.first_epoch + epochs
