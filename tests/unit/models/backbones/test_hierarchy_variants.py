"""Depth variants of Swin and Twins as timm's models, and weights of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from bim.models.backbones import random_variant
from bim.models.seeding import forked_rng
from bim.models.tokens import gather_tokens
from tests.unit.models.backbones.tiny_hierarchies import (
    SIZES,
    Shake,
    as_tokens,
    built,
    chained,
    images_of,
    plans_of,
    tiny,
)


@pytest.fixture(params=["swin", "twins"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_a_variant_of_any_depth_is_the_trained_layers_with_nothing_masked(
    family: str, size: tuple[int, int], shake: Shake
) -> None:
    whole = tiny(family, 1)
    state = built(whole, shake)[0].state_dict()
    images = images_of(size)
    for sizes in ([2, 4, 2, 2], [4, 6]):
        backbone = tiny(family, sizes)
        blocks = [backbone.build_block(index, seed=1).eval() for index in range(len(sizes))]
        for block in blocks:
            block.load_state_dict({key: state[key] for key in block.state_dict()})
        units = backbone.grid_at(size)[0] * backbone.grid_at(size)[1]
        plans = plans_of(backbone, size, units)
        states = [block.state_dict() for block in blocks]
        with torch.no_grad():
            tokens = chained(blocks, images, plans)
            for info, plan, found in zip(backbone.blocks, plans, tokens, strict=True):
                norm = nn.LayerNorm(info.width, eps=backbone.norm_eps)
                shake(norm)
                model: Any = backbone.variant(info.depth, states, norm.state_dict(), image_size=size)
                features = as_tokens(model.forward_features(images), info.width)
                expected = norm(found)
                torch.testing.assert_close(
                    gather_tokens(features, plan.keep_tokens), expected, rtol=1e-5, atol=1e-5
                )
                torch.testing.assert_close(model(images), expected.mean(dim=1), rtol=1e-5, atol=1e-5)
                usage = backbone.usage(info.depth)
                assert (usage.trained_norm, usage.width, model.num_features) == (True, info.width, info.width)
                assert not model.training


def test_a_variant_that_ends_inside_a_level_is_a_plain_timm_model_of_fewer_layers(family: str) -> None:
    backbone = tiny(family, [2, 2, 2, 2, 2])
    assert [info.depth for info in backbone.blocks] == [2, 4, 6, 8, 10]
    assert [info.stride for info in backbone.blocks] == [4, 8, 16, 16, 32]
    model: Any = random_variant(backbone, 6, seed=0)
    assert backbone.variant_args(6)["depths"] == [2, 2, 2]
    assert type(model).__module__.startswith("timm.models.")
    assert backbone.usage(5).trained_norm  # inside block 2, in its level
    assert not tiny(family, 1).usage(6).trained_norm
    assert tiny(family, 1).usage(9).trained_norm
    states = [backbone.build_block(index, seed=0).state_dict() for index in range(3)]
    trained = {key.removeprefix("parts."): value for state in states for key, value in state.items()}
    for key, value in model.state_dict().items():
        if not key.startswith("norm.") and trained[key].shape == value.shape:
            assert torch.equal(value, trained[key])


def test_blocks_start_from_the_weights_of_a_file(family: str, shake: Shake, tmp_path: Path) -> None:
    backbone = tiny(family, img_size=128)
    with forked_rng("checkpoint"):
        model = timm.create_model(backbone.name, **backbone.variant_args(10))
    shake(model)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone.check_init_from(str(tmp_path / "w.safetensors"))
    for index in range(4):
        state = backbone.build_block(index, 0, str(tmp_path / "w.safetensors")).state_dict()
        for key, value in state.items():
            assert torch.equal(value, model.state_dict()[key.removeprefix("parts.")])


# At 64 pixels the last levels' maps are 4 x 4 and 2 x 2, at 64 x 160 4 x 10 and 2 x 5: windows are clipped there.
@pytest.mark.parametrize(("window", "size"), [(4, (64, 64)), (7, (64, 64)), (7, (64, 160))])
def test_an_exported_variant_read_back_computes_the_same(
    window: int, size: tuple[int, int], family: str, shake: Shake, tmp_path: Path
) -> None:
    windows = {"swin": {"window_size": window}, "twins": {"wss": [window] * 4}}
    backbone = tiny(family, img_size=list(size), **windows[family])
    first = built(backbone, shake)
    file = str(tmp_path / "w.safetensors")
    states = [block.state_dict() for block in first]
    save_file(backbone.variant(10, states, None).state_dict(), file)  # type: ignore[arg-type]
    backbone.check_init_from(file)
    again = [backbone.build_block(index, 1, file).eval() for index in range(4)]
    plans = plans_of(backbone, size, 2)
    with torch.no_grad():
        found, wanted = (chained(blocks, images_of(size), plans) for blocks in (again, first))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Swin's windows are clipped along each axis, Twins' are square ones: there the shorter side of 64 x 128 is padded too.
PADDED = [
    ("swin", 4, (64, 64), []),
    ("swin", 4, (96, 96), [2]),
    ("swin", 5, (96, 96), [0, 1, 2]),
    ("swin", 4, (64, 128), []),
    ("swin", 3, (96, 96), []),
    ("twins", 4, (64, 64), []),
    ("twins", 4, (64, 128), [3]),
    ("twins", 5, (96, 96), [0, 1, 2]),
    ("twins", 3, (96, 96), []),
]


@pytest.mark.parametrize(("family", "window", "size", "levels"), PADDED)
def test_a_variant_differs_from_its_blocks_where_timm_pads_windows_and_nowhere_else(
    family: str, window: int, size: tuple[int, int], levels: list[int], shake: Shake
) -> None:
    windows = {"swin": {"window_size": window}, "twins": {"wss": [window] * 4}}
    backbone = tiny(family, img_size=list(size), **windows[family])
    assert backbone.padded_levels(size) == levels
    blocks = built(backbone, shake)
    units = backbone.grid[0] * backbone.grid[1]
    with torch.no_grad():
        tokens = chained(blocks, images_of(size), plans_of(backbone, size, units))
        states = [block.state_dict() for block in blocks]
        norm = nn.LayerNorm(24 if family == "twins" else 64, eps=backbone.norm_eps)
        expected = norm(tokens[-1]).mean(dim=1)
        found = backbone.variant(10, states, norm.state_dict())(images_of(size))
    difference = float((found - expected).norm() / expected.norm())
    assert difference > 1e-3 if levels else difference < 1e-5


@pytest.mark.parametrize("depths", [[2, 2, 6, 2], [2, 2, 2, 2]])
def test_weights_of_another_depth_are_refused(depths: list[int], family: str, tmp_path: Path) -> None:
    other = tiny(family, depths=depths)
    save_file(
        random_variant(other, sum(depths), seed=0).state_dict(),  # type: ignore[arg-type]
        tmp_path / "w.safetensors",
    )
    backbone = tiny(family)
    reason = "has 'l?.*blocks" if depths[2] > 4 else "has no '.*blocks"
    with pytest.raises(ValueError, match=reason):
        backbone.check_init_from(str(tmp_path / "w.safetensors"))
