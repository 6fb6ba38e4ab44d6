from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bim.models.backbones import DenseBackbone, SwinBackbone, open_backbone, random_variant
from bim.models.backbones.backbone import Backbone
from bim.models.backbones.bias_tables import inner_table, resampled, with_inner_table
from bim.models.backbones.visible_block import VisibleBlock
from bim.models.masks.plan import MaskPlan, block_plans, random_permutation, visible_counts
from bim.models.seeding import generator

NARROW = {"embed_dim": 4, "num_heads": [1, 1, 1, 1], "mlp_ratio": 1}


def swin(blocks: Any, name: str = "swin_tiny_patch4_window7_224", **overrides: Any) -> SwinBackbone:
    backbone = open_backbone(name, blocks, NARROW | overrides)
    assert isinstance(backbone, SwinBackbone)
    return backbone


def blocks_of(backbone: SwinBackbone) -> list[VisibleBlock]:
    return [backbone.build_block(index, seed=0).eval() for index in range(len(backbone.blocks))]


def masked_plans(backbone: SwinBackbone, ratio: float) -> tuple[MaskPlan, ...]:
    units = backbone.grid[0] * backbone.grid[1]
    order = random_permutation(2, units, generator("order"), per_batch=True)
    scales = [backbone.mask_unit_px // info.stride for info in backbone.blocks]
    return block_plans(order, backbone.grid, visible_counts(units, [ratio] * len(scales)), scales, True)


@torch.no_grad()
def test_of_swin_b_at_224_with_three_quarters_masked_768_192_48_and_12_tokens_are_computed() -> None:
    backbone = swin(4, "swin_base_patch4_window7_224")
    assert [info.layers for info in backbone.blocks] == [2, 2, 18, 2]
    assert (backbone.mask_unit_px, backbone.grid, backbone.encode) == (32, (7, 7), "visible")
    x, counts = torch.randn(2, 3, 224, 224, generator=generator("image")), []
    plans = masked_plans(backbone, 0.75)
    for block, plan in zip(blocks_of(backbone), plans, strict=True):
        x = block(x, plan)
        counts.append(x.shape[1])
    assert counts == [768, 192, 48, 12] == [plan.keep_tokens.shape[1] for plan in plans]


def test_windows_of_7_at_224_with_nothing_masked_are_timms_at_every_level(
    check_levels: Callable[[Backbone], None],
) -> None:
    check_levels(swin(4))


def test_tables_are_nominal_in_blocks_and_as_timm_has_them_in_variants() -> None:
    backbone = swin(4, img_size=64, window_size=8)
    blocks = [block.state_dict() for block in blocks_of(backbone)]
    tables = {key: value for block in blocks for key, value in block.items() if key.endswith("bias_table")}
    assert {value.shape[0] for value in tables.values()} == {15 * 15}
    assert backbone.variant_args(12)["window_size"] == [[8, 8]] * 4
    state = backbone.variant(12, blocks, None).state_dict()
    sides = [
        state[f"layers.{level}.blocks.0.attn.relative_position_bias_table"].shape[0] for level in range(4)
    ]
    assert sides == [15 * 15, 15 * 15, 7 * 7, 3 * 3]
    wide = backbone.variant(12, blocks, None, image_size=(64, 128)).state_dict()
    assert wide["layers.3.blocks.0.attn.relative_position_bias_table"].shape[0] == 3 * 7


def test_a_smaller_table_holds_the_same_differences() -> None:
    table = torch.arange(5 * 7).view(35, 1)  # of a 3 x 4 window: row (down + 2) * 7 + across + 3
    found = inner_table(table, (3, 4), (2, 2))
    assert found.flatten().tolist() == [(d + 2) * 7 + a + 3 for d in (-1, 0, 1) for a in (-1, 0, 1)]
    assert torch.equal(inner_table(table, (3, 4), (3, 4)), table)


def test_a_smaller_table_is_put_back_where_it_came_from() -> None:
    table, blank = torch.arange(1.0, 36).unsqueeze(1), torch.zeros(35, 1)
    inner = inner_table(table, (3, 4), (2, 2))
    assert torch.equal(with_inner_table(table, inner, (3, 4), (2, 2)), table)
    found = with_inner_table(blank, inner, (3, 4), (2, 2))
    assert torch.equal(inner_table(found, (3, 4), (2, 2)), inner)
    assert int((found != 0).sum()) == len(inner) == 9
    assert int(blank.count_nonzero()) == 0


def test_tables_of_another_square_window_are_resampled_and_others_are_refused(tmp_path: Path) -> None:
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    file = str(tmp_path / "w.safetensors")

    def save(window: Any) -> None:
        model = random_variant(swin(1, window_size=window), 12, seed=0)
        save_file(model.state_dict(), file)  # type: ignore[arg-type]

    save(2)
    backbone = swin(1, window_size=4)
    backbone.check_init_from(file)
    assert backbone.build_block(0, 0, file).state_dict()["parts." + key].shape == (49, 1)
    save([[2, 4]] * 4)
    for refused in (backbone.check_init_from, lambda name: backbone.build_block(0, 0, name)):
        with pytest.raises(
            ValueError, match=r"has 21 rows, the backbone needs 49; .* one square window to another only"
        ):
            refused(file)
    with pytest.raises(ValueError, match="of 105 rows cannot be resampled to 169 rows"):
        resampled(torch.zeros(105, 2), (169, 2))


def test_levels_may_have_windows_of_their_own_and_be_fewer() -> None:
    backbone = swin(2, depths=[2, 2], num_heads=[1, 1], window_size=[[4, 4], [8, 8]], img_size=64)
    assert (backbone.mask_unit_px, backbone.grid) == (8, (8, 8))
    assert [level.window for level in backbone.levels] == [(4, 4), (8, 8)]
    assert backbone.variant_args(3) | {
        "depths": [2, 1],
        "window_size": [[4, 4], [8, 8]],
    } == backbone.variant_args(3)
    assert backbone.variant_args(2)["window_size"] == [[4, 4]]


def test_five_blocks_cut_the_third_level_on_an_even_layer() -> None:
    assert [info.layers for info in swin(5).blocks] == [2, 2, 4, 2, 2]
    assert [info.layers for info in swin([2, 2, 2, 4, 2]).blocks] == [2, 2, 2, 4, 2]
    with pytest.raises(
        ValueError, match=r"blocks is 7, but 'swin_tiny_patch4_window7_224' has .* ask for 6 at most"
    ):
        swin(7)
    with pytest.raises(
        ValueError, match=r"after an even number of its layers, .*: after 2, 4, 6, 8, 10, 12 layers"
    ):
        swin([2, 2, 3, 3, 2])


def test_all_tokens_are_another_familys() -> None:
    name = "swin_tiny_patch4_window7_224"
    assert isinstance(open_backbone(name, 4, NARROW, encode="all"), DenseBackbone)
    assert isinstance(open_backbone(name, 4, NARROW, encode="visible"), SwinBackbone)
    assert open_backbone("swinv2_tiny_window8_256", 4).encode == "all"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"always_partition": True},
            "'always_partition' cannot be set where only visible tokens are encoded",
        ),
        ({"patch_size": [4, 8]}, "'patch_size' is .*must be a whole number"),
        ({"window_size": [[7, 7]] * 3}, "timm cannot build"),
        ({"img_size": 100}, "100 x 100 is not divisible by the mask unit 32"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        swin(2, **overrides)


def test_windows_padded_by_timm_are_reported() -> None:
    assert "timm pads the border's windows with empty tokens" in swin(4).usage(12).sizes
