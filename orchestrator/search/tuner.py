"""Optuna's searcher as the search uses it. Imports optuna, an optional extra: `search.py` imports this only when asked."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bim.orchestrator.config.transforms import settings_to_yaml, with_changes
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.cluster import result_of
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.search.controller import SearchCallback, SearchController, SearchSpec
from bim.orchestrator.search.objective import ObjectiveSpec, Score, score_checkpoint
from bim.orchestrator.search.results import (
    FOLDER,
    SearchResult,
    TrialRow,
    load_result,
    save_result,
    with_best,
)
from bim.orchestrator.search.space import Choice, Range, Space, combinations, decoded, draw_settings, encoded
from bim.orchestrator.search.trial import DRIVER_CPUS, InfeasibleSettings, Scorer, TrialSpec, run_trial
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError
from bim.orchestrator.training.spec import PretrainSpec


class OptunaIgnoringUnscored(OptunaSearch):
    """Passes over reports that carry no score, as those of infeasible and failing trials do; Ray's own stops at them.

    How such a trial ended Optuna hears all the same, when it is over.
    """

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if result.get(self.metric) is not None:
            super().on_trial_result(trial_id, result)


MIN_SCORING_BATCH = 8
"""Images that are embedded at a time when memory is short; with fewer it would not help any more."""

SCORING_SHARE = 0.1
"""Of the GPU of a trial's first stage: what the process that scores checkpoints takes of it in Ray's book-keeping."""

STATE_S = "5"
"""Seconds between two of Tune's own saved states: what a killed search may have to do again."""

RETRIES = 1
"""Times that a trial which failed or died is tried again, from its last checkpoint."""

TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints even when it is told not to
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # result files and TensorBoard for every trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the job's
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # an infeasible trial has no score
    "TUNE_GLOBAL_CHECKPOINT_S": STATE_S,
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def search(spec: SearchSpec, out: Path, listener: SearchCallback, stop: StopRequest) -> SearchResult:
    """Run the search, or go on with the one that was cut off in `out`. Ray is connected.

    Returns the result; unfinished if `stop` was set meanwhile, so that it can be continued.

    Raises:
        TrainingError: trial 0, the recipe's own setting, did not come to its end.
        PlacementError: the cluster has no room for a trial.
    """
    state = out / FOLDER / "tune"
    # By SIGUSR1 Tune saves its state and ends all trials.
    watch = SearchController(spec, out, listener, stop, end=partial(signal.raise_signal, signal.SIGUSR1))
    with _as_running(watch), _quiet():
        if continued := tune.Tuner.can_restore(str(state)):
            watch.result = load_result(out) or spec.empty
        trainable = tune.with_resources(_trainable(spec.plan, watch.settled()), _bundles(spec.plan))
        if continued:
            tuner = tune.Tuner.restore(str(state), trainable=trainable, resume_errored=True)
        else:
            tuner = _new_tuner(spec, trainable, watch)
        tuner.fit()
    if watch.error is not None:
        raise watch.error
    if stop.reason is not None:
        return watch.result
    return _finished(spec, out, watch.result)


def _new_tuner(spec: SearchSpec, trainable: Any, watch: SearchController) -> tune.Tuner:
    asked, plan = spec.settings.search, spec.plan
    own = spec.empty.own
    algorithm: Any
    if asked.searcher == "optuna":
        from bim.orchestrator.search.tuner import OptunaIgnoringUnscored

        logging.getLogger("optuna").setLevel(logging.WARNING)  # importing it has set it to INFO
        points = [own]
        samples = int(min(asked.trials, combinations(spec.space)))
        algorithm = OptunaIgnoringUnscored(
            metric="score", mode="max", points_to_evaluate=[_words(spec.space, own)], seed=spec.settings.seed
        )
    else:
        # Drawn here, without repetition: Tune's own draws may try one setting twice.
        points = draw_settings(spec.space, own, asked.trials, spec.settings.seed)
        samples = len(points)
        # Tune's own limit, below, does not reach this generator.
        algorithm = BasicVariantGenerator(
            points_to_evaluate=[_words(spec.space, point) for point in points],
            max_concurrent=plan.run_concurrently,
        )
    return tune.Tuner(
        trainable,
        param_space={key: _domain(values) for key, values in spec.space.items()},
        tune_config=tune.TuneConfig(
            num_samples=samples,
            search_alg=algorithm,
            scheduler=_scheduler(watch),
            max_concurrent_trials=plan.run_concurrently,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(Path(plan.folder).parent),
            callbacks=[_Callback()],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            verbose=0,
        ),
    )


def _finished(spec: SearchSpec, out: Path, result: SearchResult) -> SearchResult:
    result = replace(result, finished=True)
    alone = {"out": None, "resume": False, "search.trials": 0, "search.resume": False}
    best = with_changes(with_best(spec.settings, result), alone)
    head = f"# The best of the {len(result.rows)} trials of a search: trial {result.best.number}\n"
    save_result(out, result, head + settings_to_yaml(best))
    shutil.rmtree(spec.plan.folder, ignore_errors=True)
    return result


