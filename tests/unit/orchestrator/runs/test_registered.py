"""Targets, decoders and timm models that are not the project's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bim.models.decoders import DECODERS, LocalDecoder
from bim.models.masks.plan import MaskPlan
from bim.models.targets import TARGETS, PixelTarget
from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import SettingsError
from bim.orchestrator.data.source import SOURCES
from bim.orchestrator.runs.resolve import resolve
from bim.orchestrator.training.build import build_local_mim
from bim.orchestrator.training.spec import PretrainSpec

OWN = ["--plugins", "tests.own_parts"]
HERE = ["--placement.backend", "in_process"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """What a test registers is gone afterward; `tests.own_parts` is imported once in a process and stays."""
    import tests.own_parts  # noqa: F401

    tables: list[dict[str, Any]] = [TARGETS, DECODERS, SOURCES]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def problems(*argv: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        resolve(load_settings(argv))
    return str(caught.value).splitlines()


def spec_of(*argv: str) -> PretrainSpec:
    return resolve(load_settings(argv))[0]


def test_what_a_plugin_registers_is_built() -> None:
    spec = spec_of(*OWN, "--target.name", "half", "--decoder.name", "counted", "--backbone.name", "vit_own")
    assert spec.plugins == ("tests.own_parts",)
    assert [target.args for target in spec.targets] == [
        {}
    ] * 4  # it declares neither normalize nor cell nor bins
    module = build_local_mim(spec, 1)
    assert type(module.target).__name__ == "HalfTarget"
    assert type(module.decoder).__name__ == "CountedDecoder"


def test_an_own_decoder_that_is_the_built_in_one_begins_with_the_same_weights() -> None:
    own = build_local_mim(spec_of(*OWN, "--decoder.name", "counted"), 0).state_dict()
    built_in = build_local_mim(spec_of("--decoder.name", "local"), 0).state_dict()
    automatic = build_local_mim(spec_of(), 0).state_dict()
    assert own.keys() == built_in.keys() == automatic.keys()
    assert all(torch.equal(own[k], built_in[k]) and torch.equal(own[k], automatic[k]) for k in own)


def test_blocks_may_have_different_targets_and_decoders() -> None:
    names = ["--target.name", "[pixels,half,hog,half]", "--decoder.name", "[auto,counted,auto,local]"]
    spec = spec_of(*OWN, *names)
    assert [target.name for target in spec.targets] == ["pixels", "half", "hog", "half"]
    assert [decoder.name for decoder in spec.decoders] == ["auto", "counted", "auto", "local"]
    assert [sorted(target.args) for target in spec.targets] == [
        ["normalize"], [], ["bins", "cell", "normalize"], [],
    ]  # fmt: skip


def test_an_unknown_name_is_told_with_the_nearest_and_beside_other_errors() -> None:
    TARGETS["edges"] = PixelTarget
    assert problems("--target.name", "edgse")[0].endswith("not 'edgse'; did you mean 'edges'?")
    (line,) = problems("--target.name", "sift")
    assert line.startswith("target.name must be pixels, hog")
    assert line.endswith("not 'sift'; what a module of your own registers needs --plugins MODULE")
    lines = problems(
        "--decoder.name", "[auto,deep,auto,deep]", "--target.name", "sift", "--backbone.name", "vit_x"
    )
    assert [line.split(" must")[0][:15] for line in lines] == [
        "unknown backbon",
        "target.name",
        "decoder.name",
    ]


def test_a_plugin_that_cannot_be_imported_is_a_wrong_setting() -> None:
    (line,) = problems("--plugins", "no_such_module_of_mine")
    assert line.startswith("plugins: there is no module 'no_such_module_of_mine'")


@pytest.mark.parametrize("value", ["my-module", "a,,b", "5", "[1]", "./my_module.py", "{a: b}"])
def test_plugins_are_names_of_modules(value: str) -> None:
    with pytest.raises(
        SettingsError, match="plugins must be names of modules, joined by commas or as a list"
    ):
        load_settings(["--plugins", value])


def test_plugins_are_given_joined_by_commas_or_as_a_list() -> None:
    for value in ("a, b.c", "[a, b.c]"):
        assert load_settings(["--plugins", value]).plugins == ("a", "b.c")


def test_a_decoder_must_fit_what_the_blocks_encode() -> None:
    assert "'light' is for blocks that encode all tokens" in problems("--decoder.name", "light")[0]
    (line,) = problems("--decoder.name", "counted", *OWN, "--mask.encode", "all")
    assert "'counted' is for blocks that encode visible tokens" in line


def test_what_the_stages_would_not_know_is_refused() -> None:
    names = {
        "--target.name": "half",
        "--decoder.name": "counted",
        "--data.source": "stripes:100",
        "--backbone.name": "vit_own",
    }
    argv = [word for pair in names.items() for word in pair]
    lines = problems(*argv)
    assert [line.split(" is registered in this process alone")[0] for line in lines] == [
        f"{key.removeprefix('--')} '{name}'" for key, name in names.items()
    ]
    assert resolve(load_settings([*argv, *HERE]))
    assert resolve(load_settings([*argv, *OWN]))


class Mean(PixelTarget):
    """Of one value per token."""

    def __init__(self, unit: int) -> None:
        super().__init__(unit)
        self.out_dim = 1

    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images).mean(dim=-1, keepdim=True)

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        return images


class WithoutPicture:
    out_dim, head_init = 1, (1.0, 0.0)

    def __init__(self, unit: int) -> None: ...

    def __call__(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 16, 1)


class WrongShape(Mean):
    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images)[:, 1:]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (WithoutPicture, "AttributeError: 'WithoutPicture' object has no attribute 'to_image'"),
        (WrongShape, r"gives values of shape \(1, 15, 1\) .* where \(1, 16, 1\)"),
        (lambda unit, wrong: Mean(unit), "TypeError: .* missing 1 required positional argument: 'wrong'"),
    ],
)
def test_a_target_that_fails_is_told_before_anything_starts(target: Callable[..., Any], message: str) -> None:
    TARGETS["mine"] = Mean
    resolve(load_settings(["--target.name", "mine", *HERE]))
    TARGETS["mine"] = target
    (line,) = problems("--target.name", "mine", *HERE)
    assert line.startswith("target.name 'mine'")
    assert re.search(message, line)


class AllTokens(LocalDecoder):
    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        return super().forward(x, plan)[..., 1:]


class WithoutNorm(nn.Module):
    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.head = nn.Linear(sizes["in_dim"], sizes["out_dim"])

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        mean: Tensor = self.head(x.mean(dim=1, keepdim=True)).expand(-1, plan.masked.shape[1], -1)
        return mean


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (AllTokens, "gives predictions of shape (1, 12, 191) in block 0 for one image, where (1, 12, 192)"),
        (
            WithoutNorm,
            "fails in block 0 with one image: AttributeError: 'WithoutNorm' object has no attribute 'norm'",
        ),
        (lambda in_dim: None, "fails in block 0 with one image: TypeError"),
    ],
)
def test_a_decoder_that_fails_is_told_before_anything_starts(
    decoder: Callable[..., Any], message: str
) -> None:
    DECODERS["mine"] = decoder
    lines = problems("--decoder.name", "mine", *HERE)
    assert lines[0].startswith(f"decoder.name 'mine' {message}")


def test_a_model_that_timm_could_not_open_again_is_refused(tmp_path: Path) -> None:
    import timm
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def vit_by_itself(pretrained: bool = False, **keywords: Any) -> Any:
        own = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
        return VisionTransformer(**{key: value for key, value in keywords.items() if key not in own})

    register_model(vit_by_itself)
    assert timm.is_model("vit_by_itself")
    (line,) = problems("--backbone.name", "vit_by_itself", *HERE)
    assert "so timm could not load weights into it; let timm.models.build_model_with_cfg make it" in line
