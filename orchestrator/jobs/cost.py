"""What a job will cost: the times of its backbones, probed where their device is, and the lines that say it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.cluster import ray_cluster, run_on_worker
from bim.orchestrator.distributed.placement import ClusterResources, StageLayout, concurrent_backbones
from bim.orchestrator.files import StorageError
from bim.orchestrator.jobs.backbone_run import BackboneRun
from bim.orchestrator.reporting.estimate import summary_lines
from bim.orchestrator.runs.estimate import estimate_run, times_of_another
from bim.orchestrator.runs.estimate_records import BackboneEstimate, SearchEstimate
from bim.orchestrator.runs.prepare import PreparedBackbone, ResolvedRun
from bim.orchestrator.runs.step_probe import Probe, StepTimes
from bim.orchestrator.runs.step_times import (
    known_times,
    micro_batch_seconds,
    probe_steps,
    remember_times,
    save_times,
    training_seconds,
)
from bim.orchestrator.runs.train import placement_timeout_s, resolve_precision
from bim.orchestrator.search.controller import epochs_of_trials
from bim.orchestrator.search.trial import trial_epochs, trial_placement
from bim.orchestrator.training.spec import Precision

MIN_STEPS = 200
"""A shorter run is over before an estimate of it is worth its time."""

Result = TypeVar("Result")

log = logging.getLogger(__name__)


def log_estimate(backbone: BackboneRun, cluster: ClusterResources, cpus: float) -> list[str]:
    """Time, disk and GPU hours of a run that begins; nothing for one that is resumed or very short.

    cpus: the share of the cluster that the backbone trains on.

    Returns the lines that are logged.

    The scanned digits are not probed: their times are computed from the arithmetic, and on GPUs nothing is logged.
    """
    prepared, layout = backbone.prepared, backbone.layouts[0]
    run, is_probed = prepared.run, prepared.run.settings.data.source != "digits"
    if run.settings.resume or (layout.gpus and not is_probed):
        return []
    probe, is_short = Probe.of(run, layout, backbone.precision), run.total_steps < MIN_STEPS
    times = known_times(probe)
    if is_probed and times is None and not is_short:
        times = step_times(run, (prepared.source, prepared.splits), layout, backbone.precision)
    if times is not None:
        try:
            save_times(run.out, probe, times)
        except StorageError as error:
            log.warning("%s", error)
    if is_short:
        return []
    estimate = estimate_backbone(prepared, backbone.layouts, backbone.precision, cluster, cpus, times)
    lines = summary_lines(estimate, run.settings.estimate.price_per_gpu_hour)
    for line in lines:
        log.info(line)
    return lines


def estimate_backbone(
    prepared: PreparedBackbone,
    layouts: Sequence[StageLayout],
    precision: Precision,
    cluster: ClusterResources,
    cpus: float,
    times: StepTimes | None,
) -> BackboneEstimate:
    """What a backbone will cost with its baseline and its search.

    Args:
        layouts: of the run, and of the baseline if there is one.
        cpus: the share of the cluster that they train on.
        times: of the run; None: computed.
    """
    run, images = prepared.run, (prepared.source, prepared.splits)
    estimate = estimate_run(run, images, layouts[0], precision, cpus, times)
    baseline = None
    if prepared.baseline is not None:
        baseline_times = None
        if times is not None:
            baseline_times = times_of_another(run, times, prepared.baseline, layouts[1])
        baseline = estimate_run(
            prepared.baseline, images, layouts[1], precision, cpus, baseline_times, evaluated_sets=1
        )
    search = None
    if run.settings.search.trials and not prepared.name:  # several backbones are not searched
        search = _search_estimate(run, times, cluster)
    return BackboneEstimate(estimate, baseline, search)


def _search_estimate(run: ResolvedRun, times: StepTimes | None, cluster: ClusterResources) -> SearchEstimate:
    """At the settings of the run; other mask ratios and resolutions cost more or less."""
    settings = run.settings
    layout, concurrent = trial_placement(settings, cluster)
    times = times_of_another(run, times, run, layout)
    micro_s = micro_batch_seconds(
        times, layout, settings.placement.backend, cluster.cpus / concurrent, settings.data.workers
    )
    epoch_s = training_seconds(run, micro_s) / settings.schedule.epochs / concurrent
    expected, most = epochs_of_trials(settings)
    gpus = layout.gpus * len(layout.stage_blocks) * concurrent
    return SearchEstimate(
        settings.search.trials, trial_epochs(settings), expected * epoch_s, most * epoch_s, gpus
    )


def step_times(
    run: ResolvedRun, images: tuple[Source, Splits], layout: StageLayout, precision: Precision
) -> StepTimes:
    """Of the last phase: what an equal probe found earlier, or of a probe now, where the device of the stages is.

    Raises:
        ClusterError, PlacementError: there is no room for the probe.
        DataError: the node that has the device cannot read the images.
        TrainingError: not even a small micro-batch fits the device.
    """
    probe = Probe.of(run, layout, precision)
    times = known_times(probe)
    if times is None:
        times = on_device(probe_steps, layout, run.settings, probe, images=images)
        remember_times(probe, times)
    return times


def on_device(
    function: Callable[..., Result],
    layout: StageLayout,
    settings: Settings,
    *args: object,
    images: tuple[Source, Splits],
) -> Result:
    """`function(*args, images)` in this process; `function(*args)` on a GPU of the cluster where this process has none.

    Raises:
        ClusterError, PlacementError: there is no room for it.
    """
    if _has_device(layout):
        return function(*args, images)
    with ray_cluster():
        return run_on_worker(function, layout, *args, within_s=placement_timeout_s(settings))


def _has_device(layout: StageLayout) -> bool:
    return not layout.gpus or torch.cuda.is_available()


def expected_precision(settings: Settings, layout: StageLayout) -> Precision:
    """The precision that a run will have, before it begins.

    Raises:
        ClusterError, PlacementError: only a GPU of the cluster knows, and none becomes free.
    """
    if settings.optim.precision != "auto":
        return settings.optim.precision
    if not layout.gpus:
        return "fp32"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    with ray_cluster():
        return resolve_precision(settings, layout)


def cpus_of_each(backbones: int, cluster: ClusterResources, gpus_per_stage: float | None) -> float:
    """CPUs of each of several backbones, which divide the cluster."""
    return cluster.cpus / concurrent_backbones(backbones, cluster, gpus_per_stage)
