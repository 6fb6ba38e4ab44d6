"""The text of `--help` and `--help-all`: settings by topic, with the values of the chosen recipe."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from bim.orchestrator.config.auto_rules import CHOSEN_SETTINGS, LEAST_SETTINGS, auto_rules
from bim.orchestrator.config.messages import SettingInfo, format_value
from bim.orchestrator.config.recipes import DEFAULT_RECIPE, bundled_recipes, read_recipe
from bim.orchestrator.config.schema import all_settings, setting_sections
from bim.orchestrator.config.transforms import overlaid, settings_to_mapping
from bim.orchestrator.config.validate import settings_from_mapping

WIDTH = 100
"""Columns, where the terminal has as many or there is none."""

COMMON = {
    "Images and output": ("data.source", "out", "resume", "seed"),
    "Backbones": ("backbone.name", "backbone.model_args", "blocks", "backbones", "init_from"),
    "Training": (
        "schedule.epochs",
        "schedule.warmup_epochs",
        "optim.blr",
        "data.batch_size",
        "data.accumulate",
        "data.workers",
    ),
    "Masked image modeling": (
        "mask.ratio",
        "decoder.depth",
        "decoder.dim",
        "decoder.throw_ratio",
        "target.name",
        "schedule.resolution",
    ),
    "Comparison, search, hardware, record": (
        "baseline",
        "search.trials",
        "placement.gpus_per_stage",
        "tracking.uri",
    ),
}
"""The settings that people set, in the order in which they are needed: topic -> dotted keys."""

EXAMPLES = (
    (
        "",
        "a smoke test on the scanned digits of scikit-learn: the whole job in minutes on a laptop",
    ),
    (
        "--data.source DIR --dry-run",
        "your images: print the settings chosen for them and what they cost, and train nothing; DIR holds image files, at "
        "any depth, or shards",
    ),
    (
        "--data.source DIR --out runs/a \\\n--time_budget 6h",
        "train on your images with settings chosen from them, about six hours of training at most, without scores and "
        "measuring",
    ),
    (
        "--recipe vit_base_imagenet \\\n--data.source DIR --out runs/b",
        "a ViT-B in four blocks, as for ImageNet",
    ),
    ("--out runs/a --resume", "continue an interrupted run with the settings it was started with"),
    (
        "--blocks '[2,2,2,2]' \\\n--mask.ratio '[0.6,0.65,0.7,0.75]'",
        "one value per block; values are YAML, quote brackets in a shell",
    ),
    (
        "--recipe vit_base_imagenet \\\n--data.source DIR "
        "\\\n--backbones vit_small_patch16_224,swin_tiny_patch4_window7_224",
        "two backbones in one run, compared in one table; --recipe digits_backbones takes minutes",
    ),
    (
        "--baseline mae --seed 1",
        "also one ordinary MAE run with the same decoder and epochs, truncated at every depth",
    ),
)
"""Arguments of the command, broken where a line of 80 columns needs it, and what they are for."""

NO_BREAK = "\xa0"  # a space at which no line ends
USAGE = f"usage: python pipelines/bim_pipeline.py [--recipe{NO_BREAK}NAME|FILE] [--SETTING{NO_BREAK}VALUE{NO_BREAK}...]"
ABOUT = (
    "Pretrain a family of timm backbones of different depth in one run: block-wise masked image modeling, each block with "
    "its own loss. Evaluates, exports and records every depth."
)
OWN_IMAGES = (
    "Your images: with --data.source and without --recipe, settings are chosen from the images and the machine, and "
    "printed with their reasons; any option goes before what is chosen. --dry-run shows what is chosen and what the run "
    "would cost, and trains nothing. --time_budget bounds the training ({gpu} with a GPU and {cpu} without one, if it is "
    "not given), without scores and measuring: what does not fit shrinks."
)
OWN_RECIPE = (
    "A recipe of your own is a YAML file with the same settings, nested (mask: {ratio: 0.6}). Start from a copy of "
    "pipelines/recipes/digits_demo.yaml and run it with --recipe my.yaml."
)


def help_text(
    recipe: str = DEFAULT_RECIPE,
    every_setting: bool = False,
    own_images: str | None = None,
    width: int = WIDTH,
) -> str:
    """Settings with type, description and their value in `recipe`.

    Args:
        every_setting: all of them by section; otherwise those of `COMMON`.
        own_images: `data.source` of images that settings are chosen for, in place of those of `recipe`.
        width: columns, at least 60.

    Raises:
        RecipeError, SettingsError: the recipe cannot be read, or is wrong.
    """
    values, heading = _values_and_heading(recipe, own_images)
    infos = all_settings()
    if every_setting:
        titles = {"": "Run"} | {
            section: f"{section}: {title}" for section, title in setting_sections().items()
        }
        topics = {
            title: [key for key, info in infos.items() if info.section == section]
            for section, title in titles.items()
        }
    else:
        topics = {title: list(keys) for title, keys in COMMON.items()}
    shown = [infos[key] for keys in topics.values() for key in keys]
    column = max(len(_option(info)) for info in shown if "|" not in info.kind) + 4
    budget = auto_rules().time_budget

    def entry(left: str, right: str) -> list[str]:
        return _entry(left, right, column, width)

    lines = [
        *textwrap.wrap(USAGE, width, subsequent_indent=" " * 7, break_on_hyphens=False),
        "",
        *_paragraph(ABOUT, width),
        "",
        *_paragraph(OWN_IMAGES.format(gpu=budget["gpu"], cpu=budget["cpu"]), width),
        "",
        *entry("--recipe NAME|FILE", "a recipe below, or a YAML file of settings"),
        *entry(
            "--time_budget 10m|6h|2d",
            "bound of the training, where settings are chosen from your images "
            f"[{budget['gpu']} with a GPU, {budget['cpu']} without]",
        ),
        *entry("--dry-run", "print what the run would do and cost, and exit"),
        *entry("--print-config", "print the resolved settings as YAML and exit"),
        *entry("--verbose, --quiet", "more messages; only warnings and results"),
        *entry("--help, -h", "the settings that people set"),
        *entry("--help-all", "every setting"),
        *entry("--version", "the version of the package"),
        "",
        "Recipes",
    ]
    for name, title in bundled_recipes().items():
        lines += entry(name + (" (default)" if name == DEFAULT_RECIPE else ""), title)
    lines += ["", *_paragraph(heading, width)]
    for title, keys in topics.items():
        lines += ["", title]
        for key in keys:
            lines += entry(_option(infos[key]), f"{infos[key].description} {_bracketed(values, key)}")
    text = "\n".join([*lines, "", *_examples(width), "", *_paragraph(OWN_RECIPE, width)])
    return text.replace(NO_BREAK, " ")


def _values_and_heading(recipe: str, own_images: str | None) -> tuple[Mapping[str, Any], str]:
    """Nested values to show, "chosen" in place of those that depend on the images."""
    if own_images is None:
        values = settings_to_mapping(settings_from_mapping(read_recipe(recipe)))
        return values, f"Settings, each with its value in {recipe} in brackets"
    placeholders = dict(LEAST_SETTINGS)
    for key, value in {**auto_rules().always_values, "data.source": own_images}.items():
        placeholders = overlaid(placeholders, key.split("."), value)
    values = settings_to_mapping(settings_from_mapping(placeholders))
    for key in CHOSEN_SETTINGS:
        values = overlaid(values, key.split("."), "chosen")
    heading = (
        "Settings, each with its value for your images in brackets; [chosen] depends on the images and the machine, and "
        "--dry-run prints it"
    )
    return values, heading


def _examples(width: int) -> list[str]:
    lines = ["Examples"]
    for arguments, purpose in EXAMPLES:
        command = f"  python pipelines/bim_pipeline.py {arguments}".rstrip()
        lines += command.replace("\n", "\n      ").split("\n")
        lines += textwrap.wrap(
            purpose, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return lines


def _paragraph(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _bracketed(values: Mapping[str, Any], key: str) -> str:
    value: Any = values
    for part in key.split("."):
        value = value[part]
    text = value if isinstance(value, str) else format_value(value)
    return text if text.startswith("[") else f"[{text}]"


def _option(info: SettingInfo) -> str:
    return f"--{info.key} {info.kind}"


def _entry(left: str, right: str, column: int, width: int) -> list[str]:
    """One entry of --help: an option too long for its column pushes its own text to the right."""
    head = f"  {left}".ljust(column - 2) + "  "
    return textwrap.wrap(
        right,
        width,
        initial_indent=head,
        subsequent_indent=" " * column,
        break_long_words=False,
        break_on_hyphens=False,
    )
