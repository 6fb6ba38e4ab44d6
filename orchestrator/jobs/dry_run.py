"""A job that trains nothing: what it would do, and what that would cost."""

from __future__ import annotations

import os
from dataclasses import replace

from bim.orchestrator.distributed.placement import concurrent_backbones
from bim.orchestrator.jobs.automatic import machine_resources
from bim.orchestrator.jobs.cost import cpus_of_each, estimate_backbone, expected_precision, step_times
from bim.orchestrator.jobs.layouts import shared_layouts, single_layouts
from bim.orchestrator.jobs.prepare import PreparedJob
from bim.orchestrator.reporting.estimate import estimate_lines, sum_lines
from bim.orchestrator.reporting.startup import data_notes, opening_lines


def dry_run_lines(job: PreparedJob) -> list[str]:
    """Layout, memory, time, disk and GPU hours of every backbone of a job. Nothing is written.

    Without `RAY_ADDRESS` Ray is not started.

    Raises:
        PlacementError, ClusterError: the stages do not fit, or the cluster cannot be reached.
    """
    settings, cluster = job.settings, machine_resources()
    cluster = replace(cluster, cpus=cluster.cpus or float(os.cpu_count() or 1))
    gpus_per_stage, price = settings.placement.gpus_per_stage, settings.estimate.price_per_gpu_hour
    if job.compares:
        layouts = shared_layouts(job.backbones, cluster, gpus_per_stage)
    else:
        layouts = [single_layouts(job.backbones[0], cluster)]
    cpus = cpus_of_each(len(job.backbones), cluster, gpus_per_stage)
    lines: list[str] = []
    estimates = []
    for prepared, of_backbone in zip(job.backbones, layouts, strict=True):
        run, layout = prepared.run, of_backbone[0]
        *opening, _ = opening_lines(run, prepared, layout)
        lines += [*opening, *data_notes(prepared)]
        precision = expected_precision(run.settings, layout)
        times = step_times(run, (prepared.source, prepared.splits), layout, precision)
        estimates.append(estimate_backbone(prepared, of_backbone, precision, cluster, cpus, times))
        lines += ["", *estimate_lines(estimates[-1], price), ""]
    if job.compares:
        concurrent = concurrent_backbones(len(job.backbones), cluster, gpus_per_stage)
        lines += [*sum_lines(estimates, concurrent, price), ""]
    return [*lines, "a dry run: nothing was trained and nothing written"]
