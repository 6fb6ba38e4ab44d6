from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.command_line import load_settings
from orchestrator.config import SettingsError
from orchestrator.resolve import data_spec, resolve
from orchestrator.stages import DecoderSpec


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
    spec = data_spec(load_settings(["--seed", "3", "--data.split_seed", "5"]), (32, 32))
    assert (spec.source, spec.batch_size, spec.size) == ("digits", 64, (32, 32))
    assert (spec.seed, spec.split_seed, spec.flip) == (3, 5, False)
