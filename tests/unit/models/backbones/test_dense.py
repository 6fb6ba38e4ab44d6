from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bim.models.backbones import DenseBackbone, open_backbone
from bim.models.backbones.dense import DenseBlock
from bim.models.decoders.light import LightDecoder
from bim.models.local_mim import LocalMIM
from bim.models.masks.plan import MaskPlan, block_plans, random_permutation
from bim.models.seeding import forked_rng, generator
from bim.models.targets import PixelTarget

Build = Callable[..., DenseBackbone]
Shake = Callable[[nn.Module], None]
Unmasked = Callable[[int, tuple[int, int]], MaskPlan]
SIZES = ((64, 64), (96, 64))


def images_of(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=generator("images", *size))


def chained(blocks: list[DenseBlock], x: Tensor, plan: MaskPlan) -> list[Tensor]:
    """The tokens that each block gives."""
    tokens = [x]
    for block in blocks:
        tokens.append(block.eval()(tokens[-1], plan))
    return tokens[1:]


def as_tokens(feature: Tensor, width: int) -> Tensor:
    """A map of timm's, channels first or last, as (B, h * w, C)."""
    return feature.flatten(1, 2) if feature.shape[-1] == width else feature.flatten(2).transpose(1, 2)


def checkpoint(backbone: DenseBackbone, shake: Shake, file: Path, **changes: Any) -> Any:
    """A timm model of that name and shape, all of its parameters moved, its weights in `file`."""
    args = {
        key: value
        for key, value in backbone.variant_args(backbone.depths[-1]).items()
        if key not in ("features_only", "out_indices", "pretrained_strict")
    }
    with forked_rng("checkpoint"):
        model = timm.create_model(backbone.name, **(args | changes))
    shake(model)
    save_file(model.state_dict(), file)
    return model.eval()


