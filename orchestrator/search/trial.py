"""One trial of a search: its settings, its place, and its training, scored on the way.

The driver of its own stage actors inside its trial's placement group. Knows Ray only through the stages that it starts, and
not Tune: reports and scores go through functions that `search.py` gives.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import differing_keys, with_changes
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.phases import Phase
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.placement import ClusterResources, StageLayout
from bim.orchestrator.distributed.placement_group import PlacementGroup
from bim.orchestrator.runs.prepare import ResolvedRun, resolve_run
from bim.orchestrator.runs.resolve import data_spec, resolve
from bim.orchestrator.runs.train import resolve_layout, train
from bim.orchestrator.search.objective import ObjectiveSpec, Score, training_gflops
from bim.orchestrator.training.callbacks import EpochReport, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.spec import Precision, PretrainSpec

DRIVER_CPUS = 0.05
"""What the driver of a trial asks of the cluster beside its stages; it waits for them most of the time."""

Scorer = Callable[[PretrainSpec, Path], Score]
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrialSpec:
    """What all trials of a search share; plain values that travel.

    Args:
        settings: the recipe, as nested plain values.
        layout: of the stages of one trial.
        folder: checkpoints lie below it while a trial runs.
        device: where checkpoints are scored.
        run_concurrently: trials that run at the same time.
    """

    settings: dict[str, Any]
    layout: StageLayout
    precision: Precision
    folder: str
    objective: ObjectiveSpec
    fingerprint: str
    device: str = "cpu"
    run_concurrently: int = 1


class InfeasibleSettings(ValueError):
    """A combination that the settings' own validation refuses."""


