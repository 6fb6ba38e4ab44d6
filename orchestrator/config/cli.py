"""The command line as settings: a recipe, overridden by options such as `--mask.ratio 0.6`.

The settings are the options and values are YAML. pydantic-settings was tried in place of this file: it
stops at the first unknown key without naming the nearest one, refuses `--backbone.model_args.depth 8`,
and needs `messages.py` all the same, so that it saves less than 300 lines.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from bim.orchestrator.config.auto_batch import (
    ACCUMULATE,
    BATCH_SIZE,
    AutoBatches,
    LargestBatch,
    with_largest_batches,
    without_auto,
)
from bim.orchestrator.config.auto_rules import LEAST_SETTINGS
from bim.orchestrator.config.durations import seconds
from bim.orchestrator.config.help_page import WIDTH as HELP_WIDTH
from bim.orchestrator.config.help_page import help_text
from bim.orchestrator.config.messages import SettingInfo, format_value, is_section, shortened, unknown
from bim.orchestrator.config.recipes import (
    DEFAULT_RECIPE,
    SAVED_SETTINGS,
    BoundsError,
    RecipeError,
    bundled_recipes,
    parse_value,
    read_recipe,
)
from bim.orchestrator.config.renamed import new_key
from bim.orchestrator.config.schema import Settings, SettingsError, all_settings
from bim.orchestrator.config.transforms import by_model_argument, overlaid, settings_to_yaml
from bim.orchestrator.config.validate import settings_from_mapping

log = logging.getLogger(__name__)

_BRACKETS = {"[": "]", "{": "}"}

FLAGS = ("--help", "-h", "--help-all", "--version", "--print-config", "--dry-run", "--verbose", "--quiet")
"""Options that are no settings and take no value."""


@dataclass
class _Arguments:
    """What stands on the command line, unchecked: `overrides` is dotted key -> text, None for a bare flag."""

    recipe: str | None = None
    time_budget: str | None = None
    overrides: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


Automatic = Callable[[Mapping[str, Any], float | None], Mapping[str, Any]]
"""From what the user set, by dotted key, and the seconds of training that are allowed, to nested settings."""


def load_settings(
    argv: Sequence[str], automatic: Automatic | None = None, largest_batch: LargestBatch | None = None
) -> Settings:
    """Settings from the arguments of a command (`sys.argv[1:]`).

    `--help`, `--help-all`, `--version` and `--print-config` print and exit (0). `--dry-run`, `--verbose` and `--quiet`
    are the caller's to read.

    Args:
        automatic: gives the settings for images that no recipe is named for; None: the default recipe does.
        largest_batch: what `data.batch_size: auto` stands for; None: it is refused.

    Raises:
        SettingsError: all that is wrong with the arguments, the recipe or the settings, one sentence a line.
    """
    flags = set(FLAGS) & set(argv)
    if "--version" in flags:
        _print_and_exit(version_text())
    arguments = _split([token for token in argv if token not in FLAGS])
    _resumed_recipe(arguments)
    problems = arguments.problems
    recipe = arguments.recipe or DEFAULT_RECIPE
    is_automatic = automatic is not None and _is_automatic(arguments)
    if flags & {"--help", "-h", "--help-all"}:
        own_images = arguments.overrides["data.source"] if is_automatic else None
        try:
            _print_and_exit(help_text(recipe, "--help-all" in flags, own_images, _terminal_width()))
        except RecipeError as error:
            raise SettingsError(str(error)) from None
    try:
        values = deepcopy(dict(LEAST_SETTINGS)) if is_automatic else read_recipe(recipe)
    except RecipeError as error:
        raise SettingsError("\n".join([*problems, str(error)])) from None

    if name := arguments.overrides.get("backbone.name"):
        values = _without_the_arguments_of_another(values, name)
    typed: dict[str, str] = {}
    given: dict[str, Any] = {}
    for given_key, text in arguments.overrides.items():
        key = new_key(_with_underscores(given_key))
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
        given[key] = value
        values = overlaid(values, key.split(".", 2), value)
    auto = AutoBatches()
    if largest_batch is not None:
        values, auto = without_auto(values)

    file = None if recipe in bundled_recipes() else recipe
    try:
        settings = settings_from_mapping(values, file=file, typed=typed)
        problems += _of_no_backbone(settings, typed, recipe)
    except SettingsError as error:
        problems.append(str(error))
    problems += _of_time_budget(arguments, is_automatic)
    if problems:
        raise SettingsError("\n".join(problems))
    if automatic is not None and is_automatic:
        budget_s = None if arguments.time_budget is None else seconds(arguments.time_budget)
        if auto.run:
            del given[BATCH_SIZE]
        if auto.entries:
            given["backbones"] = values["backbones"]
        given = by_model_argument(given)
        values = dict(automatic(given, budget_s))
        for key, value in given.items():
            values = overlaid(values, key.split(".", 2), value)
        settings = settings_from_mapping(values, typed=typed)
    if largest_batch is not None and auto:
        chosen = {BATCH_SIZE, ACCUMULATE} - given.keys() if is_automatic else ()
        settings = with_largest_batches(settings, auto, largest_batch, frozenset(chosen))
    if not settings.search.trials and settings.backbones is None:
        for key in typed:
            if key.startswith("search.") and key not in ("search.trials", "search.resume"):
                log.warning("note: --%s has no effect: search.trials is 0", key)
    if "--print-config" in flags:
        _print_and_exit(settings_to_yaml(settings).rstrip())
    return settings


def recipe_file(argv: Sequence[str]) -> Path | None:
    """The file that `--recipe` names or `--resume` implies; None for a recipe of the package, or without one."""
    arguments = _split([token for token in argv if token not in FLAGS])
    _resumed_recipe(arguments)
    recipe = arguments.recipe
    return None if recipe is None or recipe in bundled_recipes() else Path(recipe).expanduser()


def _is_automatic(arguments: _Arguments) -> bool:
    """Whether the settings are chosen from the images: no recipe, no saved settings, images of the user's own."""
    has_own_images = arguments.overrides.get("data.source") not in (None, "", "digits")
    return arguments.recipe is None and has_own_images