def test_blocks_of_a_checkpoint_give_timms_own_feature_maps_at_every_size(
    family: str, tiny_pyramid: Build, shake: Shake, unmasked_plan: Unmasked, tmp_path: Path
) -> None:
    backbone = tiny_pyramid(family, 4)
    file = tmp_path / "w.safetensors"
    model = checkpoint(backbone, shake, file)
    backbone.check_init_from(str(file))
    blocks = [backbone.build_block(index, 0, str(file)) for index in range(4)]
    for size in SIZES:
        plan = unmasked_plan(2, backbone.grid_at(size))
        with torch.no_grad():
            ours = chained(blocks, images_of(size), plan)
            wanted = model.forward_intermediates(images_of(size), indices=4, intermediates_only=True)
        for index, info in enumerate(backbone.blocks):
            tokens = ours[index]
            if family == "pvt":  # timm's maps end with the norm that our next block opens with
                tokens = model.stages[index].norm(tokens)
            rows, columns = size[0] // info.stride, size[1] // info.stride
            assert tokens.shape == (2, rows * columns, info.width)
            torch.testing.assert_close(tokens, as_tokens(wanted[index], info.width), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_depth_variant_is_the_trained_blocks_with_nothing_masked(
    size: tuple[int, int], family: str, tiny_pyramid: Build, shake: Shake, unmasked_plan: Unmasked
) -> None:
    backbone = tiny_pyramid(family, [3, 2, 1])
    blocks = [backbone.build_block(index, seed=0) for index in range(3)]
    norms = [nn.LayerNorm(info.width, eps=backbone.norm_eps) for info in backbone.blocks]
    for module in (*blocks, *norms):
        shake(module)
    images, plan = images_of(size), unmasked_plan(2, backbone.grid_at(size))
    with torch.no_grad():
        tokens = chained(blocks, images, plan)
        for index, info in enumerate(backbone.blocks):
            states = [block.state_dict() for block in blocks[: index + 1]]
            model: Any = backbone.variant(info.depth, states, norms[index].state_dict(), image_size=size)
            usage = backbone.usage(info.depth)
            expected = norms[index](tokens[index]) if usage.trained_norm else tokens[index]
            features = model.forward_features(images)
            torch.testing.assert_close(as_tokens(features, info.width), expected, rtol=1e-5, atol=1e-5)
            pooled = model.forward_head(features, pre_logits=True)
            torch.testing.assert_close(pooled, expected.mean(dim=1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(images), pooled)
            assert not model.training
            assert usage.width == info.width


@pytest.mark.parametrize(
    ("family", "normed"),
    [
        ("swin", [1, 3, 5, 6]),
        ("swin v2", [1, 3, 5, 6]),
        ("pvt", [1, 3, 5, 6]),
        ("convnext", [6]),
        ("resnet", []),
        ("resnet v2", []),
    ],
    indirect=["family"],
)
def test_variants_carry_the_decoders_norm_where_timms_class_has_a_place_for_it(
    family: str, normed: list[int], tiny_pyramid: Build
) -> None:
    backbone = tiny_pyramid(family, 4)
    assert [depth for depth in backbone.depths if backbone.usage(depth).trained_norm] == normed


def test_a_variant_may_end_at_a_level_inside_a_block_where_no_norm_was_trained(
    family: str, tiny_pyramid: Build, shake: Shake, unmasked_plan: Unmasked
) -> None:
    whole, cut = tiny_pyramid(family, 1), tiny_pyramid(family, [3, 3])
    block = whole.build_block(0, seed=0)
    shake(block)
    state = block.state_dict()
    model = whole.variant(3, [state], nn.LayerNorm(whole.blocks[-1].width).state_dict())
    first = cut.build_block(0, seed=0)
    first.load_state_dict(state, strict=False)
    with torch.no_grad():
        (tokens,) = chained([first], images_of((64, 64)), unmasked_plan(2, (2, 2)))
        if family == "pvt":
            tokens = block.parts.get_submodule("stages.1.norm")(tokens)
        elif family.startswith("swin"):
            tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=whole.norm_eps)
        expected = tokens.mean(dim=1)
        torch.testing.assert_close(model(images_of((64, 64))), expected, rtol=1e-5, atol=1e-5)
    assert not whole.usage(3).trained_norm


def test_masked_pixels_are_never_seen_and_visible_ones_are(family: str, tiny_pyramid: Build) -> None:
    backbone = tiny_pyramid(family)
    block = backbone.build_block(0, seed=0).eval()
    (plan,) = block_plans(random_permutation(1, 4, generator("order")), (2, 2), [2])
    images = images_of((64, 64), batch=1)
    for units, seen in ((plan.masked, False), (plan.keep, True)):
        changed = images.clone()
        row, column = divmod(int(units[0, 0]), 2)
        changed[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] += 1.0
        with torch.no_grad():
            assert torch.equal(block(images, plan), block(changed, plan)) is not seen


def test_each_loss_trains_its_own_block_and_nothing_else(family: str, tiny_pyramid: Build) -> None:
    backbone = tiny_pyramid(family, 4)
    order = random_permutation(2, 4, generator("order"))
    scales = [backbone.mask_unit_px // info.stride for info in backbone.blocks]
    plans = block_plans(order, (2, 2), [1] * 4, scales)
    modules = []
    for info in backbone.blocks:
        target = PixelTarget(info.stride)
        with forked_rng("decoder", info.index):
            decoder = LightDecoder(info.width, 16, 1, 1, target.out_dim, 0, norm_eps=backbone.norm_eps)
        modules.append(LocalMIM(backbone.build_block(info.index, seed=0), decoder, target))
    images = images_of((64, 64))
    x = images
    for index, (module, plan) in enumerate(zip(modules, plans, strict=True)):
        before = x.clone()
        step = module(x, images, plan)
        step.loss.backward()
        assert torch.equal(x, before)  # no layer writes into what the block before handed over
        x = step.activations
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert all(
            parameter.grad is None for later in modules[index + 1 :] for parameter in later.parameters()
        )
    first = modules[0].encoder
    assert isinstance(first, DenseBlock)
    assert first.paint is not None
    assert first.paint.colour.grad is not None
    assert first.paint.colour.grad.any()
    assert not any("paint" in key for module in modules[1:] for key in module.state_dict())


def test_parameters_of_a_block_depend_on_seed_and_index_alone(family: str, tiny_pyramid: Build) -> None:
    torch.manual_seed(1)
    alone = tiny_pyramid(family, 4).build_block(2, seed=0).state_dict()
    before = torch.get_rng_state()
    backbone = tiny_pyramid(family, 4)
    beside = [backbone.build_block(index, seed=0).state_dict() for index in range(4)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(alone[key], value) for key, value in beside[2].items())
    other = backbone.build_block(2, seed=1).state_dict()
    assert any(not torch.equal(alone[key], value) for key, value in other.items())
    names = [key.removeprefix("parts.") for state in beside for key in state if key.startswith("parts.")]
    assert len(names) == len(set(names))


def test_sizes_are_given_per_block(tiny_pyramid: Build) -> None:
    backbone = tiny_pyramid("swin", [3, 2, 1])
    sizes = [(info.layers, info.depth, info.width, info.stride, info.grid) for info in backbone.blocks]
    assert sizes == [(3, 3, 24, 8, (8, 8)), (2, 5, 48, 16, (4, 4)), (1, 6, 96, 32, (2, 2))]
    assert (backbone.mask_unit_px, backbone.grid, backbone.encode) == (32, (2, 2), "all")
    assert backbone.depths == (1, 3, 5, 6)
    assert backbone.norm_eps == 1e-5
    assert [info.layers for info in tiny_pyramid("swin", 3).blocks] == [3, 2, 1]


@pytest.mark.parametrize(
    ("name", "depths"), [("swin_tiny_patch4_window7_224", (2, 4, 10, 12)), ("resnet50", (3, 7, 13, 16))]
)
def test_depth_counts_layers_up_to_the_end_of_a_level(name: str, depths: tuple[int, ...]) -> None:
    backbone = open_backbone(name, 4, encode="all")
    assert backbone.depths == tuple(info.depth for info in backbone.blocks) == depths
    again = open_backbone(name, [info.layers for info in backbone.blocks], encode="all")
    assert again.blocks == backbone.blocks
    assert backbone.image_size == (224, 224)


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (5, r"blocks is 5, but 'swin_.*' has 1 \+ 2 \+ 2 \+ 1 layers .* ask for 4 at most"),
        (0, "at least 1"),
        ([2, 4], r"blocks \[2, 4\] end after 2, 6 layers.* after 1, 3, 5, 6 layers"),
        ([1, 2, 2], "make them add up to 6"),
        ([], "hold 0 layers"),
        ([6, 0], "can be cut only where a level ends"),
    ],
)
def test_blocks_that_do_not_end_with_levels_are_refused(
    blocks: Any, reason: str, tiny_pyramid: Build
) -> None:
    with pytest.raises(ValueError, match=reason):
        tiny_pyramid("swin", blocks)


