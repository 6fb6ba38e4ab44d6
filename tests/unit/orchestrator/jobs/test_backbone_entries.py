from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import settings_to_mapping, with_changes
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.distributed.placement import ClusterResources, shares
from bim.orchestrator.jobs.backbone_entries import ErrorCollector, backbone_entries

VIT, SWIN = "vit_small_patch16_224", "swin_tiny_patch4_window7_224"


def settings(backbones: Any, **changes: Any) -> Settings:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return with_changes(load_settings(["--out", "runs/a"]), {"backbones": backbones} | given)


def problem(backbones: Any, **changes: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        backbone_entries(settings(backbones, **changes))
    return str(caught.value)


def test_names_joined_by_commas_are_backbones_with_timm_s_own_arguments() -> None:
    run = load_settings(["--backbones", f"{VIT}, {SWIN}", "--out", "runs/a"])
    entries = backbone_entries(run)
    assert list(entries) == [VIT, SWIN]
    assert entries[VIT].backbone.name == VIT
    assert entries[VIT].backbone.model_args == {}
    assert entries[VIT].out == Path("runs/a") / VIT
    assert entries[SWIN].name == f"digits_demo-{SWIN}"
    assert entries[SWIN].backbones is None


def test_a_name_alone_is_timm_s_own_also_where_the_recipe_narrows_that_backbone() -> None:
    run = settings(["vit_tiny_patch16_224", VIT])
    assert run.backbone.name == "vit_tiny_patch16_224"
    assert run.backbone.model_args["depth"] == 8
    default, _ = backbone_entries(run).values()
    assert default.backbone.model_args == {}


def test_a_backbone_has_blocks_and_settings_of_its_own_and_the_rest_is_the_run_s() -> None:
    entry = {"name": SWIN, "blocks": [2, 2, 6, 2], "settings": {"optim.blr": 0.5, "decoder.dim": 64}}
    (swin,) = backbone_entries(settings([entry], mask__ratio=0.6)).values()
    assert swin.blocks == (2, 2, 6, 2)
    assert (swin.optim.blr, swin.decoder.dim, swin.mask.ratio) == (0.5, 64, 0.6)


def test_settings_with_several_backbones_survive_the_way_through_a_file() -> None:
    run = settings([VIT, {"name": SWIN, "blocks": 2, "model_args": {"depths": [1, 1]}}])
    assert settings_from_mapping(settings_to_mapping(run)) == run


def test_a_recipe_with_several_backbones_needs_no_single_one() -> None:
    values = settings_to_mapping(settings([SWIN, VIT]))
    del values["backbone"]
    assert settings_from_mapping(values).backbone.name == SWIN


def test_equal_names_are_told_apart_and_every_one_is_fit_for_a_folder() -> None:
    entries = backbone_entries(
        settings([VIT, VIT, {"name": "hf-hub:timm/vit", "alias": "wide"}, "hf-hub:timm/vit", "pictures"])
    )
    assert list(entries) == [VIT, f"{VIT}-2", "wide", "hf-hub-timm-vit", "pictures-2"]
    assert len({entry.out for entry in entries.values()}) == 5


def test_a_name_that_is_taken_is_refused() -> None:
    told = problem([{"name": VIT, "alias": "same"}, {"name": SWIN, "alias": "Same"}])
    assert told == "backbones: the name 'Same' is taken; give this one another alias"


def test_registered_models_of_two_backbones_never_share_a_name() -> None:
    vit, swin = backbone_entries(settings([VIT, SWIN], tracking__model_name="mine")).values()
    assert vit.tracking.model_name == f"mine-{VIT}"
    assert swin.tracking.model_name == f"mine-{SWIN}"


def test_the_search_of_the_default_recipe_is_left_out() -> None:
    run = settings([VIT, SWIN])
    assert run.search.trials > 0
    assert all(entry.search.trials == 0 for entry in backbone_entries(run).values())


def test_a_list_per_block_that_does_not_fit_names_the_backbone() -> None:
    told = problem([VIT, {"name": SWIN, "blocks": 2}], decoder__dim=[64, 64, 64, 64])
    assert told == f"{SWIN}: decoder.dim lists 4 values for 2 blocks: give one for each block, or one for all"


def test_what_is_wrong_with_all_backbones_is_told_once_and_the_rest_by_name() -> None:
    errors = ErrorCollector(ValueError)
    for name, text in (("a", "both\nonly a"), ("b", "both")):
        with errors.of(name):
            raise ValueError(text)
    with pytest.raises(ValueError, match=r"^both\na: only a$"):
        errors.raise_if_any()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"nmae": VIT}, "backbones: entry 1: unknown setting 'nmae'; did you mean 'name'?"),
        ({"name": VIT, "blocks": "x"}, "backbones: entry 1: blocks must be a whole number of at least 1 or"),
        (7, "backbones: entry 1 must be a timm name or a mapping, not 7"),
        ({"name": VIT, "settings": {"optim.lr": 1}}, f"{VIT}: settings: unknown setting 'optim.lr'"),
        (
            {"name": VIT, "settings": {"data.source": "x"}},
            "settings: data.source is the same for all backbones",
        ),
        ({"name": VIT, "settings": {"backbone.name": "x"}}, "belongs beside settings, as name or model_args"),
        ({"name": VIT, "settings": {"blocks": 3}}, f"{VIT}: settings: 'blocks' belongs beside settings"),
        ({"name": VIT, "settings": {"optim.blr": -1}}, f"{VIT}: optim.blr must be a number above 0, not -1"),
    ],
)
def test_a_wrong_entry_is_told_with_its_place_or_its_name(entry: Any, told: str) -> None:
    assert told in problem([entry, SWIN])


@pytest.mark.parametrize("value", [3, [], {"name": VIT}])
def test_what_is_no_list_of_backbones_is_told_with_what_is(value: Any) -> None:
    assert "backbones must be timm names joined by commas, or a list of names and mappings" in problem(value)


def test_the_search_of_one_backbone_cannot_be_resumed_for_several() -> None:
    assert "search.resume is for one backbone" in problem([VIT], search__resume=True)


@pytest.mark.parametrize(
    ("cpus", "gpus", "per_stage", "blocks", "stages"),
    [
        (2, 0, None, [4, 4], [2, 2]),
        (2, 0, None, [4, 1], [2, 1]),
        (16, 0, None, [4, 12], [4, 8]),
        (8, 8, None, [4, 4, 4], [3, 3, 2]),
        (8, 8, None, [4, 4], [4, 4]),
        (8, 2, None, [4, 4, 4], [1, 1, 1]),
        (8, 1, 0.25, [4, 4], [2, 2]),
        (8, 4, 0.0, [4, 4], [4, 4]),
    ],
)
def test_a_cluster_is_divided_so_that_families_live_side_by_side(
    cpus: float, gpus: float, per_stage: float | None, blocks: list[int], stages: list[int]
) -> None:
    parts = shares(blocks, ClusterResources(cpus, gpus), per_stage)
    assert [part.stages for part in parts] == stages


def test_of_more_families_than_cpus_the_first_ones_get_a_cpu_each() -> None:
    parts = shares([4] * 5, ClusterResources(2, 0))
    assert all(part.cluster.cpus == 1 for part in parts)
