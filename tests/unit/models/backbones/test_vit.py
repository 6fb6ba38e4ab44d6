from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from bim.models.backbones import ViTBackbone
from bim.models.masks.plan import MaskPlan, block_plans, random_permutation
from bim.models.seeding import generator
from bim.models.tokens import gather_tokens, sincos_positions

SMALL = {"img_size": 28, "patch_size": 7}
# name -> (timm name, overrides): one for every way in which VisionTransformer differs from the plain one.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "not square": ("vit_tiny_patch16_224", {"img_size": [16, 32]}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "registers without positions": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "registers alone": ("vit_tiny_patch16_224", {"reg_tokens": 2, "class_token": False}),
    "LayerScale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "pre-norm": ("vit_tiny_patch16_224", {"pre_norm": True}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "inner norms": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "norm after patches": ("vit_tiny_patch16_224", {"embed_norm_layer": "layernorm"}),
    "any image size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "SwiGLU": ("vit_giant_patch14_dinov2", SMALL),
    "pooled by attention": ("vit_base_patch16_siglip_224", {}),
    "CLIP": ("vit_base_patch16_clip_224", {}),
    "BEiT-3": ("beit3_base_patch16_224", {}),
    "norm after pooling": ("vit_wee_patch16_reg1_gap_256", {}),
    "no final norm": ("vit_intern300m_patch14_448", SMALL),
    "norm after each part": ("vit_base_patch16_rpn_224", {}),
    "parallel parts": ("vit_pwee_patch16_reg1_gap_256", {}),
    "parallel things": ("vit_small_patch16_18x2_224", {}),
    "DeiT-3": ("deit3_small_patch16_224", {}),
}
Shake = Callable[[nn.Module], None]
Unmasked = Callable[[int, tuple[int, int]], MaskPlan]
Build = Callable[..., ViTBackbone]


def images_for(backbone: ViTBackbone, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *backbone.image_size, generator=generator("images"))


def encode_all_blocks(
    blocks: Sequence[nn.Module], x: torch.Tensor, plans: Sequence[MaskPlan]
) -> torch.Tensor:
    for block, plan in zip(blocks, plans, strict=True):
        x = block(x, plan)
    return x


