from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.recipes import bundled_recipes, read_recipe
from bim.orchestrator.config.schema import Settings, SettingsError, all_settings
from bim.orchestrator.config.transforms import (
    MAY_DIFFER_ON_RESUME,
    differing_keys,
    end_to_end,
    flat,
    settings_to_mapping,
    settings_to_yaml,
    with_changes,
)
from bim.orchestrator.config.validate import settings_from_mapping

SMALLEST: dict[str, Any] = {
    "name": "smallest",
    "backbone": {"name": "vit_tiny_patch16_224"},
    "data": {"source": "digits", "batch_size": 64},
    "schedule": {"epochs": 10},
}


def settings(**changes: Any) -> Settings:
    """The smallest complete settings, with dotted keys changed (`mask__ratio=0.5`)."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return with_changes(settings_from_mapping(SMALLEST), dotted)


def problem(**changes: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        settings(**changes)
    return str(caught.value)


def test_a_file_with_only_what_is_required_gets_the_defaults_of_mae_and_growing_mask_ratios() -> None:
    made = settings()
    assert made.optim.blr == 1.5e-4
    assert made.optim.betas == (0.9, 0.95)
    assert made.mask.ratio == (0.6, 0.75)
    assert made.data.crop_scale == (0.2, 1.0)
    assert made.num_blocks == 4


def test_two_mask_ratios_are_those_of_the_first_and_the_last_block() -> None:
    assert settings(mask__ratio=[0.6, 0.75]).per_block("mask.ratio") == (0.6, 0.65, 0.7, 0.75)
    assert settings(blocks=2, mask__ratio=[0.6, 0.75]).per_block("mask.ratio") == (0.6, 0.75)
    assert settings(blocks=1, mask__ratio=[0.6, 0.75]).per_block("mask.ratio") == (0.75,)


def test_what_is_missing_is_asked_for_by_its_dotted_name_and_meaning() -> None:
    with pytest.raises(SettingsError) as caught:
        settings_from_mapping({"name": "x", "data": {"source": "digits"}}, file="mine.yaml")
    assert str(caught.value).splitlines() == [
        "mine.yaml: missing setting 'backbone.name' (text): timm name; a new name drops the recipe's model_args",
        "mine.yaml: missing setting 'data.batch_size' (a whole number of at least 1 or auto): "
        "images per micro-batch, of the whole run, not per GPU; auto: the largest that fits",
        "mine.yaml: missing setting 'schedule.epochs' (a whole number of at least 1): "
        "passes over the training split",
    ]


def test_a_group_whose_lines_are_all_commented_out_counts_as_not_given() -> None:
    assert settings_from_mapping(SMALLEST | {"mask": None}) == settings()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mask__ratio": 1.5},
            "mask.ratio must be a number above 0 and below 1 or a list of them (e.g. 0.75 or [0.6, 0.75]), "
            "not 1.5",
        ),
        (
            {"blocks": "yes"},
            "blocks must be a whole number of at least 1 or a list of them (e.g. 4 or [3, 3, 3, 3]), not 'yes'",
        ),
        ({"schedule__epochs": "4"}, "schedule.epochs must be a whole number of at least 1, not '4'"),
        ({"schedule__epochs": True}, "schedule.epochs must be a whole number of at least 1, not true"),
        ({"schedule__epochs": 4.0}, "schedule.epochs must be a whole number of at least 1, not 4.0"),
        ({"data__flip": "no"}, "data.flip must be true or false, not 'no'"),
        ({"data__flip": 1}, "data.flip must be true or false, not 1"),
        ({"optim__blr": float("nan")}, "optim.blr must be a number above 0, not NaN"),
        ({"optim__precision": "half"}, "optim.precision must be auto, fp32, bf16 or fp16, not 'half'"),
        (
            {"data__crop_scale": [0.2]},
            "data.crop_scale must be two numbers [a, b], each above 0 and at most 1 (e.g. [0.2, 1.0]), not [0.2]",
        ),
        ({"optim__clip_grad": 0}, "optim.clip_grad must be a number above 0 or null, not 0"),
        ({"out": ""}, "out must be a path or null, not ''"),
        ({"data__source": None}, "data.source must be text, not null"),
        (
            {"name": 7},
            "name must be a word of letters, digits, '.', '_' and '-', not 7 "
            "(text that looks like this goes in quotes, '7')",
        ),
        (
            {"placement__gpus_per_stage": 2},
            "placement.gpus_per_stage must be a number of at least 0 and at most 1 or null, not 2",
        ),
        (
            {"backbone__model_args": {"depth": {"a": 1}}},
            "backbone.model_args.depth must be a number, text, true, false, null or a list of them, not {a: 1}",
        ),
        (
            {"mask": 0.6},
            "'mask' is a section of settings, not one: mask.ratio, mask.encode, mask.per_batch, mask.sweep_groups, "
            "mask.loss_on_newly_masked",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(
    changes: dict[str, Any], message: str
) -> None:
    assert problem(**changes) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mask__ratio": [0.6, 0.7, 0.8]},
            "mask.ratio lists 3 values for 4 blocks: give one for each block, or one for all, or those of the first and the "
            "last block",
        ),
        (
            {"blocks": [3, 3], "decoder__dim": [64, 64, 64]},
            "decoder.dim lists 3 values for 2 blocks: give one for each block, or one for all",
        ),
        (
            {"blocks": 2, "mask__ratio": [0.8, 0.7]},
            "mask.ratio must not decrease from block to block, not [0.8, 0.7]: "
            "a later block sees only what the one before it kept",
        ),
        (
            {"data__val_fraction": 0.5, "data__test_fraction": 0.5},
            "data.val_fraction + data.test_fraction must be below 1, not 0.5 + 0.5: no image would be left to train on",
        ),
        ({"data__crop_scale": [1, 0.5]}, "data.crop_scale must be [smallest, largest], not [1, 0.5]"),
        (
            {"schedule__warmup_epochs": 10},
            "schedule.warmup_epochs must be below schedule.epochs (10), not 10",
        ),
        ({"resume": True}, "resume needs out: the folder of the run to continue (--out DIR --resume)"),
        (
            {"placement__stages": 5},
            "placement.stages must be at most 4, the number of blocks, not 5",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes: dict[str, Any], message: str) -> None:
    assert problem(**changes) == message


def test_every_problem_has_its_own_line() -> None:
    lines = problem(mask__rato=1, blocks=0, data__flip="no", seed=-1).splitlines()
    assert [line.split(" must")[0] for line in lines] == [
        "seed",
        "blocks",
        "unknown setting 'mask.rato'; did you mean 'mask.ratio'?",
        "data.flip",
    ]


def test_an_element_of_a_list_that_is_wrong_is_reported_once_with_the_whole_list() -> None:
    text = problem(mask__ratio=[0.5, 2, "x", 0.9])
    assert text.endswith("not [0.5, 2, 'x', 0.9]")
    assert len(text.splitlines()) == 1


def test_a_group_whose_name_is_wrong_is_answered_with_the_nearest_group() -> None:
    assert problem(masks={"ratio": 0.6}) == "unknown setting 'masks'; did you mean 'mask'?"


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings().mask.ratio = 0.5


def test_one_value_holds_for_every_block() -> None:
    made = settings(mask__ratio=[0.6, 0.7, 0.7, 0.8])
    assert made.per_block("mask.ratio") == (0.6, 0.7, 0.7, 0.8)
    assert made.per_block("decoder.dim") == (256,) * 4
    assert made.per_block("decoder.num_heads") == (None,) * 4


def test_end_to_end_is_one_block_with_the_deepest_block_s_values() -> None:
    made = end_to_end(
        settings(
            mask__ratio=[0.6, 0.7, 0.7, 0.8],
            decoder__dim=[32, 64, 64, 128],
            decoder__name="mine",
            target__name="mine",
            placement__stages=4,
        )
    )
    assert (made.blocks, made.mask.ratio, made.decoder.dim) == (1, 0.8, 128)
    assert (made.decoder.name, made.target.name) == ("auto", "pixels")


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    made = settings(out="~/runs", data__source="~/photos")
    assert made.out == Path("/home/ada/runs")
    assert made.data.source == "/home/ada/photos"


@pytest.mark.parametrize("recipe", sorted(bundled_recipes()))
def test_the_saved_settings_of_a_recipe_load_again_as_equal_settings(recipe: str, tmp_path: Path) -> None:
    made = settings_from_mapping(read_recipe(recipe))
    saved = tmp_path / "settings.yaml"
    saved.write_text(settings_to_yaml(made))
    assert settings_from_mapping(read_recipe(str(saved))) == made


def test_values_that_look_like_other_types_survive_being_saved(tmp_path: Path) -> None:
    made = settings(
        name="1e-4",
        out=str(tmp_path / "null: #1"),
        blocks=[3, 3, 3, 3],
        mask__ratio=[0.6, 0.7, 0.75, 0.8],
        data__source="2024",
        data__label_column="yes",
        optim__blr=1e-5,
        tracking__uri="null",
        tracking__experiment="Wörter, 0x10",
        backbone__model_args={"img_size": [64, 96], "class_token": False, "global_pool": "on", "init": None},
    )
    saved = tmp_path / "settings.yaml"
    saved.write_text(settings_to_yaml(made), encoding="utf-8")
    assert settings_from_mapping(read_recipe(str(saved))) == made


def test_flat_gives_mlflow_one_scalar_for_every_setting() -> None:
    values = flat(settings(blocks=[3, 3, 3, 3], out="runs/a", backbone__model_args={"depth": 8}))
    assert values["blocks"] == "[3, 3, 3, 3]"
    assert values["out"] == "runs/a"
    assert values["backbone.model_args.depth"] == 8
    assert values["data.crop_scale"] == "[0.2, 1.0]"
    assert all(isinstance(value, str | int | float | bool | None) for value in values.values())
    assert set(all_settings()) - set(values) == {"backbone.model_args", "search.space"}


def test_flat_does_not_cut_a_long_list() -> None:
    ratios = [0.5 + 0.01 * k for k in range(24)]
    assert flat(settings(blocks=24, mask__ratio=ratios))["mask.ratio"] == str(ratios)


def test_a_resumed_run_may_differ_in_what_does_not_change_the_weights() -> None:
    before = settings()
    after = settings(
        name="again",
        out="runs/a",
        resume=True,
        baseline="mae",
        data__workers=7,
        placement__backend="in_process",
        tracking__uri="x",
        checkpoint__keep=5,
        evaluation__knn_k=5,
        failures__max_restarts=0,
    )
    assert differing_keys(before, after) == []


def test_a_resumed_run_must_agree_in_what_changes_the_weights() -> None:
    changed = {
        "seed": 1,
        "blocks": 2,
        "init_from": "x",
        "mask.ratio": [0.5, 0.6],
        "backbone.model_args": {"depth": 8},
        "decoder.num_heads": 8,
        "data.accumulate": 2,
        "schedule.epochs": 20,
        "optim.precision": "fp32",
    }
    differing = differing_keys(settings(), with_changes(settings(), changed))
    assert differing == sorted([*(set(changed) - {"backbone.model_args"}), "backbone.model_args.depth"])


def test_every_key_that_may_differ_on_resume_exists() -> None:
    keys = list(all_settings())
    for free in MAY_DIFFER_ON_RESUME:
        assert free in keys or (free.endswith(".") and any(key.startswith(free) for key in keys))


def test_every_setting_says_what_it_is() -> None:
    assert [key for key, info in all_settings().items() if not info.description or not info.allowed] == []


def test_changes_are_validated_and_leave_the_original_alone() -> None:
    before = settings()
    assert with_changes(before, {"seed": 3}).seed == 3
    assert before.seed == 0
    with pytest.raises(SettingsError, match="seed must be"):
        with_changes(before, {"seed": "three"})


def test_reading_settings_loads_no_heavy_library() -> None:
    code = (
        "import sys; import bim.orchestrator.config.cli; "
        "print(sorted({'torch', 'timm', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_plain_values_give_the_settings_back() -> None:
    made = settings(blocks=[1, 2], mask__ratio=[0.5, 0.6], out="x")
    assert settings_from_mapping(settings_to_mapping(made)) == made


def test_a_key_without_effect_in_both_settings_does_not_make_them_differ() -> None:
    recovered, dropped = settings(decoder__recovery="aggregate"), settings(decoder__recovery="none")
    assert differing_keys(recovered, dropped) == []
    thrown = with_changes(recovered, {"decoder.throw_ratio": 0.5})
    assert differing_keys(thrown, with_changes(thrown, {"decoder.recovery": "none"})) == ["decoder.recovery"]
