"""What a search tries: candidates that fit the backbone, and sentences for what cannot be searched."""

from __future__ import annotations

from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.runs.resolve import resolve
from bim.orchestrator.search.candidates import DEFAULT_CANDIDATES
from bim.orchestrator.search.space import (
    Choice,
    Range,
    Space,
    baseline_values,
    changes_text,
    combinations,
    draw_settings,
    space_of,
)


def settings(space: dict[str, Any] | None = None, *argv: str) -> Settings:
    made = load_settings(list(argv))
    return made if space is None else with_changes(made, {"search.space": space})


def space(asked: dict[str, Any] | None = None, *argv: str) -> Space:
    made = settings(asked, *argv)
    return space_of(made, resolve(made)[1])


def problem(asked: dict[str, Any], *argv: str) -> str:
    with pytest.raises(SettingsError) as caught:
        space(asked, *argv)
    return str(caught.value)


def values(found: Choice | Range) -> tuple[Any, ...]:
    assert isinstance(found, Choice)
    return found.values


def test_default_candidates_begin_with_the_recipes_value_and_fit_the_backbone() -> None:
    found = space()
    assert list(found) == list(DEFAULT_CANDIDATES)
    assert values(found["mask.ratio"]) == (0.75, 0.5, 0.6, 0.85, [0.6, 0.75])
    assert values(found["decoder.throw_ratio"]) == (0.0, 0.25, 0.5)
    assert values(found["schedule.resolution"]) == (None, [[0, 24], [0.5, 32]])
    large = space(None, "--recipe", "vit_base_imagenet")
    assert values(large["schedule.resolution"]) == (
        None,
        [[0, 112], [0.5, 224]],
        [[0, 160], [0.5, 224]],
        [[0, 112], [0.25, 160], [0.5, 224]],
    )


def test_sizes_that_cells_of_hog_do_not_divide_are_not_tried() -> None:
    ladder = ["--recipe", "vit_base_imagenet", "--target.name", "hog", "--target.cell", "[4, 8, 16, 32]"]
    assert values(space(None, *ladder)["schedule.resolution"]) == (None, [[0, 160], [0.5, 224]])


def test_an_entry_of_what_is_no_mapping_is_unknown() -> None:
    assert problem({"mask.ratio.foo": [1]}).startswith("search.space: unknown setting 'mask.ratio.foo'")
    assert problem({"optim.betas.0": [0.9]}).startswith("search.space: unknown setting 'optim.betas.0'")


@pytest.mark.parametrize("key", DEFAULT_CANDIDATES)
def test_every_candidate_alone_is_a_setting_that_resolves(key: str) -> None:
    made = settings()
    for value in values(space()[key]):
        resolve(with_changes(made, {key: value}))


def test_where_all_tokens_are_encoded_nothing_is_thrown_and_ratios_are_equal() -> None:
    found = space(None, "--mask.encode", "all")
    assert values(found["decoder.throw_ratio"]) == (0.0,)
    assert not any(isinstance(ratio, list) for ratio in values(found["mask.ratio"]))