def in_grid_order(x: torch.Tensor, plan: MaskPlan) -> torch.Tensor:
    """Tokens of an unmasked plan (B, P + N, D) -> the same with patches row by row."""
    prefix = x.shape[1] - plan.permutation.shape[1]
    return torch.cat([x[:, :prefix], gather_tokens(x[:, prefix:], plan.permutation.argsort(dim=1))], dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_depth_variant_is_the_trained_blocks_with_nothing_masked(
    variant: str, tiny_backbone: Build, unmasked_plan: Unmasked, shake: Shake
) -> None:
    name, overrides = VARIANTS[variant]
    backbone = tiny_backbone([1, 3], name, **overrides)
    blocks = [backbone.build_block(index, seed=0) for index in range(2)]
    norm = nn.LayerNorm(24, eps=backbone.norm_eps)
    for module in (*blocks, norm):
        shake(module)
    images, plan = images_for(backbone), unmasked_plan(2, backbone.grid)
    states = [block.state_dict() for block in blocks]
    with torch.no_grad():
        for count, depth in ((1, 1), (2, 4)):
            model = backbone.variant(depth, states[:count], norm.state_dict())
            expected = norm(in_grid_order(encode_all_blocks(blocks[:count], images, [plan] * count), plan))
            torch.testing.assert_close(model.forward_features(images), expected, rtol=0, atol=1e-5)
            prefix = backbone.blocks[0].num_prefix_tokens
            torch.testing.assert_close(model(images), expected[:, prefix:].mean(dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_builds_the_same_variant_from_its_arguments(variant: str, tiny_backbone: Build) -> None:
    name, overrides = VARIANTS[variant]
    backbone = tiny_backbone(2, name, **overrides)
    model = backbone.variant(3, [backbone.build_block(index, 0).state_dict() for index in range(2)], None)
    again = timm.create_model(name, **backbone.variant_args(3))
    again.load_state_dict(model.state_dict(), strict=True)
    assert repr(again) == repr(model)


def test_a_variant_may_end_inside_a_block(tiny_backbone: Build, shake: Shake) -> None:
    backbone = tiny_backbone(1)
    block = backbone.build_block(0, seed=0)
    shake(block)
    whole = backbone.variant(4, [block.state_dict()], None)
    cut = backbone.variant(2, [block.state_dict()], None)
    images = images_for(backbone)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, indices=[1], norm=True, output_fmt="NLC")[1][0]
        torch.testing.assert_close(cut.forward_features(images)[:, 1:], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_a_variant_for_another_image_size_has_the_positions_that_training_at_that_size_has(
    learned: bool, tiny_backbone: Build, unmasked_plan: Unmasked
) -> None:
    backbone = tiny_backbone(1)
    block = backbone.build_block(0, seed=0)
    assert block.stem is not None
    if learned:
        torch.nn.init.normal_(block.stem.pos_embed, generator=generator("learned"))
    model = backbone.variant(4, [block.state_dict()], None, image_size=(48, 64))
    images, plan = torch.randn(1, 3, 48, 64, generator=generator(0)), unmasked_plan(1, (6, 8))
    with torch.no_grad():
        expected = model.norm(in_grid_order(block(images, plan), plan))
        torch.testing.assert_close(model.forward_features(images), expected, rtol=0, atol=1e-5)
    assert backbone.variant_args(2, (48, 64))["img_size"] == [48, 64]
    with pytest.raises(ValueError, match="50 x 64 is not divisible"):
        backbone.variant(2, [block.state_dict()], None, image_size=(50, 64))


def test_elsewhere_sin_cos_positions_are_computed_again_and_learned_ones_resampled_as_timm_does(
    tiny_backbone: Build,
) -> None:
    stem = tiny_backbone(1).build_block(0, seed=0).stem
    assert stem is not None
    assert stem.positions((4, 4)) is stem.pos_embed
    made = stem.positions((6, 8))
    assert torch.equal(made[0, 1:], sincos_positions(24, (6, 8)))
    assert not made[0, 0].any()
    assert stem.positions((6, 8)) is made
    learned = {"pos_embed": torch.randn(1, 17, 24, generator=generator("learned"))}
    stem.load_state_dict(stem.state_dict() | learned)
    expected = resample_abs_pos_embed(learned["pos_embed"], [6, 8], [4, 4], num_prefix_tokens=1)
    assert torch.equal(stem.positions((6, 8)), expected)
    stem.double()
    assert stem.positions((6, 8)).dtype == torch.float64
    assert {key for key in stem.state_dict() if "pos" in key} == {"pos_embed"}


def test_a_variant_needs_enough_blocks_and_a_depth_that_exists(tiny_backbone: Build) -> None:
    backbone = tiny_backbone(2)
    states = [backbone.build_block(0, seed=0).state_dict()]
    with pytest.raises(ValueError, match="1 blocks hold 2 layers"):
        backbone.variant(3, states, None)
    for depth in (0, 5):
        with pytest.raises(
            ValueError, match=f"no variant of depth {depth}; its variants have 1, 2, 3, 4 layers"
        ):
            backbone.variant(depth, states, None)


def test_embedding_visible_patches_alone_equals_the_convolution(
    tiny_backbone: Build, unmasked_plan: Unmasked, shake: Shake
) -> None:
    backbone = tiny_backbone(1, class_token=False)
    stem = backbone.build_block(0, seed=0).stem
    assert stem is not None
    shake(stem)
    images = images_for(backbone)
    everything = in_grid_order(stem(images, plan := unmasked_plan(2, (4, 4))), plan)
    torch.testing.assert_close(everything, stem.patch_embed(images) + stem.pos_embed, rtol=0, atol=1e-5)
    some = block_plans(plan.permutation, (4, 4), [5])[0]
    torch.testing.assert_close(stem(images, some), gather_tokens(everything, some.keep), rtol=0, atol=1e-5)


def test_the_encoder_sees_visible_patches_only(tiny_backbone: Build) -> None:
    backbone = tiny_backbone(2)
    blocks: list[nn.Module] = [backbone.build_block(index, seed=0) for index in range(2)]
    plans = list(block_plans(random_permutation(2, 16, generator(0)), (4, 4), [6, 3]))
    images = images_for(backbone)
    filled = images.clone()
    for sample in range(2):
        for unit in plans[0].masked[sample].tolist():
            row, column = 8 * (unit // 4), 8 * (unit % 4)
            filled[sample, :, row : row + 8, column : column + 8] = 9.0
    with torch.no_grad():
        encoded = encode_all_blocks(blocks, images, plans)
        assert encoded.shape == (2, 1 + 3, 24)
        assert torch.equal(encoded, encode_all_blocks(blocks, filled, plans))


@pytest.mark.parametrize("encode", ["visible", "all"])
def test_blocks_take_images_of_every_size_that_patches_divide(encode: str, tiny_backbone: Build) -> None:
    backbone = tiny_backbone(2, encode=encode)
    blocks: list[nn.Module] = [backbone.build_block(index, seed=0) for index in range(2)]
    for size, grid in (((32, 32), (4, 4)), ((48, 64), (6, 8)), ((16, 16), (2, 2))):
        assert backbone.grid_at(size) == grid
        units = grid[0] * grid[1]
        plans = list(block_plans(random_permutation(2, units, generator(0)), grid, [units // 2, units // 4]))
        tokens = encode_all_blocks(blocks, torch.randn(2, 3, *size), plans)
        assert tokens.shape == (2, 1 + (units if encode == "all" else units // 4), 24)


def test_sizes_that_patches_do_not_divide_are_refused_by_setting(tiny_backbone: Build) -> None:
    backbone = tiny_backbone(1)
    for size in ((32, 36), (0, 32)):
        with pytest.raises(ValueError, match=r"backbone\.model_args\.img_size and schedule\.resolution"):
            backbone.check_size(size)
        with pytest.raises(ValueError, match="not divisible by the patch size 8"):
            backbone.grid_at(size)


def test_a_plan_over_another_grid_than_the_images_is_refused(tiny_backbone: Build) -> None:
    plan = block_plans(random_permutation(1, 9, generator(0)), (3, 3), [4])[0]
    for encode in ("visible", "all"):
        block = tiny_backbone(1, encode=encode).build_block(0, seed=0)
        for size in (32, 28):
            with pytest.raises(ValueError, match="do not match the plan's 3 x 3 units of 8 pixels"):
                block(torch.zeros(1, 3, size, size), plan)


@pytest.mark.parametrize("variant", ["plain", "no class token", "registers without positions", "pre-norm"])
def test_with_all_tokens_and_nothing_masked_blocks_are_timms_model(
    variant: str, tiny_backbone: Build, unmasked_plan: Unmasked, shake: Shake
) -> None:
    name, overrides = VARIANTS[variant]
    backbone = tiny_backbone([1, 3], name, encode="all", **overrides)
    blocks = [backbone.build_block(index, seed=0) for index in range(2)]
    for block in blocks:
        shake(block)
    model = backbone.variant(4, [block.state_dict() for block in blocks], None)
    images, plan = images_for(backbone), unmasked_plan(2, backbone.grid)
    with torch.no_grad():
        tokens = encode_all_blocks(blocks, images, [plan, plan])
        torch.testing.assert_close(model.norm(tokens), model.forward_features(images), rtol=0, atol=1e-5)
    assert not any("paint" in key for key in model.state_dict())


def test_with_all_tokens_masked_pixels_are_overwritten_by_a_trained_color(tiny_backbone: Build) -> None:
    backbone = tiny_backbone(2, encode="all")
    first, second = (backbone.build_block(index, seed=0) for index in range(2))
    assert first.stem is not None
    paint = first.stem.paint
    assert paint is not None
    assert not any("paint" in key for key in second.state_dict())
    plan = block_plans(random_permutation(2, 16, generator(0)), (4, 4), [6])[0]
    images = images_for(backbone)
    filled = paint(images, plan)
    for sample in range(2):
        for unit in range(16):
            row, column = 8 * (unit // 4), 8 * (unit % 4)
            window = (sample, slice(None), slice(row, row + 8), slice(column, column + 8))
            masked = unit in plan.masked[sample]
            expected = paint.colour[0].expand(3, 8, 8) if masked else images[window]
            assert torch.equal(filled[window], expected)
    first(images, plan).square().mean().backward()
    assert paint.colour.grad is not None
    assert paint.colour.grad.abs().min() > 0
    other = torch.where(filled == images, images, 9.0)
    assert torch.equal(first(images, plan), first(other, plan))


def test_the_color_is_the_only_thing_that_encoding_all_tokens_adds(tiny_backbone: Build) -> None:
    visible = tiny_backbone(2).build_block(0, seed=3).state_dict()
    everything = tiny_backbone(2, encode="all").build_block(0, seed=3).state_dict()
    assert set(everything) - set(visible) == {"stem.paint.colour"}
    assert all(torch.equal(everything[key], value) for key, value in visible.items())


def test_parameters_of_a_block_depend_on_seed_and_index_alone(tiny_backbone: Build) -> None:
    backbone = tiny_backbone([1, 2, 1])
    torch.manual_seed(1)
    alone = backbone.build_block(1, seed=0).state_dict()
    torch.manual_seed(2)
    beside = [tiny_backbone([1, 2, 1]).build_block(index, seed=0).state_dict() for index in range(3)]
    assert all(torch.equal(alone[key], value) for key, value in beside[1].items())
    weight = "layers.0.attn.qkv.weight"
    assert not torch.equal(alone[weight], beside[0][weight])
    assert not torch.equal(alone[weight], backbone.build_block(1, seed=1).state_dict()[weight])


def test_building_leaves_torchs_generator_alone(tiny_backbone: Build) -> None:
    before = torch.get_rng_state()
    backbone = tiny_backbone(2)
    states = [backbone.build_block(index, seed=0).state_dict() for index in range(2)]
    backbone.variant(4, states, None)
    assert torch.equal(before, torch.get_rng_state())


def test_blocks_are_initialized_as_in_mae(tiny_backbone: Build) -> None:
    block = tiny_backbone(1, embed_dim=192, reg_tokens=8).build_block(0, seed=0)
    assert block.stem is not None
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan = layer.weight.flatten(1).shape
            bound = (6 / sum(fan)) ** 0.5
            assert 0.99 * bound < layer.weight.abs().max() <= bound, name
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
            assert layer.bias is None or not layer.bias.any(), name
    assert block.stem.reg_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.stem.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not block.stem.pos_embed[:, :9].any()


def test_block_zero_holds_what_stands_before_the_layers_and_positions_are_never_trained(
    tiny_backbone: Build,
) -> None:
    first, second = (tiny_backbone(2).build_block(index, seed=0) for index in range(2))
    assert {name.split(".")[0] for name in second.state_dict()} == {"layers"}
    assert "stem.pos_embed" in first.state_dict()
    assert "stem.pos_embed" not in dict(first.named_parameters())
    assert {"stem.cls_token", "stem.patch_embed.proj.weight"} <= set(dict(first.named_parameters()))
