"""The search with Ray Tune: trials in placement groups, ASHA, and continuation after signals and after kill -9.

Tune saves the states of trials and of the searcher. Rows and scores are saved by the controller, at every event, from which
the scheduler is made again; so a continued search trains no trial twice that the record knows as completed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from bim.orchestrator.config.transforms import settings_to_yaml, with_changes
from bim.orchestrator.search.controller import SearchCallback, SearchController, SearchSpec
from bim.orchestrator.search.results import SearchResult, TrialRow, load_result, save_result, with_best
from bim.orchestrator.search.space import Choice, Range, Space, combinations, draw_settings, encode_choice
from bim.orchestrator.search.trainable import make_trainable
from bim.orchestrator.search.trial import DRIVER_CPUS
from bim.orchestrator.training.callbacks import StopRequest

EXPERIMENT = "tune"
"""Name of Tune's experiment, and of the folder of its state."""

RETRIES = 1
"""Restarts of a trial that failed or died, from its last checkpoint."""

TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints even with verbose=0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # result files and TensorBoard for every trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the job handles signals
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # an infeasible trial has no score
    "TUNE_GLOBAL_CHECKPOINT_S": "5",  # seconds between two saved states, at most lost by a killed search
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def search(spec: SearchSpec, out: Path, callback: SearchCallback, stop: StopRequest) -> SearchResult:
    """Run the search, or continue the one that was interrupted in `out`. Ray is connected.

    Returns the result; unfinished if `stop` was set meanwhile, so that it can be continued.

    Raises:
        TrainingError: trial 0, the baseline, could not be trained to its end.
        PlacementError: the cluster has no room for a trial.
    """
    trial, storage = spec.trial, Path(spec.trial.folder).parent
    has_state = any((storage / EXPERIMENT).glob("experiment_state-*"))
    result = (load_result(out) if has_state else None) or spec.initial
    # On SIGUSR1 Tune saves its state and ends all trials. `Stopper.stop_all` would mark them as terminated, and a continued
    # search would not train them to their end.
    interrupt = partial(signal.raise_signal, signal.SIGUSR1)
    controller = SearchController(spec, result, out, callback, stop, interrupt)
    trainable = make_trainable(trial, controller.completed_trials())
    bundles = [{"CPU": DRIVER_CPUS}, *trial.layout.bundles]
    searcher, num_samples = _searcher(spec)
    with _quiet():
        # `tune.Tuner.restore` takes callbacks and scheduler from a pickle; `tune.run` takes new ones.
        tune.run(
            tune.with_resources(trainable, tune.PlacementGroupFactory(bundles, strategy="PACK")),
            name=EXPERIMENT,
            storage_path=str(storage),
            resume="AUTO+ERRORED",
            config={key: _domain(values) for key, values in spec.space.items()},
            num_samples=num_samples,
            search_alg=searcher,
            scheduler=_scheduler(spec, result),
            callbacks=[_TuneCallback(controller)],
            max_concurrent_trials=trial.max_concurrent_trials,
            max_failures=RETRIES,
            raise_on_failed_trial=False,
            trial_dirname_creator=_trial_dirname,
            verbose=0,
        )
    if controller.error is not None:
        raise controller.error
    if stop.reason is not None:
        return controller.result
    return _finished(spec, out, controller.result)


def _searcher(spec: SearchSpec) -> tuple[Any, int]:
    """The search algorithm of Tune, and its number of samples; the baseline comes first."""
    settings, trial = spec.settings.search, spec.trial
    baseline = spec.initial.baseline_values
    if settings.searcher == "optuna":
        from bim.orchestrator.search.optuna_searcher import OptunaIgnoringUnscored

        logging.getLogger("optuna").setLevel(logging.WARNING)  # importing optuna sets it to INFO
        points = [_to_tune_config(spec.space, baseline)]
        searcher = OptunaIgnoringUnscored(
            metric="score", mode="max", points_to_evaluate=points, seed=spec.settings.seed
        )
        return searcher, int(min(settings.trials, combinations(spec.space)))
    # Drawn here, without repetition: Tune's own draws may try one configuration twice.
    draws = draw_settings(spec.space, baseline, settings.trials, spec.settings.seed)
    points = [_to_tune_config(spec.space, draw) for draw in draws]
    # `max_concurrent_trials` of `tune.run` does not reach this generator.
    return BasicVariantGenerator(points, max_concurrent=trial.max_concurrent_trials), len(points)


def _finished(spec: SearchSpec, out: Path, result: SearchResult) -> SearchResult:
    result = replace(result, finished=True)
    changes = {"out": None, "resume": False, "search.trials": 0, "search.resume": False}
    best = with_changes(with_best(spec.settings, result), changes)
    head = f"# The best of the {len(result.rows)} trials of a search: trial {result.best.number}\n"
    save_result(out, result, head + settings_to_yaml(best))
    shutil.rmtree(spec.trial.folder, ignore_errors=True)
    return result


class _TuneCallback(tune.Callback):
    """Passes Tune's events to the controller."""

    def __init__(self, controller: SearchController) -> None:
        self._controller = controller

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._controller.on_step(trials)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._controller.on_start(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._controller.on_result(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._controller.on_complete(trial)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._controller.on_retry(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._controller.on_error(trial)


class BaselineKeepingASHA(ASHAScheduler):
    """ASHA that never stops the trial of the baseline.

    Args:
        baseline: the Tune configuration of that trial.
        past: rows of a search that is continued; Tune does not save the state of its scheduler.
    """

    def __init__(self, baseline: Mapping[str, Any], past: Sequence[TrialRow], **asha: Any) -> None:
        super().__init__(metric="score", mode="max", **asha)
        self._baseline = dict(baseline)
        for row in past:
            trial = SimpleNamespace(trial_id=row.tune_id)
            self.on_trial_add(None, trial)
            for score in row.curve:
                super().on_trial_result(None, trial, {"epoch": score.epoch, "score": score.score})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action: str = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE) if trial.config == self._baseline else action


def _scheduler(spec: SearchSpec, result: SearchResult) -> ASHAScheduler:
    return BaselineKeepingASHA(
        baseline=_to_tune_config(spec.space, result.baseline_values),
        past=result.rows,
        time_attr="epoch",
        max_t=result.epochs,
        grace_period=spec.grace_period,
        reduction_factor=spec.settings.search.reduction_factor,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Tune prints nothing, writes no result files of its own, and handles no signal but SIGUSR1."""
    before = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air", "optuna")]
    levels = [logger.level for logger in loggers]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    os.environ.update(TUNE_ENVIRONMENT)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _trial_dirname(trial: Any) -> str:
    return f"trial-{trial.trial_id}"


def _to_tune_config(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as a configuration of Tune: candidates encoded, numbers of a range as they are."""
    return {
        key: encode_choice(value) if isinstance(space[key], Choice) else value
        for key, value in values.items()
    }


def _domain(values: Choice | Range) -> Any:
    if isinstance(values, Choice):
        return tune.choice([encode_choice(value) for value in values.values])
    if values.is_integer:
        make = tune.lograndint if values.log else tune.randint
        return make(int(values.low), int(values.high) + 1)
    return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)
