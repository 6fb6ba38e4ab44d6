from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from bim.models.backbones import open_backbone, random_variant

NEEDS_DIFFERENTIAL = pytest.mark.skipif(
    not timm.is_model("vit_dwee_patch16_reg1_gap_256"), reason="this timm has no differential attention yet"
)


def test_a_backbone_tells_its_sizes_without_weights() -> None:
    backbone = open_backbone("vit_small_patch16_224", [3, 3, 4, 2])
    assert [block.depth for block in backbone.blocks] == [3, 6, 10, 12]
    assert [block.layers for block in backbone.blocks] == [3, 3, 4, 2]
    assert {(block.width, block.grid, block.num_prefix_tokens) for block in backbone.blocks} == {
        (384, (14, 14), 1)
    }
    assert (backbone.mask_unit_px, backbone.grid, backbone.image_size) == (16, (14, 14), (224, 224))
    assert (backbone.mean, backbone.std, backbone.norm_eps) == ((0.5,) * 3, (0.5,) * 3, 1e-6)


def test_a_tag_chooses_the_preprocessing() -> None:
    assert open_backbone("vit_base_patch16_224.mae", 4).mean == (0.485, 0.456, 0.406)


def test_an_image_may_be_higher_than_wide() -> None:
    backbone = open_backbone("vit_tiny_patch16_224", 4, {"img_size": [64, 32]})
    assert (backbone.image_size, backbone.grid) == ((64, 32), (4, 2))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_smal_patch16_224", "unknown backbone 'vit_smal_patch16_224'.*'vit_small_patch16_224'"),
        ("", "unknown backbone"),
        ("local-dir:somewhere", "unknown backbone"),
        ("vit_base_patch16_224.nope", "no tag 'nope'.*mae"),
        ("efficientnet_b0", "is timm's EfficientNet, which cannot be cut.*swin_tiny_patch4_window7_224"),
        ("vgg11", "no level with layers"),
        ("deit_tiny_distilled_patch16_224", "is timm's VisionTransformerDistilled"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed"),
        ("aimv2_large_patch14_224", "final norm is a RmsNorm"),
        pytest.param("vit_dwee_patch16_reg1_gap_256", "differential attention", marks=NEEDS_DIFFERENTIAL),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_by_name_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        open_backbone(name, 4)
    assert f"'{name.partition('.')[0]}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"img_sise": 64}, "takes no 'img_sise'; did you mean 'img_size'"),
        ({"features_only": True}, "takes no 'features_only'"),
        ({"pretrained": True}, "takes no 'pretrained'"),
        ({"init_values": None}, "'init_values' is null"),
        ({"embed_dim": "wide"}, "'embed_dim' is 'wide'; it must be a whole number"),
        ({"embed_dim": True}, "must be a whole number"),
        ({"class_token": 1}, "must be true or false"),
        ({"drop_path_rate": 0.1}, "'drop_path_rate' cannot be set"),
        ({"in_chans": 1}, "three channels"),
        ({"act_layer": torch.nn.GELU}, "cannot be written to config.json"),
        ({"num_heads": 5}, "cannot build.*num_heads"),
        ({"num_heads": 0}, "cannot build"),
        ({"img_size": "big"}, "cannot build"),
        ({"embed_dim": 30, "num_heads": 3}, "width 30 is not divisible by 4"),
        ({"img_size": 100}, "image size 100 x 100 is not divisible by the patch size 16"),
        ({"img_size": 0}, "image size"),
        ({"patch_size": [16, 8]}, "only square ones"),
        ({"pos_embed": "none"}, "no absolute positions"),
        pytest.param(
            {"attn_layer": "diff", "num_heads": 2}, "differential attention", marks=NEEDS_DIFFERENTIAL
        ),
        ({"norm_layer": "rmsnorm"}, "final norm is a RmsNorm"),
        ({"depth": 3}, "has 3 layers"),
    ],
)
def test_overrides_that_cannot_be_honored_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_backbone("vit_tiny_patch16_224", 4, args)


def test_a_random_variant_is_the_family_before_its_first_step(tiny_args: dict[str, Any]) -> None:
    backbone = open_backbone("vit_tiny_patch16_224", 2, tiny_args)
    states = [backbone.build_block(index, seed=5).state_dict() for index in range(2)]
    expected = backbone.variant(3, states, norm=None).state_dict()
    state = random_variant(backbone, 3, seed=5).state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert {key.split(".")[1] for key in state if key.startswith("blocks.")} == {"0", "1", "2"}
