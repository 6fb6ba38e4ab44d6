"""Exported folders as timm opens them, in this process and in one that lacks this project."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from bim.models.backbones import Backbone, open_backbone, random_variant
from bim.models.tokens import normalize_images
from bim.orchestrator.data.crops import center_crop_resize
from bim.orchestrator.evaluation.model_cost import gflops
from bim.orchestrator.export import timm_folder
from bim.orchestrator.export.model_card import CardFacts
from bim.orchestrator.export.timm_folder import export_decoder, export_variant, folder_name
from bim.orchestrator.files import StorageError, remove_temporary_files

ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 4}
CARD = CardFacts(run="demo", seed=0)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return open_backbone("vit_tiny_patch16_224", 2, ARGS)


@pytest.fixture(scope="module")
def model(backbone: Backbone) -> nn.Module:
    variant = random_variant(backbone, 2, seed=0)
    with torch.no_grad():  # a trained norm is neither ones nor zeros
        variant.norm.weight.uniform_(0.5, 2.0)  # type: ignore[operator, union-attr]
        variant.norm.bias.uniform_(-1.0, 1.0)  # type: ignore[operator, union-attr]
    return variant


@pytest.fixture
def folder(backbone: Backbone, model: nn.Module, tmp_path: Path) -> Path:
    return export_variant(backbone, 2, model, tmp_path / "out" / folder_name(2), CARD)


@torch.inference_mode()
def features(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    embedding: Tensor = model(images)
    return embedding


def opened(folder: Path, **args: Any) -> nn.Module:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **args)
    return model.eval()


def test_a_process_without_this_project_opens_the_folder_and_gets_equal_features(
    folder: Path, model: nn.Module, tmp_path: Path
) -> None:
    torch.save(IMAGES, tmp_path / "images.pt")
    script = f"""
import sys
for ours in ("models", "orchestrator", "pipelines"):
    sys.modules[ours] = None  # importing it fails, installed or not
import timm, torch
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
with torch.inference_mode():
    torch.save(model(torch.load("images.pt")), "features.pt")