def _of_time_budget(arguments: _Arguments, is_automatic: bool) -> list[str]:
    if arguments.time_budget is None:
        return []
    try:
        seconds(arguments.time_budget)
    except ValueError as error:
        return [f"time_budget: {error}"]
    if is_automatic:
        return []
    return [
        "--time_budget is for settings that are chosen from the images: give --data.source, and leave out --recipe and "
        "--resume; with a recipe set --schedule.epochs"
    ]


def _of_no_backbone(settings: Settings, typed: Mapping[str, str], recipe: str) -> list[str]:
    """What was typed of the single backbone where several are trained, none of which it would reach."""
    if settings.backbones is None:
        return []
    searched = [f"--{key}" for key in typed if key.startswith("search.")]
    if searched and settings.search.trials:
        return [
            f"{', '.join(searched)}: a search is for one backbone; leave it out, or leave out --backbones "
            "(--search.trials 0 turns off the search of the recipe)"
        ]
    keys = [f"--{key}" for key in typed if key.startswith("backbone.")]
    if not keys:
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


def _terminal_width() -> int:
    """Columns for `--help`: those of the terminal, within reason."""
    return min(HELP_WIDTH, max(60, shutil.get_terminal_size((HELP_WIDTH, 24)).columns))


def _print_and_exit(text: str) -> NoReturn:
    """Print and exit (0), quietly where the reader has closed the pipe, as `--help | head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the flush at exit would tell it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _split(argv: Sequence[str]) -> _Arguments:
    """`--key value`, `--key=value` and bare `--key`; of a key given twice the last one holds."""
    arguments, stray = _Arguments(), []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            stray.append(token)
            continue
        key, equals, text = token[2:].partition("=")
        value: str | None = text if equals else None
        if value is None and tokens and not tokens[0].startswith("--"):
            value = tokens.pop(0)
        if value is not None and value[:1] in _BRACKETS:  # a list with spaces that the shell took apart
            while tokens and not value.endswith(_BRACKETS[value[0]]) and not tokens[0].startswith("--"):
                value += " " + tokens.pop(0)
        if key.replace("-", "_") == "time_budget":
            arguments.time_budget = value or ""
        elif key != "recipe":
            arguments.overrides[key] = value
        elif value:
            arguments.recipe = value
        else:
            arguments.problems.append(
                f"--recipe needs a name or a file: {', '.join(bundled_recipes())}, or a YAML file"
            )
    if stray:
        listed = ", ".join(f"'{shortened(token)}'" for token in stray[:5]) + ", ..." * (len(stray) > 5)
        arguments.problems.append(
            f"unexpected argument{'s' * (len(stray) > 1)} {listed}: "
            "settings are written --key value, and a value with spaces needs quotes"
        )
    return arguments


def _resumed_recipe(arguments: _Arguments) -> None:
    """`--out DIR --resume` alone goes on with the settings that the run in DIR wrote down."""
    out = arguments.overrides.get("out")
    resume_values = {arguments.overrides.get(key, "false") for key in ("resume", "search.resume")}
    if arguments.recipe is None and out and resume_values & {None, "true"}:
        with suppress(OSError, ValueError, RuntimeError):  # a path that cannot be, which is told later
            saved = Path(out).expanduser() / SAVED_SETTINGS
            if saved.is_file():
                arguments.recipe = str(saved)


def _with_underscores(key: str) -> str:
    """`from-scratch` as `from_scratch`: a setting may be typed with hyphens."""
    name = key.replace("-", "_")
    return name if name in all_settings() else key


def _info_of(key: str) -> SettingInfo | None:
    """The setting that a dotted key sets: itself, or the open mapping that it is an entry of.

    An entry may have dots of its own: `search.space.optim.blr` is the entry optim.blr of search.space.
    """
    infos = all_settings()
    parents = (info for name, info in infos.items() if info.is_open and key.startswith(f"{name}."))
    return infos.get(key) or next(parents, None)


def _not_a_setting(key: str) -> str:
    infos = all_settings()
    inner = [name for name, info in infos.items() if info.section == key]
    if inner:
        return is_section(key, inner)
    return unknown(key, [*infos, "recipe", *(flag.lstrip("-") for flag in FLAGS)])


def _value(key: str, text: str | None, info: SettingInfo) -> Any:
    if text is None and info.is_flag:
        return True
    if text is None or not text.strip():  # an empty variable of a shell is no "null"
        raise SettingsError(f"--{key} needs a value: {info.allowed}")
    if info.is_text:
        return None if info.nullable and text == "null" else text
    try:
        return parse_value(text)
    except RecipeError as error:
        reason = f" ({error})" if isinstance(error, BoundsError) else ""
        raise SettingsError(f"{key} must be {info.allowed}, not {format_value(text)}{reason}") from None


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
