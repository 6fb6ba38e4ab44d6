"""Training of one family on the stages of one layout, from its last checkpoint to its end.

Serves the main job, its baseline and the trials of a search; decides where blocks live and in which precision. No MLflow.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import settings_to_mapping
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.distributed.cluster import run_on_worker
from bim.orchestrator.distributed.placement import (
    ClusterResources,
    PlacementError,
    StageLayout,
    compute_layout,
    consecutive,
)
from bim.orchestrator.distributed.placement_group import PlacementGroup
from bim.orchestrator.distributed.ray_stage_group import RayStages
from bim.orchestrator.runs.output_dir import OutputError
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.signals import stop_on_signals
from bim.orchestrator.training.callbacks import Callback, PretrainResult, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.errors import TrainingError
from bim.orchestrator.training.loop import pretrain
from bim.orchestrator.training.lr_schedule import CosineSchedule
from bim.orchestrator.training.manifest import Manifest
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.schedule import TrainingSchedule
from bim.orchestrator.training.spec import Precision, PretrainSpec
from bim.orchestrator.training.stage_group import InProcessStages, Stages

log = logging.getLogger(__name__)


class ProgressCallback(Callback, Protocol):
    """A listener that also remembers whether the stages have stood once, ready to train."""

    started: bool


def train(
    family: ResolvedRun,
    layout: StageLayout,
    precision: Precision,
    listener: ProgressCallback,
    stop: StopRequest,
    group: PlacementGroup | None = None,
    first_bundle: int = 0,
) -> PretrainResult:
    """Train one family from its last checkpoint to its end, on the stages of `layout`.

    Args:
        group: a placement group with room for the stages from `first_bundle` on; None: one of their own. With one given,
            signals are somebody else's to hear.

    Raises:
        OutputError: the checkpoint was trained in another precision.
        PlacementError, DataError: before the first step; later on they are a TrainingError.
    """
    settings = family.settings
    spec = replace(family.spec, optim=replace(family.spec.optim, precision=precision))
    family.out.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(family.out, settings.checkpoint.keep)
    store.clear_uncommitted()
    check_precision(family.out, precision)
    plan = run_plan(family, layout)
    facts = {"data": family.fingerprint, "precision": precision}

    def manifest(step: int) -> Manifest:
        return Manifest(step, family.phases[0].steps_per_epoch, settings_to_mapping(settings), facts, ())

    stages = make_stages(family, spec, layout, group, first_bundle)
    policy = RestartPolicy(settings.failures.max_restarts)
    try:
        if group is not None:
            return pretrain(plan, stages, store, manifest, listener, policy, stop)
        with stop_on_signals(stop, log.info):
            return pretrain(plan, stages, store, manifest, listener, policy, stop)
    except (PlacementError, DataError) as error:
        if not listener.started:
            raise
        raise TrainingError(str(error)) from error
    finally:
        stages.close()


def run_plan(family: ResolvedRun, layout: StageLayout) -> TrainingSchedule:
    """How long and how fast the family is trained."""
    settings, first = family.settings, family.phases[0]
    schedule = settings.schedule
    return TrainingSchedule(
        epochs=schedule.epochs,
        phases=family.phases,
        lr=CosineSchedule(settings.optim.blr, schedule.warmup_epochs, schedule.epochs, family.phases),
        window=settings.placement.window or default_window(settings, layout),
        checkpoint_epochs=settings.checkpoint.every_epochs,
        max_bad_images=int(settings.data.max_bad_fraction * first.steps_per_epoch * first.images_per_step),
    )


def default_window(settings: Settings, layout: StageLayout) -> int:
    """Micro-batches under way: two for every stage; in one process a step is over when it has been submitted."""
    return 2 * len(layout.stage_blocks) if settings.placement.backend == "ray" else 1


def check_precision(out: Path, precision: Precision) -> None:
    """Raise OutputError if the run in `out` was trained in another precision so far."""
    found = CheckpointStore(out).latest()
    before = precision if found is None else found.facts.get("precision", precision)
    if before != precision:
        raise OutputError(
            f"the run was trained in {before} and would go on in {precision} on these devices; "
            f"set optim.precision to {before}, or start a new run with another --out"
        )


def make_stages(
    family: ResolvedRun,
    spec: PretrainSpec,
    layout: StageLayout,
    group: PlacementGroup | None = None,
    first_bundle: int = 0,
) -> Stages:
    """The group of stages that the settings ask for, not yet started."""
    if family.settings.placement.backend == "ray":
        wait_s = max(120.0, family.settings.placement.wait_s)
        return RayStages(spec, family.data, layout, family.out, wait_s, group, first_bundle)
    device = "cuda" if layout.gpus else "cpu"
    return InProcessStages(spec, family.data.train_batches, layout.stage_blocks, device, layout.threads)


def resolve_layout(settings: Settings, cluster: ClusterResources) -> StageLayout:
    """Where the blocks of these settings live. Raises PlacementError."""
    asked = settings.placement
    if asked.backend == "ray":
        given = (asked.stages, asked.gpus_per_stage, asked.cpus_per_stage, asked.threads_per_stage)
        if asked.wait_s > 0 and asked.gpus_per_stage:  # what is not there yet is waited for, not refused
            stages = asked.stages or settings.num_blocks
            needed = ClusterResources(
                (asked.cpus_per_stage or 1.0) * (stages + 1), asked.gpus_per_stage * stages
            )
            cluster = ClusterResources(max(cluster.cpus, needed.cpus), max(cluster.gpus, needed.gpus))
        return compute_layout(settings.num_blocks, cluster, *given)
    use_gpu = cluster.gpus > 0 and asked.gpus_per_stage != 0
    if asked.gpus_per_stage and not use_gpu:
        raise PlacementError(
            "placement.gpus_per_stage asks for a GPU, and this process sees none; set it to 0"
        )
    places = consecutive(settings.num_blocks, asked.stages or 1)
    threads = asked.threads_per_stage or torch.get_num_threads()
    return StageLayout(places, float(use_gpu), cpus=1.0, loader_cpus=0.0, threads=threads)


def resolve_precision(settings: Settings, layout: StageLayout) -> Precision:
    """What `auto` means: bfloat16 where the stages' GPUs have it, else float32."""
    asked = settings.optim.precision
    if asked != "auto":
        return asked
    if not layout.gpus:
        return "fp32"
    able = run_on_worker(_has_bf16, layout) if settings.placement.backend == "ray" else _has_bf16()
    return "bf16" if able else "fp32"


def _has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