"""
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "features.pt"), features(model))


def test_the_folder_holds_weights_config_and_card_and_nothing_is_left_beside_it(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["depth02"]


def test_the_weights_have_the_permissions_of_the_config(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_timm_prepares_images_as_they_were_evaluated(folder: Path, backbone: Backbone) -> None:
    config = resolve_model_data_config(opened(folder))
    assert config == {
        "input_size": (3, 32, 32),
        "interpolation": "bicubic",
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    smooth = np.random.default_rng(0).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((96, 64), Image.Resampling.BICUBIC)
    by_timm = create_transform(**config)(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    ours = normalize_images(center_crop_resize(pixels, (32, 32))[None], backbone.mean, backbone.std)[0]
    one_level = 1 / 255 / min(backbone.std)
    assert (by_timm - ours).abs().max() <= 2 * one_level  # PIL and torch round differently


def test_it_opens_at_another_image_size_with_positions_resampled(
    folder: Path, backbone: Backbone, model: nn.Module
) -> None:
    larger = opened(folder, img_size=64)
    assert features(larger, torch.zeros(1, 3, 64, 64)).shape == (1, 32)
    resampled = resample_abs_pos_embed(model.pos_embed, new_size=[8, 8], old_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(larger.pos_embed, resampled, check_stride=False)


def test_it_opens_with_a_new_classifier_and_the_trained_norm(folder: Path, model: nn.Module) -> None:
    classifier = opened(folder, num_classes=10)
    assert features(classifier).shape == (2, 10)
    assert torch.equal(classifier.norm.weight, model.norm.weight)  # type: ignore[arg-type, union-attr]


def test_a_variant_that_is_not_square_comes_back(tmp_path: Path) -> None:
    wide = open_backbone("vit_tiny_patch16_224", 2, ARGS | {"img_size": [16, 32]})
    model = random_variant(wide, 2, seed=0)
    folder = export_variant(wide, 2, model, tmp_path / "wide", CARD)
    images = IMAGES[:, :, :16]
    assert torch.equal(features(opened(folder), images), features(model, images))
    assert resolve_model_data_config(opened(folder))["input_size"] == (3, 16, 32)


@pytest.mark.parametrize("extra", [{"reg_tokens": 2}, {"class_token": False}, {"init_values": 0.1}])
def test_vits_of_other_kinds_come_back(tmp_path: Path, extra: dict[str, Any]) -> None:
    other = open_backbone("vit_tiny_patch16_224", 2, ARGS | extra)
    model = random_variant(other, 4, seed=0)
    assert torch.equal(
        features(opened(export_variant(other, 4, model, tmp_path / "x", CARD))), features(model)
    )


SWIN = {"embed_dim": 12, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 3, 4], "window_size": 4}
PYRAMIDS: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "pvt_v2_b0": {"depths": [1, 2, 2, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 3, 4]},
    "convnext_atto": {"depths": [1, 2, 2, 1], "dims": [8, 16, 24, 32]},
    "resnet50": {"layers": [1, 2, 2, 1], "channels": [4, 8, 12, 16]},
    "resnetv2_50": {"layers": [1, 2, 2, 1], "channels": [8, 16, 24, 32]},
}


@pytest.mark.parametrize("size", [(64, 64), (96, 128)])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_every_level_of_a_pyramid_comes_back_and_its_card_embeds(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    pyramid = open_backbone(name, 4, {"img_size": 64} | PYRAMIDS[name], encode="all")
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    for depth in pyramid.depths:
        model = random_variant(pyramid, depth, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        folder = export_variant(pyramid, depth, model, tmp_path / folder_name(depth), CARD, image_size=size)
        expected = features(model, images)
        assert expected.shape == (2, pyramid.usage(depth).width)
        torch.testing.assert_close(features(pyramid.load_exported(folder, depth), images), expected)
        card = (folder / "README.md").read_text()
        (line,) = [line for line in card.splitlines() if line.startswith("embedding = ")]
        call = line.removeprefix("embedding = ").partition("  #")[0]
        with torch.inference_mode():
            embedding = eval(call, {"model": opened(folder), "x": images})
        torch.testing.assert_close(embedding, expected)
        assert tuple(resolve_model_data_config(opened(folder))["input_size"]) == (3, *size)
        assert gflops(model, size) > 0
        assert not any("paint" in key for key in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", SWIN),
        (
            "twins_svt_small",
            {"depths": [1, 2, 2, 1], "embed_dims": [8, 8, 12, 12], "num_heads": [1, 1, 2, 2]},
        ),
    ],
)
def test_every_depth_of_what_was_trained_on_visible_tokens_comes_back(
    name: str, args: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    backbone = open_backbone(name, 4, args)
    assert backbone.encode == "visible"
    states = [backbone.build_block(info.index, seed=0).state_dict() for info in backbone.blocks]
    gen = torch.Generator().manual_seed(0)
    for state in states:  # tables start too small to be missed
        state |= {key: value + 0.05 * torch.randn(value.shape, generator=gen) for key, value in state.items()}
    images = torch.randn(2, 3, *size, generator=gen)
    for depth in backbone.depths:
        model = backbone.variant(depth, states, norm=None, image_size=size)
        folder = export_variant(backbone, depth, model, tmp_path / folder_name(depth), CARD, image_size=size)
        torch.testing.assert_close(features(opened(folder), images), features(model, images))


def test_nothing_of_timms_weights_of_that_name_is_claimed(tmp_path: Path) -> None:
    tagged = open_backbone("vit_tiny_patch16_224.augreg_in21k", 2, ARGS)
    folder = export_variant(tagged, 2, random_variant(tagged, 2, seed=0), tmp_path / "x", CARD)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert not {"license", "tag", "url", "hf_hub_id", "origin_url", "paper_ids"} & set(
        config["pretrained_cfg"]
    )


def test_an_own_export_is_replaced(folder: Path, backbone: Backbone) -> None:
    other = random_variant(backbone, 2, seed=7)
    export_variant(backbone, 2, other, folder, CARD)
    assert torch.equal(features(opened(folder)), features(other))
    assert [path.name for path in folder.parent.iterdir()] == ["depth02"]


def test_an_empty_folder_is_filled(backbone: Backbone, model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_variant(backbone, 2, model, tmp_path / "empty", CARD)
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize(
    "content", [{"notes.txt": "mine"}, {"config.json": "{}"}, {"config.json": "no json"}, None]
)
def test_a_foreign_folder_or_file_is_refused_and_left_alone(
    backbone: Backbone, model: nn.Module, tmp_path: Path, content: dict[str, str] | None
) -> None:
    target = tmp_path / "target"
    if content is None:
        target.write_text("mine")
    else:
        target.mkdir()
        for name, text in content.items():
            (target / name).write_text(text)
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="not an exported model of this project"):
        export_variant(backbone, 2, model, target, CARD)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_timm_would_open_as_another_model_is_not_delivered(
    folder: Path, backbone: Backbone, model: nn.Module
) -> None:
    before = (folder / "model.safetensors").read_bytes()
    changed = random_variant(backbone, 2, seed=0)
    changed.pool_include_prefix = True  # type: ignore[assignment]  # nothing in the config or the weights tells so
    with pytest.raises(RuntimeError, match="outputs of the exported model differ"):
        export_variant(backbone, 2, changed, folder, CARD)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["depth02"]


def test_exporting_moves_neither_the_global_generator_nor_the_mode_of_the_model(
    backbone: Backbone, tmp_path: Path
) -> None:
    model = random_variant(backbone, 2, seed=0).train()
    before = torch.get_rng_state()
    export_variant(backbone, 2, model, tmp_path / "x", CARD)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_equal_decoders_are_equal_files(tmp_path: Path) -> None:
    state = {"embed.weight": torch.arange(6.0).reshape(2, 3), "ü": torch.ones(1, 1, 2)}
    paths = [export_decoder(state, tmp_path / f"block-{k}.safetensors") for k in range(20)]
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_decoder_is_a_file_of_its_own(tmp_path: Path) -> None:
    state = {"embed.weight": torch.arange(6.0).reshape(2, 3).T, "mask_token": torch.ones(1, 1, 2)}
    path = export_decoder(state, tmp_path / "decoders" / "block-0.safetensors")
    loaded = load_file(path)
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "exported_by": "bim-orchestrator"}
    export_decoder({"mask_token": torch.zeros(1)}, path)
    assert set(load_file(path)) == {"mask_token"}
    assert [file.name for file in path.parent.iterdir()] == ["block-0.safetensors"]


def test_what_a_killed_export_leaves_is_removed_by_the_next_start(
    backbone: Backbone, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(backbone: Backbone, depth: int, folder: Path, *rest: object) -> None:
        shutil.copytree(tmp_path / "variants", tmp_path / "killed" / "variants")

    monkeypatch.setattr(timm_folder, "_check_reopened", copy)
    export_variant(backbone, 2, model, tmp_path / "variants" / folder_name(2), CARD)
    assert list((tmp_path / "killed").rglob("model.safetensors"))
    remove_temporary_files(tmp_path / "killed")
    assert list((tmp_path / "killed" / "variants").iterdir()) == []


def test_an_output_directory_that_is_gone_is_not_made_again(
    backbone: Backbone, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="was its folder renamed, removed or unmounted"):
        export_variant(backbone, 2, model, tmp_path / "gone" / "variants" / folder_name(2), CARD)
    with pytest.raises(StorageError, match="was its folder renamed, removed or unmounted"):
        export_decoder({"a": torch.zeros(2)}, tmp_path / "gone" / "decoders" / "block-0.safetensors")
    assert list(tmp_path.iterdir()) == []
