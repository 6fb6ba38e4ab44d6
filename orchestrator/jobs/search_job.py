"""The search as a part of the main job: whether one is due, what is wrong with it, and the family that it leads to.

Composes `search.py` and what it needs; holds no arithmetic.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import settings_to_mapping
from bim.orchestrator.distributed.cluster import run_on_worker
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.evaluation.evaluate import RANKME_IMAGES
from bim.orchestrator.reporting.search_console import SearchProgress, closing, opening
from bim.orchestrator.runs.output_dir import OutputError
from bim.orchestrator.runs.prepare import PreparedJob, ResolvedRun, resolve_run
from bim.orchestrator.runs.resolve import eval_config
from bim.orchestrator.runs.signals import stop_on_signals
from bim.orchestrator.search.controller import SearchSpec, grace_period
from bim.orchestrator.search.objective import (
    KNN_TRAIN_IMAGES,
    KNN_VAL_IMAGES,
    SCORED_BY,
    metric_of,
)
from bim.orchestrator.search.results import (
    BEST,
    FOLDER,
    SearchResult,
    best_line,
    finished_search,
    load_result,
    with_best,
)
from bim.orchestrator.search.space import Space, baseline_values, combinations, space_of
from bim.orchestrator.search.time_estimate import measure_throughput, start_seconds, trial_seconds
from bim.orchestrator.search.trial import TrialSpec, trial_epochs, trial_placement, trial_settings
from bim.orchestrator.text import short_path
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.spec import Precision

MARGIN = 1.5
"""Trials share memory and caches, and a trial's own setting may be dearer than the recipe's (a lower mask ratio)."""

MAY_CHANGE = ("resume", "trial_stages")
"""Settings of a search that may be others when it is continued; Tune's saved state holds the rest."""


def search_due(settings: Settings, out: Path) -> bool:
    """Whether a search comes before the training: it is asked for, and not finished yet."""
    return settings.search.trials > 0 and not (settings.resume and finished_search(out) is not None)


def check_search(family: ResolvedRun, prepared: PreparedJob) -> None:
    """Find what is wrong with a search that is due, before anything starts.

    Raises:
        SettingsError: the space, the searcher, the backend; or trial 0 cannot be trained in its shorter time.
        OutputError: the search that is continued was another one.
    """
    settings, out = family.settings, family.out
    found = load_result(out)
    if settings.search.resume and found is None:
        raise OutputError(f"there is no search to continue in {out}; leave --search.resume out")
    if not search_due(settings, out):
        return
    if settings.placement.backend != "ray":
        raise SettingsError(
            "a search needs placement.backend ray; to train in this process alone set search.trials to 0"
        )
    if CheckpointStore(out, say=lambda _: None).latest() is not None:
        raise OutputError(
            f"the run in {out} is being trained already, and a search comes before the training; continue it with "
            "--search.trials 0"
        )
    if settings.search.searcher == "optuna" and importlib.util.find_spec("optuna") is None:
        raise SettingsError(
            "search.searcher optuna needs the package optuna: pip install '.[optuna]'; or set it to random"
        )
    space_of(settings, family.backbone)
    try:
        resolve_run(trial_settings(settings, {}), out, (prepared.source, prepared.splits))
    except SettingsError as error:
        raise SettingsError(
            f"the recipe's own setting, trial 0 of the search, cannot be trained for search.trial_epochs: {error}"
        ) from error
    if found is not None:
        _check_same(found, _empty(family, prepared, {}), out)


