"""Models that a user registers with timm, with and without a pretrained configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import _create_swin_transformer
from timm.models.vision_transformer import _create_vision_transformer

from bim.models.backbones import DenseBackbone, SwinBackbone, ViTBackbone, open_backbone, random_variant
from bim.models.seeding import forked_rng
from bim.orchestrator.export.model_card import CardFacts
from bim.orchestrator.export.timm_folder import export_variant

default_cfgs = generate_default_cfgs({"vit_with_cfg.mine": {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.4, 0.4)}})
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


@register_model
def vit_without_cfg(pretrained: bool = False, **keywords: Any) -> Any:
    return _create_vision_transformer("vit_without_cfg", pretrained=pretrained, **(SIZES | keywords))


@register_model
def vit_with_cfg(pretrained: bool = False, **keywords: Any) -> Any:
    return _create_vision_transformer("vit_with_cfg", pretrained=pretrained, **(SIZES | keywords))


@register_model
def vit_with_another_name(pretrained: bool = False, **keywords: Any) -> Any:
    """Made under the name of a model of timm, which has other sizes."""
    return _create_vision_transformer("vit_tiny_patch16_224", pretrained=pretrained, **(SIZES | keywords))


@register_model
def swin_without_cfg(pretrained: bool = False, **keywords: Any) -> Any:
    sizes = {"img_size": 64, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 1), "window_size": 4}
    return _create_swin_transformer("swin_without_cfg", pretrained=pretrained, **(sizes | keywords))


@pytest.mark.parametrize(
    "name", ["vit_without_cfg", "vit_with_cfg", "vit_with_cfg.mine", "vit_with_another_name"]
)
def test_an_own_vit_is_cut_exported_and_opened_again(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        backbone = open_backbone(name, 2)
        assert isinstance(backbone, ViTBackbone)
        assert [block.depth for block in backbone.blocks] == [2, 4]
        model = random_variant(backbone, 2, seed=0)
        folder = export_variant(backbone, 2, model, tmp_path / "depth02", CardFacts("run", 0))
    assert caplog.messages == []
    x = torch.randn(2, 3, 16, 16)
    with forked_rng("open"), torch.inference_mode():
        reopened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.allclose(reopened(x), model(x), atol=1e-5)
    assert backbone.registered_by == __name__
    assert (
        f"import {__name__}  # registers {name.partition('.')[0]} with timm"
        in (folder / "README.md").read_text()
    )


def test_the_preprocessing_is_that_of_the_configuration_or_timms_default() -> None:
    assert open_backbone("vit_with_cfg", 2).mean == (0.1, 0.2, 0.3)
    assert open_backbone("vit_without_cfg", 2).mean == (0.485, 0.456, 0.406)


def test_a_pyramid_without_a_configuration_is_cut() -> None:
    assert isinstance(open_backbone("swin_without_cfg", 2, {"img_size": 64}), SwinBackbone)
    assert isinstance(open_backbone("swin_without_cfg", 2, {"img_size": 64}, "all"), DenseBackbone)


def test_a_tag_that_does_not_exist_is_still_refused() -> None:
    for name in ("vit_without_cfg.tag", "vit_with_cfg.other"):
        with pytest.raises(ValueError, match="has no tag"):
            open_backbone(name, 2)


def test_models_of_timm_need_no_import() -> None:
    assert open_backbone("vit_tiny_patch16_224", 2).registered_by is None
