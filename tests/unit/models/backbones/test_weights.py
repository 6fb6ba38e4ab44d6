from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from bim.models.backbones import ViTBackbone, weights
from bim.models.masks.plan import MaskPlan
from bim.models.seeding import forked_rng, generator
from bim.models.tokens import gather_tokens

NAME = "vit_tiny_patch16_224"
Build = Callable[..., ViTBackbone]
Unmasked = Callable[[int, tuple[int, int]], MaskPlan]


def timm_model(args: dict[str, Any], **changes: Any) -> nn.Module:
    with forked_rng("checkpoint"):
        model: nn.Module = timm.create_model(NAME, **(args | changes))
    return model


def timm_folder(path: Path, model: nn.Module, **args: Any) -> Path:
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"architecture": NAME, "model_args": args}))
    return path


def features(
    backbone: ViTBackbone, init_from: str, norm: nn.Module, images: torch.Tensor, plan: MaskPlan
) -> torch.Tensor:
    x = images
    with torch.no_grad():
        for block in backbone.blocks:
            x = backbone.build_block(block.index, 0, init_from)(x, plan)
        prefix = backbone.blocks[0].num_prefix_tokens
        patches: torch.Tensor = gather_tokens(norm(x)[:, prefix:], plan.permutation.argsort(dim=1))
    return patches


@pytest.mark.parametrize("size", [[32, 32], [48, 48], [16, 64]])
def test_a_timm_folder_gives_its_features_on_our_grid(
    size: list[int], tmp_path: Path, tiny_args: dict[str, Any], tiny_backbone: Build, unmasked_plan: Unmasked
) -> None:
    model = timm_model(tiny_args, img_size=size)
    folder = timm_folder(tmp_path / "model", model, img_size=size)
    backbone = tiny_backbone([1, 3])
    images, plan = torch.randn(1, 3, 32, 32, generator=generator(0)), unmasked_plan(1, (4, 4))
    model.set_input_size((32, 32))
    with torch.no_grad():
        expected = model.forward_features(images)[:, 1:]
    for init_from in (str(folder), f"local-dir:{folder}"):
        backbone.check_init_from(init_from)
        ours = features(backbone, init_from, model.norm, images, plan)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_block_that_paints_takes_weights_that_know_no_paint(
    tmp_path: Path, tiny_args: dict[str, Any], tiny_backbone: Build
) -> None:
    folder = timm_folder(tmp_path / "model", timm_model(tiny_args))
    backbone = tiny_backbone(2, encode="all")
    backbone.check_init_from(str(folder))
    loaded, fresh = (backbone.build_block(0, 0, init).state_dict() for init in (str(folder), None))
    assert torch.equal(loaded["stem.paint.colour"], fresh["stem.paint.colour"])
    assert torch.equal(loaded["stem.cls_token"], timm_model(tiny_args).state_dict()["cls_token"])


@pytest.mark.parametrize("nested", [None, "model", "state_dict"])
def test_a_single_file_is_enough(
    nested: str | None, tmp_path: Path, tiny_args: dict[str, Any], tiny_backbone: Build
) -> None:
    state = timm_model(tiny_args).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({nested: state, "epoch": 3} if nested else state, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        block = tiny_backbone(2).build_block(1, 0, str(tmp_path / file)).state_dict()
        assert torch.equal(block["layers.1.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])


def test_a_deeper_checkpoint_gives_its_first_layers(
    tmp_path: Path, tiny_args: dict[str, Any], tiny_backbone: Build
) -> None:
    folder = timm_folder(tmp_path / "deep", timm_model(tiny_args, depth=6), img_size=32)
    tiny_backbone(2).check_init_from(str(folder))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"class_token": False}),
        ({"no_embed_class": True}, {}),
        ({"no_embed_class": True, "reg_tokens": 3}, {"reg_tokens": 3}),
        ({"reg_tokens": 4}, {"reg_tokens": 4}),
    ],
)
def test_patch_positions_are_found_behind_those_of_prefix_tokens(
    theirs: dict[str, Any],
    ours: dict[str, Any],
    tmp_path: Path,
    tiny_args: dict[str, Any],
    tiny_backbone: Build,
) -> None:
    model = timm_model(tiny_args, **theirs)
    folder = timm_folder(tmp_path / "model", model)
    positions = tiny_backbone(2, **ours).build_block(0, 0, str(folder)).state_dict()["stem.pos_embed"]
    assert torch.equal(positions[:, -16:], model.state_dict()["pos_embed"][:, -16:])
    if "no_embed_class" in theirs:
        assert not positions[:, :-16].any()


def test_timms_pretrained_weights_are_taken_by_name(
    tiny_args: dict[str, Any], tiny_backbone: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm_model(tiny_args)
    monkeypatch.setattr(weights.timm, "create_model", lambda name, pretrained: {NAME: model}[name])
    opened = weights.open_weights(NAME)
    assert opened.image_size == (32, 32)
    assert torch.equal(opened.take(["cls_token"])["cls_token"], model.cls_token)


def test_pretrained_weights_that_cannot_be_downloaded_are_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(name: str, pretrained: bool) -> nn.Module:
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(weights.timm, "create_model", offline)
    with pytest.raises(
        ValueError, match=r"of 'vit_tiny_patch16_224' cannot be loaded \(no route to host\)"
    ) as refused:
        weights.open_weights(NAME)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"embed_dim": 48}, "has shape"),
        ({"depth": 3}, "has no 'blocks.3"),
        ({"init_values": 0.1}, "which the backbone does not"),
        ({"qkv_bias": False}, "has no 'blocks.0.attn.qkv.bias'"),
        ({"class_token": False, "global_pool": "avg"}, "has no 'cls_token'"),
        ({"patch_size": 16}, "has shape"),
        ({"pre_norm": True}, "has no 'patch_embed.proj.bias'"),
        ({"embed_norm_layer": "layernorm"}, "has 'patch_embed.norm"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    change: dict[str, Any], reason: str, tmp_path: Path, tiny_args: dict[str, Any], tiny_backbone: Build
) -> None:
    folder = timm_folder(tmp_path / "other", timm_model(tiny_args, **change))
    with pytest.raises(ValueError, match=reason):
        tiny_backbone(2).check_init_from(str(folder))
    with pytest.raises(ValueError, match=reason):
        [tiny_backbone(2).build_block(index, 0, str(folder)) for index in range(2)]


