"""What a run will cost, as the lines that open it: from a probe, or computed where a probe would cost more than it tells."""

from __future__ import annotations

import logging

import torch

from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.jobs.backbone_run import BackboneRun
from bim.orchestrator.reporting.estimate import summary_lines
from bim.orchestrator.runs.estimate import estimate_run

MIN_STEPS = 200
"""A shorter run is over before an estimate of it is worth its time."""

log = logging.getLogger(__name__)


def log_estimate(backbone: BackboneRun, cluster: ClusterResources) -> list[str]:
    """Time, disk and GPU hours of a run that begins; nothing for one that is resumed or very short.

    Returns the lines that are logged.

    The scanned digits are not probed: their times are computed from the arithmetic.
    """
    run, layout = backbone.prepared.run, backbone.layouts[0]
    if run.settings.resume or run.total_steps < MIN_STEPS:
        return []
    if layout.gpus and not torch.cuda.is_available():  # the driver has none of the GPUs that the stages have
        return []
    images = (backbone.prepared.source, backbone.prepared.splits)
    is_probed = run.settings.data.source != "digits"
    estimate = estimate_run(run, images, layout, backbone.precision, max(1, int(cluster.cpus)), is_probed)
    gpus = layout.gpus * len(layout.stage_blocks)
    lines = summary_lines(estimate, gpus, run.settings.estimate.price_per_gpu_hour)
    for line in lines:
        log.info(line)
    return lines
