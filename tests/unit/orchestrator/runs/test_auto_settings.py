"""Settings chosen from facts about images and machine; nothing is opened and nothing measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from bim.orchestrator.config.auto_rules import CHOSEN_SETTINGS, auto_rules
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.data.facts import ImageFacts
from bim.orchestrator.jobs.automatic import nested
from bim.orchestrator.runs.auto_settings import Chosen, StageResources, choose_settings
from bim.orchestrator.runs.resolve import resolve

WORDS = {
    "img_size": ["image size "],
    "patch_size": ["in patches of "],
    "embed_dim": [", width "],
    "depth": [" layers: "],
    "num_heads": [", width "],  # 64 or 32 of it each
    "batch_size": ["batch "],
    "accumulate": ["batch "],
    "test_fraction": ["test split "],
    "val_fraction": ["val split "],
    "epochs": [" epochs: "],
    "warmup_epochs": [" epochs of warm-up"],
    "checkpoint.every_epochs": ["a checkpoint every "],
    "evaluation.every_epochs": ["depths are scored every "],
    "workers": [" data workers"],
    "name": ["backbone vit_"],
}

CPU, GPU = StageResources(cpus=2), StageResources(cpus=16, gpus=1)


def facts(images: int, side: int = 300, **splits: int) -> ImageFacts:
    return ImageFacts("/data/my photos", {"train": images, **splits}, side, is_labeled=True)


def choose(
    images: ImageFacts,
    machine: StageResources = CPU,
    given: Mapping[str, Any] | None = None,
    budget_s: float = 1e9,
    epoch_s: float = 1.0,
) -> Chosen:
    """epoch_s: of the largest candidate's width and image size; the cost of others is scaled."""

    def seconds(values: Mapping[str, Any]) -> float:
        settings_from_mapping(nested({"data.source": "photos", **values}))  # as the probe needs them
        width, size = values["backbone.model_args.embed_dim"], values["backbone.model_args.img_size"]
        return epoch_s * width * size**2 / (192 * 64**2)

    return choose_settings(images, machine, given or {}, budget_s, seconds)


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("side", [20, 60, 100, 500])
@pytest.mark.parametrize("images", [200, 3_000, 300_000])
def test_every_choice_is_a_run_that_can_be_trained(machine: StageResources, side: int, images: int) -> None:
    chosen = choose(facts(images, side), machine)
    settings = settings_from_mapping(nested({"data.source": "photos", **chosen.values}))
    resolve(settings)
    train = images * (1 - settings.data.test_fraction - settings.data.val_fraction)
    assert train // (settings.data.batch_size * settings.data.accumulate) >= 20
    assert settings.search.trials == 0
    assert settings.name == "my-photos"