def test_a_recipe_lists_values_or_gives_a_range() -> None:
    found = space(
        {
            "optim.blr": {"low": 1e-3, "high": 1e-1, "log": True},
            "decoder.depth": {"low": 1, "high": 3},
            "target.name": ["hog", "pixels"],
            "boundary_noise": [0.25],
        }
    )
    assert found["optim.blr"] == Range(1e-3, 1e-1, log=True, is_integer=False)
    assert found["decoder.depth"] == Range(1, 3, log=False, is_integer=True)
    assert values(found["target.name"]) == ("pixels", "hog")
    assert values(found["boundary_noise"]) == (0.0, 0.25)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"mask.ratoi": None}, "unknown setting 'mask.ratoi'; did you mean 'mask.ratio'"),
        ({"seed": [1, 2]}, "seed cannot be searched: a lucky seed is not a better setting"),
        ({"out": ["a"]}, "out cannot be searched"),
        ({"resume": [True]}, "resume cannot be searched"),
        ({"optim.precision": ["fp32", "bf16"]}, "optim.precision cannot be searched: it depends on the device"),
        ({"tracking.uri": ["a"]}, "tracking.uri cannot be searched"),
        ({"search.trials": [1]}, "search.trials cannot be searched: a search does not search itself"),
        ({"data.source": ["a"]}, "data.source cannot be searched: scores on other images cannot be compared"),
        ({"schedule.epochs": [10]}, "schedule.epochs cannot be searched: every trial has the same budget"),
        ({"backbone.model_args.depth": [4]}, "backbone.model_args.depth cannot be searched"),
        ({"optim.blr": None}, "optim.blr has no default candidates, only mask.ratio, "),
        ({"optim.blr": []}, "optim.blr must list at least one value"),
        ({"optim.blr": ["fast"]}, "search.space: optim.blr must be a number above 0, not 'fast'"),
        ({"mask.ratio": [[0.7, 0.6, 0.6, 0.6]]}, "mask.ratio must not decrease from block to block"),
        ({"optim.blr": {"low": 1}}, "optim.blr must be a list of values or {low: a, high: b, log: false}"),
        ({"optim.blr": {"low": 0, "high": 1, "log": True}}, "with a below b and above 0"),
        ({"optim.blr": {"low": 1e-5, "high": 1e-4}}, "the recipe's value, which trial 0 takes, is 0.008; widen the range"),
        ({"optim.clip_grad": {"low": 1, "high": 2}}, "which trial 0 takes, is null"),
        ({}, "search.space must name at least one setting"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_told_before_anything_starts(asked: dict[str, Any], told: str) -> None:
    assert told in problem(asked)


def test_settings_are_drawn_without_repetition_the_baseline_first() -> None:
    made = settings()
    found = space()
    baseline = baseline_values(made, found)
    drawn = draw_settings(found, baseline, 30, seed=1)
    assert (
        drawn[0] == baseline == {"mask.ratio": 0.75, "decoder.throw_ratio": 0.0, "schedule.resolution": None}
    )
    assert len({str(point) for point in drawn}) == 30 == combinations(found)
    assert draw_settings(found, baseline, 31, seed=1) == drawn  # there are no more
    assert draw_settings(found, baseline, 5, seed=1) == drawn[:5]
    assert draw_settings(found, baseline, 5, seed=2) != drawn[:5]


def test_a_few_trials_see_every_value_of_a_setting() -> None:
    found = space({"mask.ratio": [0.5, 0.6], "boundary_noise": [0.1, 0.2, 0.3]})
    baseline = baseline_values(settings(), {"mask.ratio": 0, "boundary_noise": 0})
    drawn = draw_settings(found, baseline, 5, seed=0)
    assert {point["boundary_noise"] for point in drawn} == {0.0, 0.1, 0.2, 0.3}
    assert {point["mask.ratio"] for point in drawn} == {0.5, 0.6, 0.75}


def test_ranges_are_drawn_inside_their_bounds_and_as_they_are_read() -> None:
    ranges: Space = {
        "a": Range(1e-3, 1e-1, log=True, is_integer=False),
        "b": Range(1, 3, log=False, is_integer=True),
    }
    drawn = draw_settings(ranges, {"a": 0.01, "b": 1}, 50, seed=0)
    assert all(1e-3 <= point["a"] <= 1e-1 and point["a"] == float(f"{point['a']:.4g}") for point in drawn)
    assert {point["b"] for point in drawn} == {1, 2, 3}
    assert all(isinstance(point["b"], int) for point in drawn)
    assert sum(point["a"] < 1e-2 for point in drawn) in range(15, 36)  # evenly by the logarithm
    narrow: Space = {"a": Range(1.0, 1.0001, log=False, is_integer=False)}
    assert len(draw_settings(narrow, {"a": 1.0}, 50, seed=0)) < 50  # and comes to an end


def test_only_what_differs_from_the_recipe_is_named() -> None:
    baseline = {"mask.ratio": 0.75, "optim.blr": 8e-3}
    assert changes_text({"mask.ratio": 0.6, "optim.blr": 8e-3}, baseline) == "mask.ratio 0.6"
    assert changes_text({"optim.blr": 0.0012345678}, baseline) == "optim.blr 0.001235"
    assert changes_text(baseline, baseline) == "baseline config"
