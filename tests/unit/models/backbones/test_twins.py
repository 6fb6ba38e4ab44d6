from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bim.models.backbones import TwinsBackbone, open_backbone
from bim.models.backbones.backbone import Backbone
from bim.models.masks.plan import MaskPlan, random_permutation
from bim.models.seeding import generator

NARROW = {"embed_dims": [4, 4, 4, 8], "num_heads": [1, 1, 1, 2], "mlp_ratios": [1, 1, 1, 1]}


def twins(blocks: Any = 4, name: str = "twins_svt_small", **overrides: Any) -> TwinsBackbone:
    backbone = open_backbone(name, blocks, NARROW | overrides)
    assert isinstance(backbone, TwinsBackbone)
    return backbone


@pytest.mark.parametrize("name", ["twins_svt_small", "twins_pcpvt_small"])
def test_at_224_with_nothing_masked_every_level_is_timms(
    name: str, check_levels: Callable[[Backbone], None]
) -> None:
    check_levels(twins(name=name))


def test_sizes_are_given_per_block() -> None:
    backbone = twins()
    sizes = [(info.layers, info.width, info.stride, info.grid) for info in backbone.blocks]
    assert sizes == [(2, 4, 4, (56, 56)), (2, 4, 8, (28, 28)), (10, 4, 16, (14, 14)), (4, 8, 32, (7, 7))]
    assert (backbone.mask_unit_px, backbone.norm_eps, backbone.encode) == (32, 1e-6, "visible")
    assert [info.layers for info in twins(6).blocks] == [2, 2, 4, 4, 2, 4]


def test_windows_larger_than_a_variants_maps_are_made_as_large() -> None:
    backbone = twins()
    assert backbone.variant_args(18)["wss"] == [7, 7, 7, 7]
    assert backbone.variant_args(6, (64, 64)) == backbone.variant_args(6, (64, 64)) | {
        "depths": [2, 2, 2],
        "embed_dims": [4, 4, 4],
        "wss": [7, 7, 4],
        "img_size": [64, 64],
    }
    assert "wss" not in twins(name="twins_pcpvt_small").variant_args(10)


def test_only_levels_that_begin_need_neighbors_and_only_windows_need_groups() -> None:
    plan = MaskPlan(
        (7, 7),
        random_permutation(2, 49, generator(0), True),
        12,
        12,
        *[torch.zeros(2, 0)] * 2,
        scale=2,
        shared=True,
    )
    layouts = twins([2, 2, 4, 6, 4]).prepare_plans({2: plan, 3: plan})
    first, second = (layouts[index].encoder_indices.levels[2] for index in (2, 3))  # type: ignore[union-attr]
    assert first.halo.shape == (1, 12 * 16)
    assert second.halo is None
    assert list(first.groups) == list(second.groups) == [(0, 0)]
    plain = twins(name="twins_pcpvt_small").prepare_plans({2: plan})[2].encoder_indices
    assert not plain.levels[2].groups  # type: ignore[union-attr]


def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match=r"trained here on visible tokens only; set mask\.encode to visible or auto"
    ):
        open_backbone("twins_svt_small", 4, encode="all")
    with pytest.raises(ValueError, match=r"keys at stride 8 are reduced 3 times.* 4 tokens .*sr_ratios"):
        twins(sr_ratios=[8, 3, 2, 1])