def test_rows_of_every_table_are_in_order_and_reach_as_far_as_the_sizes() -> None:
    rules = auto_rules()
    for rows in (rules.patch_size, rules.crop_scale):
        limits = [row.max_size for row in rows]
        assert limits == sorted(limits)
        assert limits[-1] >= max(rules.image_size.sizes)
    for device in ("cpu", "gpu"):
        backbones = [row for row in rules.backbones if row.device == device]
        assert [row.min_images for row in backbones] == sorted(row.min_images for row in backbones)
        assert backbones[0].min_images == 0
        assert [row.width for row in backbones] == sorted(row.width for row in backbones)
    assert rules.learning_rate[-1].max_images_per_step >= max(rules.steps.images_per_step.values())
    sizes = {
        size: next(row.patch for row in rules.patch_size if size <= row.max_size)
        for size in rules.image_size.sizes
    }
    assert all(size % patch == 0 and 36 <= (size // patch) ** 2 <= 196 for size, patch in sizes.items())


def test_each_choice_is_a_line_with_its_reason() -> None:
    lines = choose(facts(20_000)).lines
    assert "test split 0.2: 4000 of 20000 images, as the data has none" in lines
    assert (
        "image size 64 px in patches of 8: half of the images have 300 px or more on their short side, and 64 is the most "
        "on a CPU"
    ) in lines
    assert (
        "backbone vit_tiny_patch16_224, width 192, 8 layers: the largest for 14000 training images on a CPU"
        in lines
    )
    assert any(line.startswith("145 epochs: about ") for line in lines)


def test_few_images_get_large_enough_splits_and_the_advice_to_start_from_weights() -> None:
    chosen = choose(facts(300))
    assert chosen.values["data.test_fraction"] == pytest.approx(1 / 3, abs=1e-3)
    assert any("--backbone.name NAME --init_from NAME" in line for line in chosen.lines)
    given = choose(facts(300), given={"init_from": "vit_tiny_patch16_224"})
    assert not any("--init_from" in line for line in given.lines)


def test_what_every_run_has_is_said_too_as_far_as_it_is_not_given() -> None:
    lines = choose(facts(20_000)).lines
    assert "blocks 4: each is trained by its own loss, so that one run gives as many depths" in lines
    assert (
        "mask.ratio [0.6, 0.75], decoder.depth 1, target.name pixels: ahead of or level with the others in "
        "docs/ablation.md"
    ) in lines
    assert "data.flip true, optim.weight_decay 0.05: as for MAE" in lines
    given = choose(facts(20_000), given={"blocks": 2, "mask.ratio": 0.75, "data.flip": False}).lines
    assert (
        "decoder.depth 1, target.name pixels: ahead of or level with the others in docs/ablation.md" in given
    )
    assert "optim.weight_decay 0.05: as for MAE" in given
    assert not any("blocks" in line for line in given)


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("splits", [{}, {"test": 500, "val": 200}], ids=["drawn", "own splits"])
def test_help_marks_as_chosen_what_is_chosen(machine: StageResources, splits: dict[str, int]) -> None:
    values = choose(facts(20_000, **splits), machine).values.keys() - auto_rules().always_values.keys()
    keys = {"backbone.model_args" if key.startswith("backbone.model_args.") else key for key in values}
    assert keys <= set(CHOSEN_SETTINGS)
    if not splits:
        assert keys == set(CHOSEN_SETTINGS)


def test_every_choice_is_named_in_a_line_or_said_where_the_run_is_opened() -> None:
    chosen = choose(facts(20_000))
    text = "\n".join(chosen.lines)
    unnamed = {
        key
        for key in chosen.values
        if not any(word in text for word in (key, *WORDS.get(key, WORDS.get(key.rsplit(".", 1)[-1], ()))))
    }
    assert unnamed == {"search.trials"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"backbone.model_args.img_size": 256}, {"patch_size": 16}),
        ({"backbone.model_args.img_size": [128, 96]}, {"patch_size": 16}),
        ({"backbone.model_args.img_size": 100}, {"patch_size": 10}),
        ({"backbone.model_args.img_size": 97}, {"patch_size": 16}),
        ({"backbone.model_args.embed_dim": 128}, {"num_heads": 4, "depth": 8}),
        ({"backbone.model_args.embed_dim": 100}, {"num_heads": 2}),
        ({"blocks": [2, 4, 6]}, {"depth": 12, "num_heads": 3}),
        ({"data.batch_size": 20_000}, {"depth": 8}),
    ],
    ids=str,
)
def test_what_is_given_decides_what_depends_on_it(given: dict[str, Any], expected: dict[str, int]) -> None:
    def free(values: Mapping[str, Any]) -> float:
        return 1.0

    chosen = choose_settings(facts(3_000), CPU, given, 1e9, free).values
    assert {key: chosen[f"backbone.model_args.{key}"] for key in expected} == expected


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/data/my photos", "my-photos"),
        ("/data/train.parquet", "train"),
        ("torchvision:CIFAR10:/data/tv", "CIFAR10"),
        ("torchvision:CIFAR10", "CIFAR10"),
        ("stripes:500", "stripes-500"),
        ("./a:b", "a-b"),
        ("/", "images"),
    ],
)
def test_a_run_is_named_after_its_images(source: str, name: str) -> None:
    chosen = choose(replace(facts(3_000), source=source))
    assert chosen.values["name"] == name
    assert chosen.lines[0] == f"name {name}: of the images"


def test_a_test_split_without_labels_is_drawn_from_the_labeled_images() -> None:
    plain = choose(facts(20_000, val=300))
    chosen = choose(replace(facts(20_000, val=300), unlabeled_splits={"test": 700}))
    assert chosen.values == plain.values
    assert chosen.values["data.test_fraction"] == 0.2
    assert "test split 0.2: 4000 of 20000 images, as the 700 of the data's own have no labels" in chosen.lines


def test_splits_of_the_data_are_taken() -> None:
    chosen = choose(facts(3_000, test=500, val=200))
    assert not {"data.test_fraction", "data.val_fraction"} & chosen.values.keys()


def test_first_the_epochs_fall_then_size_and_backbone_in_turns() -> None:
    images = facts(20_000)
    assert choose(images).values["schedule.epochs"] == 145
    fewer = choose(images, budget_s=50)
    assert (fewer.values["schedule.epochs"], fewer.values["backbone.model_args.img_size"]) == (50, 64)
    assert "50 epochs: what 50 s allow; 145 would take 2 min 25 s" in fewer.lines
    smaller = choose(images, budget_s=15).values
    assert (smaller["backbone.model_args.img_size"], smaller["backbone.model_args.embed_dim"]) == (48, 192)
    smallest = choose(images, budget_s=7).values
    assert (smallest["backbone.model_args.img_size"], smallest["backbone.model_args.embed_dim"]) == (48, 96)
    assert smallest["schedule.epochs"] >= 20
    hopeless = choose(images, budget_s=0.01)
    assert hopeless.values["schedule.epochs"] == 1
    assert any("do not suffice for more" in line for line in hopeless.lines)


