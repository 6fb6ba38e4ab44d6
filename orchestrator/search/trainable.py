"""The trainable of Ray Tune: one trial in its own process, its checkpoints scored there or beside its first stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch
from ray import tune
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bim.orchestrator.data.source import Source
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.cluster import result_of
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.search.objective import score_checkpoint
from bim.orchestrator.search.results import Score
from bim.orchestrator.search.spec import TrialSpec
from bim.orchestrator.search.trial import InfeasibleSettings, Scorer, run_trial
from bim.orchestrator.text import first_line
from bim.orchestrator.training.errors import TrainingError
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.storage import Location

MIN_SCORING_BATCH = 8
"""Images that are embedded at a time when GPU memory is short; a smaller batch saves little."""

SCORING_GPU_FRACTION = 0.1
"""Fraction of the GPU of a trial's first stage that the scoring actor requests from Ray."""


def make_trainable(spec: TrialSpec) -> Callable[[dict[str, Any]], None]:
    """The function trainable of every trial; its configuration has the trial's number and its changes of the recipe."""

    def trial(config: dict[str, Any]) -> None:
        placement_group = ray.util.get_current_placement_group()
        layout = spec.layout
        if layout.gpus:  # the first stage leaves a fraction of its GPU to the scoring actor
            layout = replace(layout, gpus=round(layout.gpus * (1 - SCORING_GPU_FRACTION), 4))

        def scorer(run: ResolvedRun, images: tuple[Source, Splits]) -> Scorer:
            if spec.layout.gpus:
                return _scorer_beside_first_stage(run.data, spec, placement_group)
            torch.set_num_threads(layout.threads)
            return lambda pretrain_spec, checkpoint: score_checkpoint(
                pretrain_spec, images, spec.evaluation, checkpoint, spec.device
            )

        try:
            trial_spec, name = replace(spec, layout=layout), str(config["number"])
            run_trial(trial_spec, config["changes"], name, scorer, tune.report, placement_group, 1)
        except InfeasibleSettings as error:
            tune.report({"infeasible": str(error)})
        except Exception as error:
            tune.report({"failed": _cause(error)})
            raise

    return trial


class _ScoreActor:
    """Scores checkpoints on the GPU of a trial's first stage."""

    def __init__(self, data: DataSpec) -> None:
        self._images, self._workers = data.open(), data.workers

    def score(self, spec: PretrainSpec, checkpoint: Location, config: EvalConfig, device: str) -> Score:
        """Score a checkpoint, with smaller batches where the stage leaves too little memory."""
        try:
            return score_checkpoint(spec, self._images, config, checkpoint, device, self._workers)
        except torch.cuda.OutOfMemoryError:
            if config.batch_size <= MIN_SCORING_BATCH:
                raise
        torch.cuda.empty_cache()
        return self.score(spec, checkpoint, replace(config, batch_size=config.batch_size // 4), device)


def _scorer_beside_first_stage(data: DataSpec, spec: TrialSpec, placement_group: PlacementGroup) -> Scorer:
    strategy = PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index=1)
    gpus = round(spec.layout.gpus * SCORING_GPU_FRACTION, 4)
    actor = (
        ray.remote(_ScoreActor)
        .options(num_cpus=0, num_gpus=gpus, scheduling_strategy=strategy, max_restarts=0)
        .remote(data)
    )
    return lambda pretrain_spec, checkpoint: result_of(
        actor.score.remote(pretrain_spec, checkpoint, spec.evaluation, spec.device)
    )


def _cause(error: BaseException) -> str:
    """The first line of the message; with the type, unless the error is one of those that address the user."""
    text = first_line(error)
    if text and isinstance(error, TrainingError | ValueError):
        return text
    return f"{type(error).__name__}: {text}"[:300]