def trial_settings(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The recipe with a trial's changes and a trial's budget: a whole schedule of its own over fewer epochs.

    Warm-up and the epochs from which on images grow are scaled in proportion; phases that fall together are infeasible.

    Raises SettingsError if these settings contradict each other.
    """
    changed = with_changes(settings, changes)
    epochs = trial_epochs(settings)
    share = epochs / settings.schedule.epochs
    budget: dict[str, Any] = {
        "schedule.epochs": epochs,
        "schedule.warmup_epochs": changed.schedule.warmup_epochs * share,
        "checkpoint.every_epochs": 1.0,
        "checkpoint.keep": 1,
        "search.trials": 0,
        "baseline": "none",
    }
    if changed.schedule.resolution is not None:
        budget["schedule.resolution"] = [
            [start if isinstance(start, float) else round(start * share), *rest]
            for start, *rest in changed.schedule.resolution
        ]
    return with_changes(settings, {**changes, **budget})


def trial_epochs(settings: Settings) -> int:
    """Epochs of a trial that is not stopped early: never more than the run itself has."""
    return min(settings.search.trial_epochs or settings.schedule.epochs, settings.schedule.epochs)


def trial_placement(settings: Settings, cluster: ClusterResources) -> tuple[StageLayout, int]:
    """Where the blocks of one trial live, and how many trials fit side by side.

    Raises PlacementError if not even one fits.
    """
    stages = settings.search.trial_stages or settings.placement.stages
    asked = with_changes(
        settings, {"placement.stages": None if stages is None else min(stages, settings.num_blocks)}
    )
    alone = resolve_layout(asked, cluster)
    places = len(alone.places)
    if alone.gpus:
        room = (
            int(cluster.gpus // alone.gpus)
            if alone.gpus >= 1
            else int(cluster.gpus) * int(1 / alone.gpus + 1e-6)
        )
    else:
        room = int(cluster.cpus / (settings.placement.cpus_per_stage or 1.0))
    beside = max(
        1, min(room // places, settings.search.trials, settings.search.concurrent or settings.search.trials)
    )
    if (cpus := settings.placement.cpus_per_stage) is not None:
        fitting = int(cluster.cpus / (places * cpus + DRIVER_CPUS))
        beside = max(1, min(beside, fitting))
        if (
            fitting == 0
        ):  # for want of the driver's small share; the stages of a trial then get a little less than asked
            asked = with_changes(asked, {"placement.cpus_per_stage": None})
    share = ClusterResources(
        round(cluster.cpus / beside - DRIVER_CPUS, 4), cluster.gpus, max(1, -(-cluster.nodes // beside))
    )
    return resolve_layout(with_changes(asked, {"placement.stages": places}), share), beside


def run_trial(
    plan: TrialSpec,
    changes: Mapping[str, Any],
    name: str,
    scorer: Callable[[ResolvedRun, tuple[Source, Splits]], Scorer],
    report: Report,
    group: PlacementGroup | None = None,
    first_bundle: int = 0,
) -> None:
    """Train one trial to its end, reporting its score every `search.every_epochs`; continued from its last checkpoint.

    Args:
        scorer: makes the function that scores checkpoints of this family on its images.
        report: takes {"epoch": 4, "score": 0.8, "depths": {2: 0.7, ...}, "gflops": ..., "images_per_s": ...}.

    Raises:
        InfeasibleSettings: the settings contradict each other, or the images do not fill one step of such batches.
        DataError: the images cannot be read, or have changed since the search began.
        Exception: whatever ended the training.
    """
    recipe = settings_from_mapping(plan.settings)
    out = Path(plan.folder) / name
    opened = data_spec(recipe, resolve(recipe)[1]).open()  # no trial has other images
    try:
        settings = trial_settings(recipe, changes)
        family, source, splits = resolve_run(settings, out, opened)
    except ValueError as error:  # SettingsError among them, and too few images for one step
        raise InfeasibleSettings(str(error).splitlines()[0]) from error
    if family.fingerprint != plan.fingerprint:
        raise DataError("the images behind data.source have changed since the search began")
    store = CheckpointStore(out, say=lambda _: None)
    found = store.latest()
    if found is not None and differing_keys(settings_from_mapping(found.settings), settings):
        shutil.rmtree(out)
        found = None
    listener = _ScoredTraining(family, recipe.search.every_epochs, scorer(family, (source, splits)), report)
    if found is not None:
        listener.on_checkpoint(found.step)  # cut off between the checkpoint and its score, perhaps
    train(family, plan.layout, plan.precision, listener, StopRequest(), group, first_bundle)


class _ScoredTraining:
    """A listener that scores checkpoints at the ends of some epochs."""

    def __init__(self, family: ResolvedRun, every: int, score: Scorer, report: Report) -> None:
        self.started = False
        self._family, self._every, self._score, self._report = family, every, score, report
        self._store = CheckpointStore(family.out)
        self._gflops = training_gflops(family.spec, family.phases, family.settings.schedule.epochs)
        self._scoring_s = self._trained_s = 0.0
        self._images = 0

    def on_step(self, step: int, metrics: dict[str, float]) -> None: ...

    def on_epoch(self, report: EpochReport) -> None:
        phase = next(p for p in reversed(self._family.phases) if p.first_epoch < report.epoch)
        images = phase.steps_per_epoch * phase.images_per_step
        self._images += images
        # The last step of an epoch carries its checkpoint mark, so that the score was made within the epoch's time.
        self._trained_s += max(1e-9, images / report.images_per_s - self._scoring_s)
        self._scoring_s = 0.0

    def on_checkpoint(self, step: int) -> None:
        epoch = whole_epochs(self._family.phases, step)
        last = step == self._family.total_steps
        if epoch is None or (epoch % self._every and not last):
            return
        began = time.perf_counter()
        found = self._score(self._family.spec, self._store.directory(step))
        self._scoring_s += time.perf_counter() - began
        result: dict[str, Any] = {
            "epoch": epoch,
            "score": found.mean,
            "depths": {str(depth): value for depth, value in found.by_depth.items()},
            "gflops": self._gflops,
        }
        if self._images:
            result["images_per_s"] = self._images / self._trained_s
        self._report(result)

    def on_rewind(self, step: int) -> None:
        self.started = True
        self._scoring_s = 0.0  # of a checkpoint that was scored before any epoch of this training

    def say(self, text: str) -> None: ...


def whole_epochs(phases: tuple[Phase, ...], step: int) -> int | None:
    """How many epochs end with step `step`; None inside an epoch."""
    phase = next(p for p in reversed(phases) if p.first_step < step)
    epochs, within = divmod(step - phase.first_step, phase.steps_per_epoch)
    return None if within else phase.first_epoch + epochs
