"""The search as a part of a job: whether one is due, what is wrong with it, and the run of its best trial."""

from __future__ import annotations

import importlib.util
import logging
import time
from pathlib import Path
from typing import Any

from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import settings_to_mapping, with_changes
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.evaluation.evaluate import RANKME_IMAGES
from bim.orchestrator.reporting.search_console import SearchProgress, closing, opening
from bim.orchestrator.runs.checkpoints import checkpoints_location, record_storage
from bim.orchestrator.runs.lease import Lease
from bim.orchestrator.runs.output_dir import OutputError, open_store
from bim.orchestrator.runs.prepare import PreparedBackbone, resolve_backbone, resolve_run
from bim.orchestrator.runs.resolve import eval_config
from bim.orchestrator.runs.signals import stop_on_signals
from bim.orchestrator.search.controller import grace_period
from bim.orchestrator.search.objective import (
    KNN_VAL_IMAGES,
    SCORED_BY,
    metric_of,
)
from bim.orchestrator.search.record import BEST, FOLDER, finished_search, load_result
from bim.orchestrator.search.results import SearchResult, with_best
from bim.orchestrator.search.space import Space, baseline_values, combinations, space_of
from bim.orchestrator.search.spec import SearchSpec, TrialSpec
from bim.orchestrator.search.trial import trial_epochs, trial_placement, trial_settings
from bim.orchestrator.text import short_path
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.spec import Precision
from bim.orchestrator.training.storage import below

MAY_CHANGE = ("resume", "trial_stages")
"""Settings of a search that may be others when it is continued; its record depends on the rest."""

log = logging.getLogger(__name__)


def search_due(settings: Settings, out: Path) -> bool:
    """Whether a search comes before the training: it is asked for, and not finished yet."""
    return settings.search.trials > 0 and not (settings.resume and finished_search(out) is not None)


def check_search(backbone: PreparedBackbone) -> None:
    """Find what is wrong with a search that is due, before anything starts.

    Raises:
        SettingsError: the space, the searcher, the backend; or trial 0 cannot be trained in its shorter time.
        OutputError: the search that is continued was another one.
    """
    run = backbone.run
    settings, out = run.settings, run.out
    saved = load_result(out)
    if settings.search.resume and saved is None:
        raise OutputError(f"there is no search to continue in {out}; leave --search.resume out")
    if not search_due(settings, out):
        return
    if settings.placement.backend != "ray":
        raise SettingsError(
            "a search needs placement.backend ray; to train in this process alone set search.trials to 0"
        )
    if open_store(out).latest() is not None:
        raise OutputError(
            f"the run in {out} is being trained already, and a search comes before the training; continue it with "
            "--search.trials 0"
        )
    if settings.search.searcher == "optuna" and importlib.util.find_spec("optuna") is None:
        raise SettingsError(
            "search.searcher optuna needs the package optuna: pip install '.[optuna]'; or set it to random"
        )
    space_of(settings, run.backbone)
    try:
        resolve_run(trial_settings(settings, {}), out, (backbone.source, backbone.splits))
    except SettingsError as error:
        raise SettingsError(
            f"the baseline config, trial 0 of the search, cannot be trained for search.trial_epochs: {error}"
        ) from error
    if saved is not None:
        _check_same(saved, _empty_result(backbone, {}), out)


def run_search(
    backbone: PreparedBackbone,
    cluster: ClusterResources,
    precision: Precision,
    tracker: Tracker,
    stop: StopRequest,
    lease: Lease | None,
) -> PreparedBackbone | None:
    """Search, and prepare the backbone with the settings of the best trial; None if `stop` was set meanwhile.

    Raises:
        PlacementError: no trial fits into the cluster.
        TrainingError: no trial came to its end, the record of the search cannot be written, or the lease of the output
            directory is lost.
    """
    from bim.orchestrator.search.tuner import search  # Tune takes two seconds to import

    start = time.monotonic()
    run, settings = backbone.run, backbone.run.settings
    space = space_of(settings, run.backbone)
    layout, concurrent = trial_placement(settings, cluster)
    record_storage(run.out, settings)
    trial = TrialSpec(
        # Trials have no record of their own in MLflow, and Tune writes what they are made from to the disk.
        settings=settings_to_mapping(with_changes(settings, {"tracking.uri": None})),
        layout=layout,
        precision=precision,
        folder=str(below(checkpoints_location(run.out), f"{FOLDER}/trials")),
        evaluation=eval_config(settings),
        fingerprint=run.fingerprint,
        device="cuda" if layout.gpus else "cpu",
        max_concurrent_trials=concurrent,
        given=run.data.given,
        run_id=run.run_id,
    )
    initial = load_result(run.out) or _empty_result(backbone, space)
    trials = int(min(settings.search.trials, combinations(space)))
    for line in opening(initial, grace_period(settings, initial.epochs), space, trials, concurrent):
        log.info(line)
    for row in initial.rows:  # an earlier process may have ended before it recorded them
        tracker.log_trial(row, initial.metric)
    with stop_on_signals(
        stop,
        meanwhile="ending the trials of the search, which can be continued",
        on_save="trials save a checkpoint after every epoch; the search goes on",
    ):
        progress = SearchProgress(tracker, trials, concurrent)
        result = search(SearchSpec(settings, space, trial, initial), run.out, progress, stop, lease)
    if not result.finished:
        return None
    for line in closing(result, time.monotonic() - start, short_path(run.out / FOLDER / BEST)):
        log.info(line)
    return resolve_backbone(with_best(settings, result), run.out, (backbone.source, backbone.splits))


def _empty_result(backbone: PreparedBackbone, space: Space) -> SearchResult:
    """The record of a search before its first trial."""
    settings, splits = backbone.run.settings, backbone.splits
    metric = metric_of(backbone.source, splits)
    images, limit = (splits.val, KNN_VAL_IMAGES) if metric == "knn_top1" else (splits.train, RANKME_IMAGES)
    return SearchResult(
        metric=metric,
        images=min(len(images), limit),
        epochs=trial_epochs(settings),
        baseline_values=baseline_values(settings, space),
        search_settings=settings.search.model_dump(mode="json")
        | {f"evaluation.{name}": getattr(settings.evaluation, name) for name in SCORED_BY},
        fingerprint=backbone.run.fingerprint,
    )


def _check_same(before: SearchResult, now: SearchResult, out: Path) -> None:
    old, new = _fixed_settings(before), _fixed_settings(now)
    changes = [
        f"{key} is {new.get(key)}, was {old.get(key)}"
        for key in sorted(old.keys() & new.keys())  # a record of an earlier version lacks some
        if old.get(key) != new.get(key)
    ]
    if changes:
        raise OutputError(
            f"the search in {out} cannot be continued as another one: {'; '.join(changes)}; give the same settings, or "
            "start a new run with another --out"
        )
    if before.fingerprint != now.fingerprint:
        raise OutputError(
            f"the images behind data.source have changed since the search in {out} began; start a new run with another --out"
        )


def _fixed_settings(result: SearchResult) -> dict[str, Any]:
    """The settings of a search, by dotted key, that it must be continued with."""
    return {
        key if "." in key else f"search.{key}": value
        for key, value in result.search_settings.items()
        if key not in MAY_CHANGE
    }
