"""Turns the command line into settings: a recipe, overlaid by overrides such as `--mask.ratio 0.6`; also --help.

Not argparse: the settings are the options, values are YAML, nothing is abbreviated, and an error names the
nearest key. Serves the scripts in pipelines/.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from bim.orchestrator.config.messages import SettingInfo, format_value, unknown
from bim.orchestrator.config.recipes import (
    DEFAULT_RECIPE,
    SAVED_SETTINGS,
    RecipeError,
    bundled_recipes,
    parse_value,
    read_recipe,
)
from bim.orchestrator.config.schema import Settings, SettingsError, all_settings, setting_groups
from bim.orchestrator.config.transforms import overlaid, settings_to_mapping
from bim.orchestrator.config.validate import settings_from_mapping

WIDTH = 100  # columns of --help

_BRACKETS = {"[": "]", "{": "}"}

EXAMPLES = """\
Examples
  python pipelines/bim_pipeline.py
      the scanned digits of scikit-learn, start to end, in a few minutes on a laptop
  python pipelines/bim_pipeline.py --recipe vit_base_imagenet --data.source DIR --out runs/a
      a ViT-B in four blocks on your images: DIR holds image files, at any depth, or Parquet shards
  python pipelines/bim_pipeline.py --out runs/a --resume
      continue a run that was cut off, with the settings it was started with
  python pipelines/bim_pipeline.py --blocks '[2,2,2,2]' --mask.ratio '[0.6,0.65,0.7,0.75]'
      one value per block; values are YAML, and a shell wants brackets in quotes
  python pipelines/bim_pipeline.py --recipe vit_base_imagenet --data.source DIR \\
      --backbones vit_small_patch16_224,swin_tiny_patch4_window7_224
      two backbones side by side, compared in one table; --recipe digits_backbones is quickly tried
  python pipelines/bim_pipeline.py --baseline mae --seed 1
      also one ordinary MAE run with the same decoder and epochs, truncated at every depth