def test_what_does_not_fit_is_refused_with_the_setting_to_change(tiny_pyramid: Build) -> None:
    backbone = tiny_pyramid("resnet")
    with pytest.raises(ValueError, match=r"100 x 64 is not divisible .* mask unit 32 .*schedule\.resolution"):
        backbone.check_size((100, 64))
    with pytest.raises(ValueError, match="no variant of depth 2; its variants have 1, 3, 5, 6 layers"):
        backbone.variant_args(2)
    with pytest.raises(ValueError, match="1 blocks hold 3 layers"):
        backbone.variant(6, [backbone.build_block(0, seed=0).state_dict()], None)
    (plan,) = block_plans(random_permutation(1, 4, generator(0)), (2, 2), [1])
    with pytest.raises(ValueError, match="do not match the plan's 2 x 2 units of 32 pixels"):
        backbone.build_block(0, seed=0)(torch.zeros(1, 3, 96, 96), plan)
    with pytest.raises(ValueError, match="16 tokens are not the 8 x 8"):
        backbone.build_block(1, seed=0)(torch.zeros(1, 16, 32), plan)
    for overrides, reason in (
        ({"depths": [1, 1]}, "takes no 'depths'"),
        ({"img_size": "big"}, "must be a whole number or"),
        ({"img_size": 50}, "50 x 50 is not divisible"),
        ({"drop_path_rate": 0.1}, "cannot be set"),
        ({"features_only": True}, "takes no 'features_only'"),
    ):
        with pytest.raises(ValueError, match=reason):
            tiny_pyramid("resnet", 2, **overrides)
    with pytest.raises(ValueError, match="final norm is a RmsNorm2d"):
        tiny_pyramid("convnext", 2, norm_layer="rmsnorm")
    with pytest.raises(ValueError, match="timm cannot build"):
        tiny_pyramid("convnext", 2, dims=[8, 16])


def test_visible_tokens_alone_are_refused(tiny_pyramid: Build) -> None:
    with pytest.raises(ValueError, match=r"need every token; set mask\.encode to all or auto"):
        open_backbone("resnet50", 2, encode="visible")
    with pytest.raises(ValueError, match=r"mask\.encode is 'some'; it must be one of auto, visible, all"):
        open_backbone("resnet50", 2, encode="some")


def test_windows_of_a_checkpoint_at_another_size_are_resized(
    tiny_pyramid: Build, shake: Shake, tmp_path: Path
) -> None:
    backbone = tiny_pyramid("swin", 4)  # the last level's map is 2 x 2, and so is its window
    file = tmp_path / "w.safetensors"
    model = checkpoint(backbone, shake, file, img_size=128)
    key = "layers.3.blocks.0.attn.relative_position_bias_table"
    assert model.state_dict()[key].shape == (49, 4)
    backbone.check_init_from(str(file))
    assert backbone.build_block(3, 0, str(file)).state_dict()["parts." + key].shape == (9, 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": [2, 2, 2, 1]}, "has 'layer1.1"),
        ({"layers": [1, 1, 2, 1]}, "has no 'layer2.1"),
        ({"channels": [5, 8, 12, 20]}, "has shape"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    change: dict[str, Any], reason: str, tiny_pyramid: Build, shake: Shake, tmp_path: Path
) -> None:
    backbone = tiny_pyramid("resnet")
    checkpoint(backbone, shake, tmp_path / "w.safetensors", **change)
    with pytest.raises(ValueError, match=reason):
        backbone.check_init_from(str(tmp_path / "w.safetensors"))