# -- in a trial's process ---------------------------------------------------------------------------------------------
def _trainable(plan: TrialSpec, settled: Mapping[str, dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """What Tune runs for every trial. settled: by Tune's name, the last report of those that are over by our record."""

    def trial(config: dict[str, Any]) -> None:
        name = tune.get_context().get_trial_id()
        if name in settled:  # and ended just before Tune's last saved state
            tune.report(settled[name])
            return
        changes = {key: decoded(value) if isinstance(value, str) else value for key, value in config.items()}
        group = ray.util.get_current_placement_group()
        layout = plan.layout
        if layout.gpus:  # the stage beside the scoring process leaves it a part of their GPU
            layout = replace(layout, gpus=round(layout.gpus * (1 - SCORING_SHARE), 4))

        def scorer(family: ResolvedRun, images: tuple[Source, Splits]) -> Scorer:
            if plan.layout.gpus:
                return _beside_first_stage(family, plan, group)
            torch.set_num_threads(layout.threads)
            return lambda spec, checkpoint: score_checkpoint(
                spec, images, plan.objective, checkpoint, plan.device
            )

        try:
            run_trial(replace(plan, layout=layout), changes, name, scorer, tune.report, group, 1)
        except InfeasibleSettings as error:
            tune.report({"infeasible": str(error)})
        except Exception as error:
            tune.report({"failed": _cause(error)})
            raise

    return trial


class _ScoreActor:
    """Scores checkpoints on the GPU of a trial's first stage."""

    def __init__(self, family_data: Any) -> None:
        self._images = family_data.open()

    def score(self, spec: PretrainSpec, checkpoint: Path, how: ObjectiveSpec, device: str) -> Score:
        """Fewer images at a time where the stage beside has left too little memory."""
        try:
            return score_checkpoint(spec, self._images, how, checkpoint, device)
        except torch.cuda.OutOfMemoryError:
            if how.batch_size <= MIN_SCORING_BATCH:
                raise
        torch.cuda.empty_cache()
        return self.score(spec, checkpoint, replace(how, batch_size=how.batch_size // 4), device)


def _beside_first_stage(family: ResolvedRun, plan: TrialSpec, group: PlacementGroup) -> Scorer:
    where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=1)
    share = round(plan.layout.gpus * SCORING_SHARE, 4)
    actor = (
        ray.remote(_ScoreActor)
        .options(num_cpus=0, num_gpus=share, scheduling_strategy=where, max_restarts=0)
        .remote(family.data)
    )
    return lambda spec, checkpoint: result_of(
        actor.score.remote(spec, checkpoint, plan.objective, plan.device)
    )


def _cause(error: BaseException) -> str:
    """One sentence; errors that are meant for the user speak for themselves."""
    text = next(iter(str(error).strip().splitlines()), "")
    return (
        text
        if isinstance(error, TrainingError | ValueError) and text
        else f"{type(error).__name__}: {text}"[:300]
    )


# -- in the driver ----------------------------------------------------------------------------------------------------
class _Callback(tune.Callback):
    """Tune's events, handed to the running search."""

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        _now().on_step(trials)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _now().on_start(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        _now().on_result(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _now().on_complete(trial)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _now().on_retry(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _now().on_error(trial)


class BaselineKeepingASHA(ASHAScheduler):
    """ASHA that lets the recipe's own setting run to its end, as the yardstick of all others.

    Args:
        own: the configuration of that trial.
        past: scores of a search that is continued; Tune does not keep its scheduler's.
    """

    def __init__(self, own: Mapping[str, Any], past: Sequence[TrialRow], **asha: Any) -> None:
        super().__init__(metric="score", mode="max", **asha)
        self._own = dict(own)
        for row in past:
            trial = SimpleNamespace(trial_id=row.tune_id)
            self.on_trial_add(None, trial)
            for point in row.curve:
                super().on_trial_result(None, trial, {"epoch": point.epoch, "score": point.score})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action: str = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE) if trial.config == self._own else action

    def __reduce__(self) -> tuple[Any, ...]:
        # In Tune's state file stands only that there is one: a continued search makes it anew from its record.
        return _scheduler_of_now, ()


_running: list[SearchController] = []
"""The search that runs in this process. Tune restores its callbacks and its scheduler from its own state file; they find
what they belong to here."""


def _now() -> SearchController:
    return _running[-1]


def _scheduler(watch: SearchController) -> ASHAScheduler:
    """ASHA, told of the scores that the record holds already."""
    spec, result = watch.spec, watch.result
    return BaselineKeepingASHA(
        own=_words(spec.space, result.own),
        past=result.rows,
        time_attr="epoch",
        max_t=result.epochs,
        grace_period=spec.grace,
        reduction_factor=spec.settings.search.reduction_factor,
    )


def _scheduler_of_now() -> ASHAScheduler:
    return _scheduler(_now())


@contextlib.contextmanager
def _as_running(watch: SearchController) -> Iterator[None]:
    _running.append(watch)
    try:
        yield
    finally:
        _running.remove(watch)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Tune prints nothing, writes no result files of its own, and leaves signals alone but for SIGUSR1."""
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


def _bundles(plan: TrialSpec) -> tune.PlacementGroupFactory:
    return tune.PlacementGroupFactory([{"CPU": DRIVER_CPUS}, *plan.layout.bundles], strategy="PACK")


def _folder_name(trial: Any) -> str:
    return f"trial-{trial.trial_id}"


def _words(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as Tune's configuration holds them: candidates as words, numbers of a range as they are."""
    return {key: encoded(value) if isinstance(space[key], Choice) else value for key, value in values.items()}


def _domain(values: Choice | Range) -> Any:
    if isinstance(values, Choice):
        return tune.choice([encoded(value) for value in values.values])
    if values.whole:
        make = tune.lograndint if values.log else tune.randint
        return make(int(values.low), int(values.high) + 1)
    return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)