def test_what_the_user_gave_is_left_alone() -> None:
    given = {
        "backbone.model_args.img_size": 96,
        "data.batch_size": 10,
        "schedule.epochs": 7,
        "mask.ratio": 0.75,
        "name": "mine",
    }
    chosen = choose(facts(20_000), given=given)
    assert not given.keys() & (chosen.values.keys() - {"data.batch_size"})
    assert chosen.values["schedule.warmup_epochs"] == 0.7
    other = choose_settings(
        facts(20_000), CPU, {"backbone.name": "swin_tiny_patch4_window7_224"}, 1e9, lambda values: 1.0
    )
    assert not any(key.startswith("backbone.name") for key in other.values)
    assert other.values["backbone.model_args"] == {}


@pytest.mark.parametrize(
    "given",
    [
        {"schedule.warmup_epochs": 5.0},
        {"schedule.resolution": [[0, 32], [0.5, 64]]},
        {"search.trials": 4, "search.grace_epochs": 4},
    ],
    ids=["warm-up", "resolution", "search"],
)
def test_candidates_are_costed_with_settings_that_fit_together(given: dict[str, Any]) -> None:
    chosen = choose(facts(20_000), given=given)
    settings = settings_from_mapping(nested({"data.source": "photos", **chosen.values, **given}))
    assert settings.schedule.epochs == 145


def test_the_data_workers_of_the_run_are_part_of_its_cost() -> None:
    workers = []

    def seconds(values: Mapping[str, Any]) -> float:
        workers.append(values["data.workers"])
        return 1.0

    chosen = choose_settings(facts(20_000), GPU, {}, 1e9, seconds)
    assert workers == [chosen.values["data.workers"]]


def test_given_parts_of_a_batch_divide_it() -> None:
    whole, parts = choose(facts(20_000)), choose(facts(20_000), given={"data.accumulate": 4})
    assert parts.values["data.batch_size"] * 4 == whole.values["data.batch_size"]
    assert parts.values["optim.blr"] == whole.values["optim.blr"]
    assert any(line.startswith("batch 16 x 4: ") for line in parts.lines)


def test_given_epochs_that_the_time_does_not_hold_shrink_the_rest_and_are_told() -> None:
    given = {"schedule.epochs": 100}
    first = choose(facts(20_000), given=given)
    shrunk = choose(facts(20_000), given=given, budget_s=50)
    size = "backbone.model_args.img_size"
    assert shrunk.values[size] < first.values[size]
    assert not any("100 epochs would take" in line for line in shrunk.lines)
    hopeless = choose(facts(20_000), given=given, budget_s=1)
    assert any(line.startswith("100 epochs would take ") for line in hopeless.lines)


def test_a_budget_of_less_than_an_epoch_is_told_as_that() -> None:
    lines = choose(facts(20_000), budget_s=0.01).lines
    assert any(line.startswith("1 epoch: it takes ") and "is for less" in line for line in lines)


@pytest.mark.parametrize(
    ("epochs", "epoch_s", "every", "line"),
    [
        (200, 10.0, 20, "depths are scored every 20 epochs, about 3 min 20 s of training"),
        (200, 2.0, 20, "depths are scored every 20 epochs, about 40 s of training"),
        (200, 1.0, 30, "depths are scored every 30 epochs, about 30 s of training"),
        (200, 0.25, 120, "depths are scored every 120 epochs, about 30 s of training"),
        (5, 40.0, 1, "depths are scored every epoch, about 40 s of training"),
        (
            100,
            0.25,
            0,
            "depths are scored at the end of the training alone: scores would be less than 30 s apart",
        ),
        (1, 99.0, 0, "depths are scored at the end of the training alone: it has one epoch"),
    ],
)
def test_scores_while_it_trains_leave_time_for_training(
    epochs: int, epoch_s: float, every: int, line: str
) -> None:
    chosen = choose_settings(facts(20_000), CPU, {"schedule.epochs": epochs}, 1e9, lambda values: epoch_s)
    assert chosen.values["evaluation.every_epochs"] == every
    assert line in chosen.lines


@pytest.mark.parametrize("given", [{"evaluation.every_epochs": 3}, {"evaluation.patience": 2}])
def test_scores_that_are_given_or_counted_are_left_alone(given: dict[str, Any]) -> None:
    chosen = choose(facts(20_000), given=given)
    assert "evaluation.every_epochs" not in chosen.values
    assert not any("depths are scored" in line for line in chosen.lines)
