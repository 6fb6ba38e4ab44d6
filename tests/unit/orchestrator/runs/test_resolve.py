from __future__ import annotations

from pathlib import Path

import pytest

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.data.phases import PhaseSpec
from bim.orchestrator.runs.resolve import data_spec, resolve
from bim.orchestrator.training.spec import DecoderSpec


def problem(*argv: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        resolve(load_settings(argv))
    return str(caught.value).splitlines()


def test_every_block_gets_its_own_values() -> None:
    settings = load_settings(
        ["--blocks", "[1,1,6]", "--mask.ratio", "[0.5,0.5,0.75]", "--decoder.dim", "[32,32,64]"]
    )
    spec, backbone = resolve(settings)
    assert spec.blocks == (1, 1, 6)
    assert spec.mask_ratios == (0.5, 0.5, 0.75)
    assert spec.decoders == (DecoderSpec(1, 32, 2), DecoderSpec(1, 32, 2), DecoderSpec(1, 64, 2))
    assert backbone.grid == (4, 4)
    assert spec.mean == backbone.mean


def test_equal_blocks_are_counted_out() -> None:
    assert resolve(load_settings(["--recipe", "vit_base_imagenet"]))[0].blocks == (3, 3, 3, 3)


def test_automatic_precision_is_what_the_device_has() -> None:
    assert resolve(load_settings([]))[0].optim.precision == "fp32"
    assert resolve(load_settings([]), auto_precision="bf16")[0].optim.precision == "bf16"
    assert resolve(load_settings(["--optim.precision", "fp16"]), "bf16")[0].optim.precision == "fp16"


def test_a_backbone_that_cannot_be_cut_as_asked_is_a_wrong_setting() -> None:
    assert "vit_tiny_patch16_224" in problem("--backbone.name", "vit_tiny_patch16_225")[0]
    assert "blocks" in problem("--blocks", "[2,2,2,1]")[0]
    assert "backbone.model_args.img_size" in problem("--backbone.model_args.img_size", "33")[0]


def test_all_that_the_backbone_refuses_is_named_line_by_line(tmp_path: Path) -> None:
    lines = problem(
        *[
            "--mask.ratio",
            "0.99",
            "--decoder.dim",
            "[62,64,64,62]",
            "--init_from",
            str(tmp_path / "none.safetensors"),
        ]
    )
    assert [line.split()[0] for line in lines] == ["mask.ratio", "decoder.dim", "init_from"]


def test_the_data_of_the_settings_are_named_for_the_actors() -> None:
    spec = data_spec(*_with_backbone("--seed", "3", "--data.split_seed", "5"))
    assert (spec.source, spec.phases) == ("digits", (PhaseSpec(0, (32, 32), 64),))
    assert (spec.seed, spec.split_seed, spec.flip) == (3, 5, False)


def _with_backbone(*argv: str) -> tuple[Settings, Backbone]:
    settings = load_settings(argv)
    return settings, resolve(settings)[1]


def test_a_resolution_schedule_becomes_phases_of_the_data() -> None:
    schedule = "[[0, 16], [0.5, 24, 32], [70, 32, 16, 4]]"
    spec = data_spec(*_with_backbone("--schedule.resolution", schedule))
    assert spec.phases == (
        PhaseSpec(0, (16, 16), 64, 1),
        PhaseSpec(40, (24, 24), 32, 1),
        PhaseSpec(70, (32, 32), 16, 4),
    )


def test_a_resolution_that_the_patches_do_not_divide_is_refused() -> None:
    (line,) = problem("--schedule.resolution", "[[0, 20], [0.5, 32]]")
    assert "20" in line
    assert "8" in line


def test_a_resolution_whose_grid_leaves_nothing_visible_is_refused() -> None:
    (line,) = problem("--schedule.resolution", "[[0, 8], [0.5, 32]]", "--decoder.throw_ratio", "0.5")
    assert line.startswith("mask.ratio 0.75 leaves block 0 no visible unit out of 1")


def test_a_throw_ratio_must_leave_a_token_to_decode() -> None:
    (line,) = problem("--decoder.throw_ratio", "0.75")
    assert line.startswith("decoder.throw_ratio 0.75")
    assert "0.6875" in line  # of 16 tokens 4 are visible, so 11 can be thrown


def test_of_several_blocks_the_one_that_bears_the_least_is_named() -> None:
    swin = ["--backbone.name", "swin_tiny_patch4_window7_224", "--backbone.model_args.img_size", "128"]
    (line,) = problem(*swin, "--decoder.throw_ratio", "0.74")
    assert line.startswith("block 3: decoder.throw_ratio 0.74")
    assert "the most is 0.6875" in line
    resolve(load_settings([*swin, "--decoder.throw_ratio", "0.6875"]))
    (line,) = problem("--decoder.throw_ratio", "[0, 0.75, 0.7, 0]")
    assert line.startswith("block 1: decoder.throw_ratio 0.75")


def test_of_two_mask_ratios_the_last_holds_for_all_blocks_where_all_tokens_are_encoded() -> None:
    both = ["--mask.ratio", "[0.6, 0.75]"]
    assert resolve(load_settings([*both, "--mask.encode", "all"]))[0].mask_ratios == (0.75,) * 4
    assert resolve(load_settings(both))[0].mask_ratios == (0.6, 0.65, 0.7, 0.75)
    assert "must be the same" in problem("--mask.ratio", "[0.6, 0.6, 0.7, 0.75]", "--mask.encode", "all")[0]


def test_every_block_has_its_own_target_and_throw_ratio() -> None:
    spec, _ = resolve(
        load_settings(
            [
                *["--target.name", "[hog,hog,hog,pixels]", "--target.cell", "[4,8,16,8]"],
                *["--decoder.throw_ratio", "[0.5,0.5,0.25,0]"],
            ]
        )
    )
    assert [target.name for target in spec.targets] == ["hog", "hog", "hog", "pixels"]
    assert [target.args.get("cell") for target in spec.targets] == [4, 8, 16, None]
    assert [decoder.throw_ratio for decoder in spec.decoders] == [0.5, 0.5, 0.25, 0.0]


def test_a_hog_cell_that_fits_neither_patch_nor_image_is_refused() -> None:
    lines = problem("--target.name", "hog", "--target.cell", "5")
    assert all("target.cell" in line for line in lines)


def test_where_all_tokens_are_encoded_nothing_can_be_thrown() -> None:
    (line,) = problem("--mask.encode", "all", "--decoder.throw_ratio", "0.5")
    assert line.startswith("decoder.throw_ratio must be 0 where all tokens are encoded")
    (line,) = problem("--mask.encode", "all", "--mask.ratio", "[0.5,0.5,0.75,0.75]")
    assert line.startswith("mask.ratio must be the same in every block")