A recipe of your own is a YAML file with the same settings, nested (mask: {ratio: 0.6}). Start from
a copy of pipelines/recipes/digits_demo.yaml and run it with --recipe my.yaml."""


@dataclass
class _Arguments:
    """What stands on the command line, unchecked: `overrides` is dotted key -> text, None for a bare flag."""

    recipe: str | None = None
    overrides: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def load_settings(argv: Sequence[str]) -> Settings:
    """Settings from the arguments of a command (`sys.argv[1:]`). `--help` and `--version` print and exit (0).

    Raises:
        SettingsError: all that is wrong with the arguments, the recipe or the settings, one sentence a line.
    """
    if {"--help", "-h"} & set(argv):
        _print_and_exit(help_text())
    if "--version" in argv:
        _print_and_exit(version_text())
    arguments = _split(argv)
    _resumed_recipe(arguments)
    problems = arguments.problems
    recipe = arguments.recipe or DEFAULT_RECIPE
    try:
        values = read_recipe(recipe)
    except RecipeError as error:
        raise SettingsError("\n".join([*problems, str(error)])) from None

    if name := arguments.overrides.get("backbone.name"):
        values = _without_the_arguments_of_another(values, name)
    typed: dict[str, str] = {}
    for key, text in arguments.overrides.items():
        info = _info_of(key)
        if info is None:
            problems.append(_not_a_setting(key))
            continue
        try:
            value = _value(key, text, info)
        except SettingsError as error:
            problems.append(str(error))
            continue
        typed[key] = "true" if text is None else text
        values = overlaid(values, key.split(".", 2), value)

    file = None if recipe in bundled_recipes() else recipe
    try:
        settings = settings_from_mapping(values, file=file, typed=typed)
        problems += _of_no_backbone(settings, typed, recipe)
    except SettingsError as error:
        problems.append(str(error))
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def _of_no_backbone(settings: Settings, typed: Mapping[str, str], recipe: str) -> list[str]:
    """What was typed of the single backbone where several are trained, none of which it would reach."""
    keys = [f"--{key}" for key in typed if key.startswith("backbone.")]
    if settings.backbones is None or not keys:
        return []
    listed = ", ".join(keys)
    if "backbones" in typed:
        return [
            f"{listed}: with --backbones each backbone has its own model_args: "
            "--backbones '[{name: TIMM_NAME, model_args: {img_size: 128}}, ...]'"
        ]
    names = ", ".join(entry.name for entry in settings.backbones)
    return [
        f"{listed}: {recipe} trains several backbones ({names}); add --backbones null to train a single one, or name "
        "them all with --backbones"
    ]


def _print_and_exit(text: str) -> NoReturn:
    """Print and exit (0), quietly where the reader has closed the pipe, as `--help | head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the flush at exit would tell it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _split(argv: Sequence[str]) -> _Arguments:
    """`--key value`, `--key=value` and bare `--key`; of a key given twice the last one holds."""
    found, stray = _Arguments(), []
    waiting = list(argv)
    while waiting:
        token = waiting.pop(0)
        if not token.startswith("--") or token == "--":
            stray.append(token)
            continue
        key, equals, text = token[2:].partition("=")
        value: str | None = text if equals else None
        if value is None and waiting and not waiting[0].startswith("--"):
            value = waiting.pop(0)
        if value is not None and value[:1] in _BRACKETS:  # a list with spaces that the shell took apart
            while waiting and not value.endswith(_BRACKETS[value[0]]) and not waiting[0].startswith("--"):
                value += " " + waiting.pop(0)
        if key != "recipe":
            found.overrides[key] = value
        elif value:
            found.recipe = value
        else:
            found.problems.append(
                f"--recipe needs a name or a file: {', '.join(bundled_recipes())}, or a YAML file"
            )
    if stray:
        listed = ", ".join(f"'{token}'" for token in stray)
        found.problems.append(
            f"unexpected {listed}: settings are written --key value, and a value with spaces needs quotes"
        )
    return found


def _resumed_recipe(arguments: _Arguments) -> None:
    """`--out DIR --resume` alone goes on with the settings that the run in DIR wrote down."""
    out = arguments.overrides.get("out")
    asked = {arguments.overrides.get(key, "false") for key in ("resume", "search.resume")}
    if arguments.recipe is None and out and asked & {None, "true"}:
        saved = Path(out).expanduser() / SAVED_SETTINGS
        if saved.is_file():
            arguments.recipe = str(saved)


def _info_of(key: str) -> SettingInfo | None:
    """The setting that a dotted key sets: itself, or the open mapping that it is an entry of.

    An entry may have dots of its own: `search.space.optim.blr` is the entry optim.blr of search.space.
    """
    infos = all_settings()
    parents = (info for name, info in infos.items() if info.is_open and key.startswith(f"{name}."))
    return infos.get(key) or next(parents, None)


def _not_a_setting(key: str) -> str:
    infos = all_settings()
    inner = [name for name, info in infos.items() if info.group == key]
    if inner:
        return f"'{key}' is a group of settings, not one: {', '.join(inner)}"
    return unknown(key, [*infos, "recipe", "help", "version"])


def _value(key: str, text: str | None, info: SettingInfo) -> Any:
    if text is None and info.is_flag:
        return True
    if text is None or not text.strip():  # an empty variable of a shell is no "null"
        raise SettingsError(f"--{key} needs a value: {info.allowed}")
    if info.is_text:
        return None if info.nullable and text == "null" else text
    try:
        return parse_value(text)
    except RecipeError:
        raise SettingsError(f"{key} must be {info.allowed}, not {format_value(text)}") from None


def _without_the_arguments_of_another(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A recipe's `model_args` shape the recipe's own backbone; another one starts from timm's own values."""
    backbone = values.get("backbone")
    if not isinstance(backbone, dict) or backbone.get("name") == name:
        return values
    return values | {"backbone": {k: v for k, v in backbone.items() if k != "model_args"}}


def version_text() -> str:
    """Name and version of the installed package."""
    try:
        return f"bim-orchestrator {metadata.version('bim-orchestrator')}"
    except metadata.PackageNotFoundError:
        return "bim-orchestrator, not installed: pip install -e . gives it a version"


def help_text() -> str:
    """Every setting with its type, what it is, and its value in the default recipe, in 100 columns."""
    defaults = settings_to_mapping(settings_from_mapping(read_recipe(DEFAULT_RECIPE)))
    infos = list(all_settings().values())
    column = max(len(_option(info)) for info in infos if "|" not in info.kind) + 4
    lines = [
        "usage: python pipelines/bim_pipeline.py [--recipe NAME|FILE] [--SETTING VALUE ...]",
        "",
        "Pretrain a family of timm backbones of different depth in one run: masked image modelling, block",
        "by block, each with its own loss. Evaluates, exports and records every depth.",
        "",
        *_entry(
            "--recipe NAME|FILE",
            "where the settings start: one of the list below, or a YAML file",
            column,
        ),
        *_entry("--help, -h", "this text", column),
        *_entry("--version", "the version of the package", column),
        "",
        "Recipes",
    ]
    for name, title in bundled_recipes().items():
        lines += _entry(name + (" (default)" if name == DEFAULT_RECIPE else ""), title, column)
    titles = {"": "Run"} | {group: f"{group}: {title}" for group, title in setting_groups().items()}
    lines += ["", f"Settings, each with its value in {DEFAULT_RECIPE} in brackets"]
    for group, title in titles.items():
        lines += ["", title]
        for info in infos:
            if info.group == group:
                value: Any = defaults
                for part in info.key.split("."):
                    value = value[part]
                shown = value if isinstance(value, str) else format_value(value)
                shown = shown if shown.startswith("[") else f"[{shown}]"
                lines += _entry(_option(info), f"{info.description} {shown}", column)
    return "\n".join([*lines, "", EXAMPLES])


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
