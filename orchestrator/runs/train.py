"""Training of one run on the stages of one layout, from its last checkpoint to its end.

Serves the backbones of a job, their baselines and the trials of a search; decides where blocks live and in which precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import recorded_mapping
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
from bim.orchestrator.files import StorageError
from bim.orchestrator.runs.checkpoints import checkpoints_location
from bim.orchestrator.runs.lease import Lease
from bim.orchestrator.runs.output_dir import OutputError, open_store
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.provenance import Machine, machine
from bim.orchestrator.runs.run_identity import RunIdentity
from bim.orchestrator.runs.run_store import open_run_store, storage_failure
from bim.orchestrator.runs.signals import stop_on_signals
from bim.orchestrator.training.callbacks import Callback, PretrainResult, StopRequest
from bim.orchestrator.training.errors import StageFailure, TrainingError
from bim.orchestrator.training.loop import pretrain
from bim.orchestrator.training.lr_schedule import CosineSchedule
from bim.orchestrator.training.manifest import Manifest
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.schedule import TrainingSchedule
from bim.orchestrator.training.spec import Precision, PretrainSpec
from bim.orchestrator.training.stage_group import InProcessStages, Stages

PLACEMENT_TIMEOUT_S = 120.0
"""How long stages wait for CPUs and GPUs at least; `placement.wait_s` gives more."""

log = logging.getLogger(__name__)


class ProgressCallback(Callback, Protocol):
    """A callback that knows whether the stages were ready to train once."""

    @property
    def started(self) -> bool: ...


def train(
    run: ResolvedRun,
    layout: StageLayout,
    precision: Precision,
    callback: ProgressCallback,
    stop: StopRequest,
    placement_group: PlacementGroup | None = None,
    first_bundle: int = 0,
    on_machines: Callable[[list[Machine]], None] | None = None,
    lease: Lease | None = None,
    score_epochs: int | None = None,
    is_kept: Callable[[int], bool] = lambda step: False,
) -> PretrainResult:
    """Train a run from its last checkpoint to its end, on the stages of `layout`. In the main thread a signal sets `stop`.

    Args:
        placement_group: one with room for the stages from `first_bundle` on; None: one of their own.
        on_machines: called with the machine of every stage, once they are ready to train.
        lease: of the output directory; the training ends where it is lost.
        score_epochs: epochs between checkpoints that `callback` scores; None: it scores none.
        is_kept: whether the checkpoint of a step stays although it is older than `checkpoint.keep`.

    Raises:
        OutputError: the checkpoint was trained in another precision, or all checkpoints of the run are unreadable or gone.
        TrainingError: the training cannot go on, and a restart would not help; of what the code of a stage raised the
            traceback was logged. The last checkpoint stays.
        PlacementError, DataError: before the first step; later on they are a TrainingError.
    """
    settings = run.settings
    spec = replace(run.spec, optim=replace(run.spec.optim, precision=precision))
    store = open_run_store(run, lease, is_kept)
    check_precision(run.out, precision, run.record)
    schedule = replace(training_schedule(run, layout), score_epochs=score_epochs)
    facts = {"data": run.fingerprint, "precision": precision}

    def manifest(step: int) -> Manifest:
        steps = run.phases[0].steps_per_epoch
        return Manifest(step, steps, recorded_mapping(settings), facts, (), run.run_id)

    stages = make_stages(run, spec, layout, placement_group, first_bundle)
    if on_machines is not None:
        callback = _MachineRecorder(callback, stages, on_machines)
    if layout.shortage:
        log.info(layout.shortage)
    policy = RestartPolicy(settings.failures.max_restarts)
    try:
        with stop_on_signals(stop, interrupts_idle=True):
            return pretrain(schedule, stages, store, manifest, _watching(callback, lease), policy, stop)
    except StorageError as error:
        raise TrainingError(storage_failure(error, run.out, run.record, store)) from error
    except (PlacementError, DataError) as error:
        if not callback.started:
            raise
        raise TrainingError(str(error)) from error
    except TrainingError:
        raise
    except Exception as error:
        failure = error.__cause__
        if not isinstance(failure, StageFailure):
            raise
        log_note = (
            "" if run.record is None else "; events.log has its traceback, and --verbose shows it"
        )  # trials have none
        raise TrainingError(
            f"{failure}, and a restart did not help{log_note}; the last checkpoint stays"
        ) from error
    finally:
        stages.close()


def _watching(callback: ProgressCallback, lease: Lease | None) -> Callback:
    """The callback; before every logged step it is seen whether the lease is lost."""
    return callback if lease is None else cast(Callback, _LeaseWatch(callback, lease))


class _LeaseWatch:
    """Passes every event on, and ends the training at the first step that is logged after the lease was lost."""

    def __init__(self, callback: Callback, lease: Lease) -> None:
        self._callback, self._lease = callback, lease

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._lease.raise_if_lost()
        self._callback.on_step(step, metrics)


class _MachineRecorder:
    """A callback that also collects the machines of the stages when they are ready for the first time."""

    def __init__(
        self, callback: ProgressCallback, stages: Stages, on_machines: Callable[[list[Machine]], None]
    ) -> None:
        self._callback, self._stages, self._on_machines = callback, stages, on_machines
        self.started = False
        self.on_step, self.on_epoch, self.on_checkpoint = (
            callback.on_step,
            callback.on_epoch,
            callback.on_checkpoint,
        )

    def on_rewind(self, step: int) -> None:
        self._callback.on_rewind(step)
        if not self.started:
            self._on_machines(self._stages.call(machine))
        self.started = True


def training_schedule(run: ResolvedRun, layout: StageLayout) -> TrainingSchedule:
    """How long and how fast the run is trained."""
    settings, first = run.settings, run.phases[0]
    schedule, every_minutes = settings.schedule, settings.checkpoint.every_minutes
    return TrainingSchedule(
        epochs=schedule.epochs,
        phases=run.phases,
        lr=CosineSchedule(settings.optim.blr, schedule.warmup_epochs, schedule.epochs, run.phases),
        window=settings.placement.window or default_window(settings, layout),
        checkpoint_epochs=settings.checkpoint.every_epochs,
        checkpoint_s=None if every_minutes is None else 60 * every_minutes,
        max_bad_images=int(settings.data.max_bad_fraction * first.steps_per_epoch * first.images_per_step),
    )


def default_window(settings: Settings, layout: StageLayout) -> int:
    """Micro-batches in flight: two for every stage; in one process a step is complete when it has been submitted."""
    return 2 * len(layout.stage_blocks) if settings.placement.backend == "ray" else 1


def check_precision(out: Path, precision: Precision, record: RunIdentity | None = None) -> None:
    """Raise OutputError if the run in `out` was trained in another precision so far."""
    latest = open_store(out, record).latest()
    before = precision if latest is None else latest.facts.get("precision", precision)
    if before != precision:
        raise OutputError(
            f"the run was trained in {before} and would go on in {precision} on these devices; "
            f"set optim.precision to {before}, or start a new run with another --out"
        )


def make_stages(
    run: ResolvedRun,
    spec: PretrainSpec,
    layout: StageLayout,
    placement_group: PlacementGroup | None = None,
    first_bundle: int = 0,
) -> Stages:
    """The group of stages that the settings ask for, not yet started."""
    if run.settings.placement.backend == "ray":
        wait_s = placement_timeout_s(run.settings)
        shared = checkpoints_location(run.out)
        return RayStages(spec, run.data, layout, shared, wait_s, placement_group, first_bundle)
    device = "cuda" if layout.gpus else "cpu"
    return InProcessStages(spec, run.data.train_batches, layout.stage_blocks, device, layout.threads)


def placement_timeout_s(settings: Settings) -> float:
    """How long the stages wait for CPUs and GPUs, in seconds."""
    return max(PLACEMENT_TIMEOUT_S, settings.placement.wait_s)


def resolve_layout(settings: Settings, cluster: ClusterResources) -> StageLayout:
    """Where the blocks of these settings live. Raises PlacementError."""
    placement = settings.placement
    if placement.backend == "ray":
        cpus, gpus, workers = placement.cpus_per_stage, placement.gpus_per_stage, settings.data.workers
        stages = placement.stages or settings.num_blocks
        if placement.wait_s > 0 and gpus and cluster.gpus < gpus * stages:
            # The cluster may still grow: it is waited for, not refused, and the size of its nodes is unknown.
            cluster = ClusterResources(max(cluster.cpus, (cpus or 1.0) * (stages + 1)), gpus * stages)
            workers = min(workers, 1)
        return compute_layout(
            settings.num_blocks, cluster, placement.stages, gpus, cpus, placement.threads_per_stage, workers
        )
    use_gpu = cluster.gpus > 0 and placement.gpus_per_stage != 0
    if placement.gpus_per_stage and not use_gpu:
        raise PlacementError(
            "placement.gpus_per_stage asks for a GPU, and this process sees none; set it to 0"
        )
    blocks = consecutive(settings.num_blocks, placement.stages or 1)
    threads = placement.threads_per_stage or torch.get_num_threads()
    return StageLayout(blocks, float(use_gpu), cpus=1.0, loader_cpus=0.0, threads=threads)


def resolve_precision(settings: Settings, layout: StageLayout) -> Precision:
    """What `auto` means: bfloat16 where the stages' GPUs have it, else float32."""
    if settings.optim.precision != "auto":
        return settings.optim.precision
    if not layout.gpus:
        return "fp32"
    if settings.placement.backend != "ray":
        has_bf16 = _has_bf16()
    else:
        has_bf16 = run_on_worker(_has_bf16, layout, within_s=placement_timeout_s(settings))
    return "bf16" if has_bf16 else "fp32"


def _has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
