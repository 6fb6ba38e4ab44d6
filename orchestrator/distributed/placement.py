"""Which blocks live together, and what each stage asks of the cluster. Pure arithmetic: knows no Ray.

Serves the Ray stages and the settings' early checks: what cannot be placed is said before any actor starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


class PlacementError(ValueError):
    """The stages do not fit; the message tells what is asked and what the cluster has."""


@dataclass(frozen=True)
class ClusterResources:
    """CPUs and GPUs that the cluster has in all, and on how many machines that have CPUs to give."""

    cpus: float
    gpus: float
    nodes: int = 1


@dataclass(frozen=True)
class StageLayout:
    """Where blocks live.

    Args:
        places: the blocks of each stage, consecutive.
        gpus: GPUs per stage; a fraction shares one, 0 means CPU.
        cpus: CPUs per stage in Ray's book-keeping.
        loader_cpus: the same for the data loader beside stage 0.
        threads: torch CPU threads per stage.
    """

    places: tuple[tuple[int, ...], ...]
    gpus: float
    cpus: float
    loader_cpus: float
    threads: int

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Placement-group bundles: one per stage, the loader's share in the first."""
        bundles = [{"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}) for _ in self.places]
        bundles[0] = bundles[0] | {"CPU": round(self.cpus + self.loader_cpus, 4)}
        return bundles


def consecutive(blocks: int, stages: int) -> tuple[tuple[int, ...], ...]:
    """Cut block numbers 0..blocks-1 into runs of nearly equal length; the later ones are the longer (block 0 embeds too)."""
    bounds = [round(i * blocks / stages) for i in range(stages + 1)]
    return tuple(tuple(range(a, b)) for a, b in pairwise(bounds))


def compute_layout(
    blocks: int,
    cluster: ClusterResources,
    stages: int | None = None,
    gpus_per_stage: float | None = None,
    cpus_per_stage: float | None = None,
    threads_per_stage: int | None = None,
) -> StageLayout:
    """Decide the stages. None leaves a number to the cluster: a block per GPU when there are enough, several consecutive
    blocks per stage when there are fewer, shares of the CPUs when there are none.

    Raises:
        PlacementError: more stages than blocks, or more GPUs or CPUs asked than the cluster has.
    """
    if stages is not None and stages > blocks:
        raise PlacementError(f"placement.stages is {stages}, but there are only {blocks} blocks to place")
    if cluster.cpus <= 0:
        raise PlacementError(
            "the cluster has no CPUs for stages yet; start workers, or let it grow with placement.wait_s and "
            "placement.gpus_per_stage"
        )
    gpus = (1.0 if cluster.gpus >= 1 else 0.0) if gpus_per_stage is None else gpus_per_stage
    if gpus > 0:
        room = gpu_capacity(cluster.gpus, gpus)
        wanted = stages if stages is not None else max(1, min(blocks, room))
        if wanted > room:
            raise PlacementError(
                f"the settings ask for {wanted} stage{'s' * (wanted > 1)} of {gpus:g} GPU each, and the cluster has "
                f"{cluster.gpus:g} GPU; lower placement.stages, or set placement.gpus_per_stage to a fraction, so that "
                "stages share a GPU, or to 0 for CPUs alone"
            )
    else:
        wanted = blocks if stages is None else stages
    # An actor never spans two machines: the loader and the stages are dealt out over them first.
    per_node = -(-(wanted + 1) // max(1, cluster.nodes))
    share = math.floor(min(1.0, cluster.cpus / max(1, cluster.nodes) / per_node) * 100) / 100
    cpus = share if cpus_per_stage is None else cpus_per_stage
    if cpus * wanted > cluster.cpus + 1e-6:
        raise PlacementError(
            f"the settings ask for {wanted} stage{'s' * (wanted > 1)} of {cpus:g} CPU each, and the cluster has "
            f"{cluster.cpus:g} CPU; lower placement.cpus_per_stage or placement.stages"
        )
    loader = math.floor(max(0.0, min(share, cluster.cpus - cpus * wanted)) * 100) / 100
    threads = threads_per_stage or max(1, int(cluster.cpus // wanted) if gpus == 0 else int(cpus))
    return StageLayout(consecutive(blocks, wanted), gpus, cpus, loader, threads)


@dataclass(frozen=True)
class ResourceShare:
    """What one of several families gets to plan with: a part of the cluster, and in how many stages at most."""

    cluster: ClusterResources
    stages: int


def shares(
    blocks: Sequence[int], cluster: ClusterResources, gpus_per_stage: float | None = None
) -> tuple[ResourceShare, ...]:
    """Divide a cluster among families of so many blocks, so that as many as can live side by side.

    With GPUs every family gets an equal part of them, the first ones those that are left over, and one at least: where there
    are fewer GPUs than families, the last ones wait. Without GPUs as many families as there are CPUs share them, in
    no more stages than they have CPUs, but two, so that there is a pipeline.
    """
    families = len(blocks)
    gpus = (1.0 if cluster.gpus >= 1 else 0.0) if gpus_per_stage is None else gpus_per_stage
    if gpus > 0:
        room = gpu_capacity(cluster.gpus, gpus)
        beside = max(1, min(families, room))
        each, left = divmod(room, beside)
        wanted = [min(b, max(1, each + (i < left))) for i, b in enumerate(blocks)]
    else:
        beside = max(1, min(families, int(cluster.cpus)))
        wanted = [min(b, max(2, int(cluster.cpus / beside))) for b in blocks]
    part = ClusterResources(cluster.cpus / beside, cluster.gpus, cluster.nodes)
    return tuple(ResourceShare(part, stages) for stages in wanted)


def gpu_capacity(gpus: float, per_stage: float) -> int:
    """How many stages of `per_stage` GPUs fit into `gpus` whole GPUs (a fraction never spans two of them)."""
    if per_stage >= 1:
        return int(gpus // per_stage)
    return int(gpus) * int(1 / per_stage + 1e-6)
