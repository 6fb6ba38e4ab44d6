"""The blocks of each stage and the resources that it requests, computed before any actor starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


class PlacementError(ValueError):
    """The stages do not fit; the message names the request and the resources of the cluster."""


@dataclass(frozen=True)
class ClusterResources:
    """Total CPUs and GPUs of a cluster, and its number of nodes with CPUs."""

    cpus: float
    gpus: float
    nodes: int = 1


@dataclass(frozen=True)
class StageLayout:
    """Placement of the blocks.

    Args:
        stage_blocks: the blocks of each stage, consecutive.
        gpus: GPUs per stage; a fraction shares one, 0 means CPU.
        cpus: CPUs per stage that Ray reserves.
        loader_cpus: CPUs that Ray reserves for the data loader and its worker processes, on the node of stage 0.
        threads: torch CPU threads per stage.
        shortage: a line for the user if the processes are more than the CPUs; empty otherwise.
    """

    stage_blocks: tuple[tuple[int, ...], ...]
    gpus: float
    cpus: float
    loader_cpus: float
    threads: int
    shortage: str = ""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Bundles of the placement group: one per stage; the first also holds the data loader."""
        bundles = [{"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}) for _ in self.stage_blocks]
        bundles[0] = bundles[0] | {"CPU": round(self.cpus + self.loader_cpus, 4)}
        return bundles


def consecutive(blocks: int, stages: int) -> tuple[tuple[int, ...], ...]:
    """Split block numbers 0..blocks-1 into `stages` runs of nearly equal length.

    Later runs are the longer ones, because block 0 also embeds the patches.
    """
    bounds = [round(i * blocks / stages) for i in range(stages + 1)]
    return tuple(tuple(range(a, b)) for a, b in pairwise(bounds))


def compute_layout(
    blocks: int,
    cluster: ClusterResources,
    stages: int | None = None,
    gpus_per_stage: float | None = None,
    cpus_per_stage: float | None = None,
    threads_per_stage: int | None = None,
    loader_workers: int = 0,
) -> StageLayout:
    """Compute the stages. None leaves a number to the cluster: one block per GPU if there are enough, several consecutive
    blocks per stage if there are fewer, fractions of the CPUs if there are none.

    Args:
        loader_workers: processes that the loader starts; it requests a CPU for each. Where the cluster has not as many
            beside the stages, loader and stages are scaled down alike.

    Raises:
        PlacementError: more stages than blocks, or more GPUs or CPUs than the cluster has.
    """
    if stages is not None and stages > blocks:
        raise PlacementError(f"placement.stages is {stages}, but there are only {blocks} blocks to place")
    if cluster.cpus <= 0:
        raise PlacementError(
            "the cluster has no CPUs for stages yet; start workers, or let it grow with placement.wait_s and "
            "placement.gpus_per_stage"
        )
    gpus = default_gpus(cluster) if gpus_per_stage is None else gpus_per_stage
    if gpus > 0:
        capacity = gpu_capacity(cluster.gpus, gpus)
        count = stages if stages is not None else max(1, min(blocks, capacity))
        if count > capacity:
            raise PlacementError(
                f"the settings ask for {count} stage{'s' * (count > 1)} of {gpus:g} GPU each, and the cluster has "
                f"{cluster.gpus:g} GPU; lower placement.stages, or set placement.gpus_per_stage to a fraction, so that "
                "stages share a GPU, or to 0 for CPUs alone"
            )
    else:
        count = blocks if stages is None else stages
    loader_want = float(max(1, loader_workers))
    scale = _cpu_scale(cluster, count, loader_want)
    cpus = _floor(scale) if cpus_per_stage is None else cpus_per_stage
    if cpus * count > cluster.cpus + 1e-6:
        raise PlacementError(
            f"the settings ask for {count} stage{'s' * (count > 1)} of {cpus:g} CPU each, and the cluster has "
            f"{cluster.cpus:g} CPU; lower placement.cpus_per_stage or placement.stages"
        )
    if cpus_per_stage is None:
        loader_cpus = _floor(scale * loader_want)
    else:
        room = min(cluster.cpus / max(1, cluster.nodes) - cpus, cluster.cpus - cpus * count)
        loader_cpus = _floor(max(0.0, min(loader_want, room)))
    shortage = ""
    if loader_cpus < loader_want and loader_workers:
        shortage = (
            f"{count} stage{'s' * (count > 1)} and {loader_workers} data worker{'s' * (loader_workers > 1)} are more "
            f"processes than the {cluster.cpus:g} CPUs hold side by side: they share them"
        )
    threads = threads_per_stage or max(1, int(cluster.cpus // count) if gpus == 0 else int(cpus))
    return StageLayout(consecutive(blocks, count), gpus, cpus, loader_cpus, threads, shortage)


def _cpu_scale(cluster: ClusterResources, stages: int, loader: float) -> float:
    """The largest part of 1 CPU per stage and `loader` CPUs for the loader that fits, at most all of it.

    An actor never spans two nodes, and the loader lives beside stage 0. The nodes count as equally large.
    """
    node_cpus = cluster.cpus / max(1, cluster.nodes)
    for percent in range(100, 0, -1):
        scale = percent / 100
        beside_loader = (node_cpus - scale * (1 + loader)) / scale
        elsewhere = (cluster.nodes - 1) * math.floor(node_cpus / scale + 1e-6)
        if beside_loader >= -1e-6 and math.floor(beside_loader + 1e-6) + elsewhere >= stages - 1:
            return scale
    return max(0.0001, node_cpus / (stages + loader))


def _floor(cpus: float) -> float:
    """Ray counts CPUs in ten-thousandths; two digits are for people."""
    return math.floor(cpus * 100 + 1e-6) / 100 or math.floor(cpus * 10000) / 10000


@dataclass(frozen=True)
class ResourceShare:
    """The part of the cluster for one of several backbones, and its maximum number of stages."""

    cluster: ClusterResources
    stages: int


def shares(
    blocks: Sequence[int], cluster: ClusterResources, gpus_per_stage: float | None = None
) -> tuple[ResourceShare, ...]:
    """Divide a cluster among backbones, given the number of blocks of each, so that as many as possible train at a time.

    With GPUs every backbone gets an equal number of stages, at least one, and the first ones the remainder; with fewer
    GPUs than backbones the last ones wait. Without GPUs the backbones share the CPUs, at least one CPU each, in at most
    as many stages as CPUs, but in two, so that there is a pipeline.
    """
    gpus = default_gpus(cluster) if gpus_per_stage is None else gpus_per_stage
    concurrent = concurrent_backbones(len(blocks), cluster, gpus_per_stage)
    if gpus > 0:
        each, remainder = divmod(gpu_capacity(cluster.gpus, gpus), concurrent)
        stages = [min(b, max(1, each + (i < remainder))) for i, b in enumerate(blocks)]
    else:
        stages = [min(b, max(2, int(cluster.cpus / concurrent))) for b in blocks]
    part = ClusterResources(cluster.cpus / concurrent, cluster.gpus, cluster.nodes)
    return tuple(ResourceShare(part, count) for count in stages)


def concurrent_backbones(
    backbones: int, cluster: ClusterResources, gpus_per_stage: float | None = None
) -> int:
    """How many of several backbones train at a time, each on its share of the cluster."""
    gpus = default_gpus(cluster) if gpus_per_stage is None else gpus_per_stage
    capacity = gpu_capacity(cluster.gpus, gpus) if gpus > 0 else int(cluster.cpus)
    return max(1, min(backbones, capacity))


def default_gpus(cluster: ClusterResources) -> float:
    """GPUs per stage if the settings leave it to the cluster."""
    return 1.0 if cluster.gpus >= 1 else 0.0


def gpu_capacity(gpus: float, per_stage: float) -> int:
    """Number of stages of `per_stage` > 0 GPUs that fit on `gpus` whole GPUs (a fraction never spans two of them)."""
    if per_stage >= 1:
        return int(gpus // per_stage)
    return int(gpus) * int(1 / per_stage + 1e-6)
