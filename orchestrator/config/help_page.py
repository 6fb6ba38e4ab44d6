"""The text of `--help` and `--help-all`: settings by topic, with the values of the chosen recipe."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from bim.orchestrator.config.messages import SettingInfo, format_value
from bim.orchestrator.config.recipes import DEFAULT_RECIPE, bundled_recipes, read_recipe
from bim.orchestrator.config.schema import all_settings, setting_sections
from bim.orchestrator.config.transforms import settings_to_mapping
from bim.orchestrator.config.validate import settings_from_mapping

WIDTH = 100  # columns

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

EXAMPLES = """\
Examples
  python pipelines/bim_pipeline.py
      a smoke test on the scanned digits of scikit-learn: the whole job in minutes on a laptop
  python pipelines/bim_pipeline.py --data.source DIR --out runs/a
      your images, with settings chosen from them: DIR holds image files, at any depth, or shards
  python pipelines/bim_pipeline.py --recipe vit_base_imagenet --data.source DIR --out runs/b
      a ViT-B in four blocks, as for ImageNet
  python pipelines/bim_pipeline.py --out runs/a --resume
      continue an interrupted run with the settings it was started with
  python pipelines/bim_pipeline.py --blocks '[2,2,2,2]' --mask.ratio '[0.6,0.65,0.7,0.75]'
      one value per block; values are YAML, quote brackets in a shell
  python pipelines/bim_pipeline.py --recipe vit_base_imagenet --data.source DIR \\
      --backbones vit_small_patch16_224,swin_tiny_patch4_window7_224
      two backbones in one run, compared in one table; --recipe digits_backbones takes minutes
  python pipelines/bim_pipeline.py --baseline mae --seed 1
      also one ordinary MAE run with the same decoder and epochs, truncated at every depth

A recipe of your own is a YAML file with the same settings, nested (mask: {ratio: 0.6}). Start from
a copy of pipelines/recipes/digits_demo.yaml and run it with --recipe my.yaml."""


def help_text(recipe: str = DEFAULT_RECIPE, every_setting: bool = False) -> str:
    """Settings with type, description and their value in `recipe`, in 100 columns.

    every_setting: all of them by section; otherwise those of `COMMON`.

    Raises:
        RecipeError, SettingsError: the recipe cannot be read, or is wrong.
    """
    values = settings_to_mapping(settings_from_mapping(read_recipe(recipe)))
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
    lines = [
        "usage: python pipelines/bim_pipeline.py [--recipe NAME|FILE] [--SETTING VALUE ...]",
        "",
        "Pretrain a family of timm backbones of different depth in one run: block-wise masked image modeling,",
        "each block with its own loss. Evaluates, exports and records every depth.",
        "",
        *_entry("--recipe NAME|FILE", "a recipe below, or a YAML file of settings", column),
        *_entry("--time_budget 10m|6h|2d", "bound of the training, where no recipe is given", column),
        *_entry("--dry-run", "print what the run would do and cost, and exit", column),
        *_entry("--print-config", "print the resolved settings as YAML and exit", column),
        *_entry("--verbose, --quiet", "more messages; only warnings and results", column),
        *_entry("--help, -h", "the settings that people set", column),
        *_entry("--help-all", "every setting", column),
        *_entry("--version", "the version of the package", column),
        "",
        "Recipes",
    ]
    for name, title in bundled_recipes().items():
        lines += _entry(name + (" (default)" if name == DEFAULT_RECIPE else ""), title, column)
    lines += ["", f"Settings, each with its value in {recipe} in brackets"]
    for title, keys in topics.items():
        lines += ["", title]
        for key in keys:
            description = f"{infos[key].description} {_bracketed(values, key)}"
            lines += _entry(_option(infos[key]), description, column)
    return "\n".join([*lines, "", EXAMPLES])


def _bracketed(values: Mapping[str, Any], key: str) -> str:
    value: Any = values
    for part in key.split("."):
        value = value[part]
    text = value if isinstance(value, str) else format_value(value)
    return text if text.startswith("[") else f"[{text}]"


def _option(info: SettingInfo) -> str:
    return f"--{info.key} {info.kind}"


def _entry(left: str, right: str, column: int) -> list[str]:
    """One entry of --help: an option too long for its column pushes its own text to the right."""
    head = f"  {left}".ljust(column - 2) + "  "
    return textwrap.wrap(
        right,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * column,
        break_long_words=False,
        break_on_hyphens=False,
    )