def run_search(
    family: ResolvedRun,
    prepared: PreparedJob,
    cluster: ClusterResources,
    precision: Precision,
    tracker: Tracker,
    say: Callable[[str], None],
    stop: StopRequest,
) -> ResolvedRun | None:
    """Search, and make the family of the best setting; None if `stop` was set meanwhile.

    Raises:
        PlacementError: no trial fits into the cluster.
        TrainingError: trial 0 did not come to its end.
    """
    from bim.orchestrator.search.tuner import search  # Tune takes two seconds to import

    began = time.monotonic()
    settings, asked = family.settings, family.settings.search
    space = space_of(settings, family.backbone)
    layout, beside = trial_placement(settings, cluster)
    plan = TrialSpec(
        settings=settings_to_mapping(settings),
        layout=layout,
        precision=precision,
        folder=str(family.out / FOLDER / "trials"),
        evaluation=eval_config(settings),
        fingerprint=family.fingerprint,
        device="cuda" if layout.gpus else "cpu",
        max_concurrent_trials=beside,
    )
    empty = _empty(family, prepared, space)
    trials = int(min(asked.trials, combinations(space)))
    at_most_s = MARGIN * math.ceil(trials / beside) * _trial_seconds(family, prepared, plan, cluster)
    for line in opening(empty, grace_period(settings, empty.epochs), space, trials, beside, at_most_s):
        say(line)
    with stop_on_signals(stop, say, meanwhile="ending the trials; the search can be continued"):
        result = search(
            SearchSpec(settings, space, plan, empty), family.out, SearchProgress(say, tracker), stop
        )
    if not result.finished:
        return None
    recipe = short_path(family.out / FOLDER / BEST)
    for line in closing(result, time.monotonic() - began, recipe):
        say(line)
    tracker.log_event(best_line(result))
    return resolve_run(with_best(settings, result), family.out, (prepared.source, prepared.splits))[0]


def _empty(family: ResolvedRun, prepared: PreparedJob, space: Space) -> SearchResult:
    settings, source, splits = family.settings, prepared.source, prepared.splits
    metric = metric_of(source, splits)
    judged, most = (splits.val, KNN_VAL_IMAGES) if metric == "knn_top1" else (splits.train, RANKME_IMAGES)
    return SearchResult(
        metric=metric,
        images=min(len(judged), most),
        epochs=trial_epochs(settings),
        baseline_values=baseline_values(settings, space),
        search_settings=settings.search.model_dump(mode="json")
        | {f"evaluation.{name}": getattr(settings.evaluation, name) for name in SCORED_BY},
        fingerprint=family.fingerprint,
    )


def _check_same(before: SearchResult, now: SearchResult, out: Path) -> None:
    def fixed(asked: dict[str, Any]) -> dict[str, Any]:
        return {
            key if "." in key else f"search.{key}": value
            for key, value in asked.items()
            if key not in MAY_CHANGE
        }

    old, new = fixed(before.search_settings), fixed(now.search_settings)
    told = [
        f"{key} is {new.get(key)}, was {old.get(key)}"
        for key in sorted(old.keys() & new.keys())  # a record of an earlier version lacks some
        if old.get(key) != new.get(key)
    ]
    if told:
        raise OutputError(
            f"the search in {out} cannot be continued as another one: {'; '.join(told)}; give the same settings, or start "
            "a new run with another --out"
        )
    if before.fingerprint != now.fingerprint:
        raise OutputError(
            f"the images behind data.source have changed since the search in {out} began; start a new run with another --out"
        )


def _trial_seconds(
    family: ResolvedRun, prepared: PreparedJob, plan: TrialSpec, cluster: ClusterResources
) -> float:
    """At most, of one trial: measured where its stages will live."""
    layout, settings = plan.layout, trial_settings(family.settings, {})
    spec = replace(family.spec, optim=replace(family.spec.optim, precision=plan.precision))
    measured = run_on_worker(measure_throughput, layout, spec, family.data, plan.device, layout.threads)
    trial = resolve_run(settings, family.out, (prepared.source, prepared.splits))[0]
    places = len(layout.places)
    cores = cluster.cpus / plan.max_concurrent_trials
    speedup = places if layout.gpus else max(1.0, min(places, cores / layout.threads))
    images = min(len(prepared.splits.train), KNN_TRAIN_IMAGES) + min(len(prepared.splits.val), KNN_VAL_IMAGES)
    if metric_of(prepared.source, prepared.splits) == "rankme":
        images = min(len(prepared.splits.train), RANKME_IMAGES)
    return start_seconds(places + 2, cores) + trial_seconds(
        measured, trial.phases, settings.schedule.epochs, settings.search.every_epochs, images, speedup
    )