def test_positions_that_fit_no_grid_are_refused(
    tmp_path: Path, tiny_args: dict[str, Any], tiny_backbone: Build
) -> None:
    state = timm_model(tiny_args).state_dict()
    save_file(state | {"pos_embed": torch.zeros(1, 15, 24)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"15 positions .* 1 prefix tokens, do not fit"):
        tiny_backbone(2).check_init_from(str(tmp_path / "w.safetensors"))


def test_a_class_token_that_carries_a_position_needs_a_row_for_it(
    tmp_path: Path, tiny_args: dict[str, Any], tiny_backbone: Build
) -> None:
    folder = timm_folder(tmp_path / "model", timm_model(tiny_args))
    with pytest.raises(ValueError, match=r"17 positions .* has 0 rows for prefix tokens"):
        tiny_backbone(2, no_embed_class=True).check_init_from(str(folder))


@pytest.mark.parametrize(
    ("init_from", "reason"),
    [
        (
            "vit_tiny_patch16_22",
            "neither a timm name nor a folder nor a file.*did you mean 'vit_tiny_patch16_224'",
        ),
        ("local-dir:nowhere", "no folder 'nowhere'"),
        ("missing.safetensors", "neither a timm name"),
    ],
)
def test_weights_that_are_not_there_are_refused(init_from: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        weights.open_weights(init_from)


def test_a_folder_without_weights_or_with_a_broken_config_is_refused(
    tmp_path: Path, tiny_args: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors"):
        weights.open_weights(str(tmp_path))
    folder = timm_folder(tmp_path / "model", timm_model(tiny_args))
    for broken in ("{", "[]"):
        (folder / "config.json").write_text(broken)
        with pytest.raises(ValueError, match="is not a timm config"):
            weights.open_weights(str(folder))


def test_a_file_cut_short_is_refused(tmp_path: Path, tiny_args: dict[str, Any]) -> None:
    state = timm_model(tiny_args).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match="cannot be read as weights"):
            weights.open_weights(str(file))


class Intruder:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"weight": Intruder(tmp_path / "trace")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        weights.open_weights(str(tmp_path / "w.pth"))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("prefix", ["module.", "teacher.", "module.backbone.", "model.encoder.vit."])
def test_a_prefix_that_all_keys_share_is_stripped_and_told(
    prefix: str,
    tmp_path: Path,
    tiny_args: dict[str, Any],
    tiny_backbone: Build,
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = {f"{prefix}{key}": value for key, value in timm_model(tiny_args).state_dict().items()}
    state["head_of_another_task.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        file, backbone = str(tmp_path / name), tiny_backbone(2)
        with caplog.at_level("INFO"):
            backbone.check_init_from(file)
        assert caplog.messages == [f"init_from: the weights of '{file}' are those under '{prefix}'"]
        caplog.clear()
        for index, key in ((0, "stem.cls_token"), (1, "layers.1.mlp.fc1.weight")):
            block = backbone.build_block(index, 0, file).state_dict()
            timm_key = {"stem.cls_token": "cls_token"}.get(key, "blocks.3.mlp.fc1.weight")
            assert torch.equal(block[key], state[prefix + timm_key])


def test_of_student_and_teacher_the_teacher_is_taken_and_two_others_are_refused(
    tmp_path: Path, tiny_args: dict[str, Any], tiny_backbone: Build
) -> None:
    state = timm_model(tiny_args).state_dict()

    def file(*prefixes: str) -> str:
        both = {
            f"{prefix}{key}": value + number
            for number, prefix in enumerate(prefixes)
            for key, value in state.items()
        }
        save_file(both, tmp_path / "w.safetensors")
        return str(tmp_path / "w.safetensors")

    block = tiny_backbone(2).build_block(0, 0, file("student.", "teacher.")).state_dict()
    assert torch.equal(block["stem.cls_token"], state["cls_token"] + 1)
    with pytest.raises(ValueError, match=r"holds several models, under 'a\.' and 'b\.'"):
        tiny_backbone(2).check_init_from(file("a.", "b."))


@pytest.mark.parametrize(
    "content",
    [
        b"hello world", b"", b"seed: 0\n", b"{}", b"\x80\x02hello", b"\x80\x02K\x01.", b"PK\x03\x04 no archive",
        b"(lp0\n.", b"\x89PNG\r\n", b"\x80\x02}q\x00.", bytes(range(256)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.txt"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(
    content: bytes, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as weights|holds (a|no) ") as caught:
        weights.open_weights(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    ['{"model_args": {"img_size": "big"}}', '{"model_args": {"img_size": [8]}}', '{"model_args": {"img_size": {"a": 1}}}',
     '{"pretrained_cfg": {"input_size": [null]}}', "[" * 100_000, '{"model_args": 3}'],
)  # fmt: skip
def test_a_config_of_any_content_is_refused(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="is not a timm config"):
        weights.config_image_size(tmp_path / "config.json")


def test_a_config_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="is not a timm config"):
        weights.config_image_size(tmp_path / "config.json")
