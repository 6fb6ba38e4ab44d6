"""`data.batch_size: auto` is found wherever it can be written, and a number takes its place."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.help_page import help_text
from bim.orchestrator.config.schema import Settings, SettingsError, json_schema
from bim.orchestrator.config.transforms import settings_to_yaml, with_changes
from bim.orchestrator.jobs.backbone_entries import backbone_entries
from bim.orchestrator.jobs.python_api import settings_options

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"

ENTRY = f"{{name: {SWIN}, settings: {{data.batch_size: auto}}}}"


class Fits:
    """Finds that as many images fit as it is given, one after the other, and keeps what it was asked."""

    def __init__(self, *batches: int) -> None:
        self.batches, self.asked = list(batches), list[Settings]()

    def __call__(self, settings: Settings) -> int:
        self.asked.append(settings)
        return self.batches.pop(0)


def chosen(given: Mapping[str, Any], budget_s: float | None) -> dict[str, Any]:
    """Settings as they are chosen for images: 64 of them a step."""
    assert "auto" not in json.dumps(dict(given))
    return {
        "name": "images",
        "backbone": {"name": VIT},
        "data": {"source": "images", "batch_size": 64, "accumulate": 1},
        "schedule": {"epochs": 10},
    }


def own_recipe(tmp_path: Path, batch_size: str = "auto", **more: str) -> str:
    file = tmp_path / "mine.yaml"
    lines = [
        "name: mine",
        f"backbone: {{name: {VIT}}}",
        f"data: {{source: digits, batch_size: {batch_size}}}",
        "schedule: {epochs: 1}",
        *(f"{key}: {value}" for key, value in more.items()),
    ]
    file.write_text("\n".join(lines))
    return str(file)


@pytest.mark.parametrize(
    "argv",
    [
        ["--data.batch_size", "auto"],
        ["--data.batch-size", "auto"],
        ["--data.batch_size=auto"],
        ["--data.batch-size=auto"],
        ["--data.batch_size", '"auto"'],
        ["--data.batch_size='auto'"],
        ["--data.batch_size", " auto "],
        ["--data.batch_size", "8", "--data.batch_size", "auto"],
    ],
    ids=" ".join,
)
def test_every_form_of_the_command_line_is_taken(argv: list[str]) -> None:
    assert load_settings(argv, largest_batch=Fits(48)).data.batch_size == 48


@pytest.mark.parametrize("text", ["auto", "'auto'", '"auto"'])
def test_a_recipe_may_say_it_and_an_option_goes_before_it(tmp_path: Path, text: str) -> None:
    recipe = own_recipe(tmp_path, text)
    assert load_settings(["--recipe", recipe], largest_batch=Fits(48)).data.batch_size == 48
    options = ["--recipe", recipe, "--data.batch_size", "7"]
    assert load_settings(options, largest_batch=Fits()).data.batch_size == 7


def test_python_may_say_it_as_a_section_as_a_dotted_key_and_in_a_recipe(tmp_path: Path) -> None:
    for options in (
        settings_options(None, None, None, {}, {"data": {"batch_size": "auto"}}),
        settings_options(None, None, None, {"data.batch_size": "auto"}, {}),
        settings_options(None, None, own_recipe(tmp_path), {}, {}),
    ):
        assert load_settings(options, largest_batch=Fits(48)).data.batch_size == 48


def test_images_of_a_step_that_were_chosen_stay_as_many() -> None:
    argv = ["--data.source", "images", "--data.batch_size", "auto"]
    parts = load_settings(argv, chosen, Fits(16))
    assert (parts.data.batch_size, parts.data.accumulate) == (16, 4)
    whole = load_settings(argv, chosen, Fits(512))
    assert (whole.data.batch_size, whole.data.accumulate) == (64, 1)
    given = load_settings([*argv, "--data.accumulate", "2"], chosen, Fits(16))
    assert (given.data.batch_size, given.data.accumulate) == (16, 2)


def test_what_is_wrong_beside_it_is_told_before_anything_is_computed() -> None:
    with pytest.raises(SettingsError, match=r"^seed must be a whole number"):
        load_settings(["--data.batch_size", "auto", "--seed", "x"], largest_batch=Fits())


@pytest.mark.parametrize("text", ["Auto", "0", "many"])
def test_what_is_neither_is_refused_with_both_named(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(["--data.batch_size", text], largest_batch=Fits())
    assert str(caught.value).startswith("data.batch_size must be a whole number of at least 1 or auto, not ")


def test_where_nothing_can_compute_it_a_number_is_asked_for(tmp_path: Path) -> None:
    for refused in (
        lambda: load_settings(["--data.batch_size", "auto"]),
        lambda: load_settings(["--recipe", own_recipe(tmp_path)]),
        lambda: with_changes(load_settings([]), {"data.batch_size": "auto"}),
    ):
        with pytest.raises(SettingsError, match=r"data\.batch_size: auto is for .*; give a number here"):
            refused()


def test_several_backbones_share_one_that_fits_those_without_a_batch_of_their_own() -> None:
    fits = Fits(48)
    backbones = f"[{VIT}, {{name: {SWIN}, settings: {{data.batch_size: 8}}}}]"
    settings = load_settings(
        ["--backbones", backbones, "--data.batch_size", "auto", "--out", "runs/a"], largest_batch=fits
    )
    assert [entry.data.batch_size for entry in backbone_entries(settings).values()] == [48, 8]
    (asked,) = fits.asked
    assert [entry.name for entry in asked.backbones or ()] == [VIT]


def test_a_backbone_may_have_one_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    fits = Fits(24)
    with caplog.at_level(logging.INFO):
        settings = load_settings(
            ["--backbones", f"[{VIT}, {ENTRY}]", "--data.batch_size", "8", "--out", "runs/a"],
            largest_batch=fits,
        )
    assert [entry.data.batch_size for entry in backbone_entries(settings).values()] == [8, 24]
    assert [entry.name for entry in fits.asked[0].backbones or ()] == [SWIN]
    assert f"data.batch_size of {SWIN}: 24" in caplog.messages


def test_a_recipe_with_both_and_chosen_settings_with_an_entry(tmp_path: Path) -> None:
    fits = Fits(32, 24)
    recipe = own_recipe(tmp_path, backbones=f"[{VIT}, {ENTRY}]")
    settings = load_settings(["--recipe", recipe, "--out", "runs/a"], largest_batch=fits)
    assert [entry.data.batch_size for entry in backbone_entries(settings).values()] == [32, 24]

    argv = ["--data.source", "images", "--backbones", f"[{VIT}, {ENTRY}]", "--out", "runs/a"]
    vit, swin = backbone_entries(load_settings(argv, chosen, Fits(16))).values()
    assert (vit.data.batch_size, vit.data.accumulate) == (64, 1)
    assert (swin.data.batch_size, swin.data.accumulate) == (16, 4)


def test_a_run_that_is_resumed_keeps_its_number(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    recipe = own_recipe(tmp_path, backbones=f"[{VIT}, {ENTRY}]")
    argv = ["--recipe", recipe, "--out", str(out)]
    first = load_settings(argv, largest_batch=Fits(32, 24))
    (out / "settings.yaml").write_text(settings_to_yaml(first))
    assert (first.data.batch_size, (first.backbones or ())[1].settings) == (32, {"data.batch_size": 24})
    for again in (
        [*argv, "--resume"],
        ["--out", str(out), "--resume"],
        ["--out", str(out), "--resume", "--data.batch_size", "auto"],
    ):
        resumed = load_settings(again, largest_batch=Fits())
        assert resumed.data == first.data
        assert resumed.backbones == first.backbones


def test_a_resumed_run_without_saved_settings_computes_it(tmp_path: Path) -> None:
    argv = ["--recipe", own_recipe(tmp_path), "--out", str(tmp_path / "none"), "--resume"]
    assert load_settings(argv, largest_batch=Fits(48)).data.batch_size == 48


def test_help_and_editors_know_it() -> None:
    assert "--data.batch_size INT|auto" in help_text()
    schema = json_schema()["$defs"]["DataSettings"]["properties"]["batch_size"]
    assert schema["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "string", "const": "auto"}]
    assert "auto: the largest that fits" in schema["description"]
