"""A job that trains nothing: what it would do, and what that would cost."""

from __future__ import annotations

import os

from bim.orchestrator.jobs.automatic import local_precision, machine_resources
from bim.orchestrator.jobs.layouts import shared_layouts, single_layouts
from bim.orchestrator.jobs.prepare import PreparedJob
from bim.orchestrator.reporting.estimate import estimate_lines
from bim.orchestrator.reporting.startup import data_notes, opening_lines
from bim.orchestrator.runs.estimate import estimate_run


def dry_run_lines(job: PreparedJob) -> list[str]:
    """Layout, memory, time, disk and GPU hours of every backbone of a job. Nothing is written and Ray is not started.

    Raises:
        PlacementError, ClusterError: the stages do not fit, or the cluster cannot be reached.
    """
    settings, cluster = job.settings, machine_resources()
    if job.compares:
        layouts = shared_layouts(job.backbones, cluster, settings.placement.gpus_per_stage)
    else:
        layouts = [single_layouts(job.backbones[0], cluster)]
    lines: list[str] = []
    for prepared, (layout, *_) in zip(job.backbones, layouts, strict=True):
        run, images = prepared.run, (prepared.source, prepared.splits)
        *opening, _ = opening_lines(run, prepared, layout)
        lines += [*opening, *data_notes(prepared)]
        precision = local_precision(run.settings, layout.gpus)
        estimate = estimate_run(run, images, layout, precision, int(cluster.cpus) or os.cpu_count() or 1)
        gpus = layout.gpus * len(layout.stage_blocks)
        lines += ["", *estimate_lines(estimate, gpus, settings.estimate.price_per_gpu_hour), ""]
    return [*lines, "a dry run: nothing was trained and nothing written"]
