from __future__ import annotations

import pytest

from bim.orchestrator.distributed.placement import (
    ClusterResources,
    PlacementError,
    compute_layout,
    consecutive,
)


def test_a_block_per_gpu_when_there_are_enough() -> None:
    layout = compute_layout(4, ClusterResources(cpus=32, gpus=8))
    assert layout.stage_blocks == ((0,), (1,), (2,), (3,))
    assert layout.gpus == 1
    assert layout.bundles[1] == {"CPU": 1.0, "GPU": 1.0}
    assert layout.bundles[0] == {"CPU": 2.0, "GPU": 1.0}


def test_several_consecutive_blocks_per_stage_when_there_are_fewer_gpus() -> None:
    assert compute_layout(4, ClusterResources(16, 2)).stage_blocks == ((0, 1), (2, 3))
    assert compute_layout(4, ClusterResources(16, 3)).stage_blocks == ((0,), (1, 2), (3,))
    assert compute_layout(4, ClusterResources(16, 1)).stage_blocks == ((0, 1, 2, 3),)


def test_fractions_of_the_cpus_when_there_are_no_gpus() -> None:
    layout = compute_layout(4, ClusterResources(2, 0))
    assert len(layout.stage_blocks) == 4
    assert layout.gpus == 0
    assert sum(b["CPU"] for b in layout.bundles) <= 2.0
    assert layout.threads == 1


def test_a_fraction_shares_one_gpu() -> None:
    assert compute_layout(4, ClusterResources(16, 1), gpus_per_stage=0.25).stage_blocks == (
        (0,),
        (1,),
        (2,),
        (3,),
    )


def test_no_stage_asks_for_more_than_one_node_has() -> None:
    # 2 nodes of 2 CPUs: three actors on one.
    layout = compute_layout(4, ClusterResources(cpus=4, gpus=0, nodes=2))
    assert layout.cpus == layout.loader_cpus == 0.66
    assert max(sum(b["CPU"] for b in layout.bundles[:2]), layout.cpus * 3) <= 2


def test_a_cluster_without_workers_is_refused_with_what_to_do() -> None:
    with pytest.raises(PlacementError, match=r"no CPUs for stages yet; .*placement\.wait_s"):
        compute_layout(4, ClusterResources(0, 0))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"gpus_per_stage": 1.0},
            "1 stage of 1 GPU each, and the cluster has 0 GPU; .* placement.gpus_per_stage",
        ),
        ({"stages": 9}, "placement.stages is 9, but there are only 4 blocks"),
        ({"cpus_per_stage": 1.0}, "4 stages of 1 CPU each, and the cluster has 2 CPU"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides(asked: dict, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        compute_layout(4, ClusterResources(2, 0), **asked)


@pytest.mark.parametrize(("blocks", "stages"), [(4, 1), (4, 3), (7, 3), (12, 5), (5, 5)])
def test_consecutive_covers_every_block_once(blocks: int, stages: int) -> None:
    stage_blocks = consecutive(blocks, stages)
    assert [block for blocks_ in stage_blocks for block in blocks_] == list(range(blocks))
    sizes = [len(blocks_) for blocks_ in stage_blocks]
    assert max(sizes) - min(sizes) <= 1


def test_the_loader_gets_a_cpu_for_every_worker_where_the_cluster_has_them() -> None:
    layout = compute_layout(4, ClusterResources(16, 1), loader_workers=8)
    assert (layout.cpus, layout.loader_cpus, layout.shortage) == (1.0, 8.0, "")
    several = compute_layout(4, ClusterResources(32, 4, nodes=4), loader_workers=6)
    assert several.bundles[0] == {"CPU": 7.0, "GPU": 1.0}


def test_loader_and_stages_are_scaled_down_alike_where_not() -> None:
    layout = compute_layout(4, ClusterResources(4, 0), loader_workers=4)
    assert (layout.cpus, layout.loader_cpus) == (0.5, 2.0)
    assert layout.shortage == (
        "4 stages and 4 data workers are more processes than the 4 CPUs hold side by side: they share them"
    )
    nodes = compute_layout(4, ClusterResources(32, 4, nodes=4), loader_workers=16)
    assert nodes.cpus == 0.47
    assert nodes.bundles[0]["CPU"] <= 8


def test_cpus_that_are_set_for_a_stage_stay_and_the_loader_gets_the_rest() -> None:
    layout = compute_layout(2, ClusterResources(8, 0), cpus_per_stage=3.0, loader_workers=4)
    assert (layout.cpus, layout.loader_cpus) == (3.0, 2.0)
    assert "2 stages and 4 data workers" in layout.shortage


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 1, 4, 16, 500])
@pytest.mark.parametrize("cpus", [1, 2, 7, 64])
def test_what_is_requested_always_fits(cpus: int, workers: int, nodes: int) -> None:
    layout = compute_layout(4, ClusterResources(cpus, 0, nodes), loader_workers=workers)
    node = cpus / nodes
    first = layout.bundles[0]["CPU"]
    assert 0 < first <= node + 1e-3
    if layout.cpus > 0.001:
        room = int((node - first) / layout.cpus + 1e-3) + (nodes - 1) * int(node / layout.cpus + 1e-3)
        assert room >= 3
