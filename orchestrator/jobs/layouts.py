"""Where the stages of every backbone of a job live: on the whole cluster, or each on its share of it."""

from __future__ import annotations

from collections.abc import Sequence

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.distributed.placement import ClusterResources, PlacementError, StageLayout, shares
from bim.orchestrator.jobs.backbone_entries import ErrorCollector
from bim.orchestrator.runs.prepare import PreparedBackbone
from bim.orchestrator.runs.train import resolve_layout


def single_layouts(backbone: PreparedBackbone, cluster: ClusterResources) -> list[StageLayout]:
    """The layout of a backbone, and of its baseline if there is one, on the whole cluster. Raises PlacementError."""
    return [resolve_layout(run.settings, cluster) for run in backbone.runs]


def shared_layouts(
    backbones: Sequence[PreparedBackbone], cluster: ClusterResources, gpus_per_stage: float | None
) -> list[list[StageLayout]]:
    """The same for each of several backbones, on its share of the cluster.

    Settings that ask for more than the share are planned on the whole cluster; the backbone waits for that.

    Raises:
        PlacementError: one line for every backbone that does not fit.
    """
    blocks = [backbone.run.settings.num_blocks for backbone in backbones]
    layouts: list[list[StageLayout]] = []
    errors = ErrorCollector(PlacementError)
    for backbone, resources in zip(backbones, shares(blocks, cluster, gpus_per_stage), strict=True):
        with errors.of(backbone.name):
            layouts.append(
                [_layout(run.settings, cluster, resources.cluster, resources.stages) for run in backbone.runs]
            )
    errors.raise_if_any()
    return layouts


def _layout(
    settings: Settings, cluster: ClusterResources, part: ClusterResources, stages: int
) -> StageLayout:
    if settings.placement.backend != "ray":
        return resolve_layout(settings, cluster)
    shared = settings
    grows = settings.placement.wait_s > 0 and settings.placement.gpus_per_stage
    if settings.placement.stages is None and not grows:
        shared = with_changes(settings, {"placement.stages": min(stages, settings.num_blocks)})
    try:
        # GPUs are divided by the number of stages, CPUs by the share.
        return resolve_layout(shared, ClusterResources(part.cpus, cluster.gpus, part.nodes))
    except PlacementError:
        return resolve_layout(settings, cluster)
