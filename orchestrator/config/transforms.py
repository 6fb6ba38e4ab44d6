"""Settings as a whole: changed, compared, written as YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from bim.orchestrator.config.checks import PER_BLOCK, ineffective_keys
from bim.orchestrator.config.recipes import dump_yaml
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.text import redact

Scalar = str | int | float | bool | None

MODEL_ARGS = "backbone.model_args"

CHANGE_NO_WEIGHT = (
    "name",
    "out",
    "resume",
    "from_scratch",
    "baseline",  # a run of its own, beside this one
    "data.workers",  # the content of a batch is a function of (seed, step) only
    "data.max_bad_fraction",
    "checkpoint.",
    "estimate.",
    "evaluation.",
    "failures.",
    "search.",  # what it found is in the settings themselves
    "placement.",  # the same updates in the same order; only the hardware's rounding may differ
    "tracking.",
)
"""Keys, and sections (with a dot), that change no trained weight."""

MAY_DIFFER_ON_RESUME = (*CHANGE_NO_WEIGHT, "data.source", "plugins")
"""What a run may be resumed with others of. Images may have moved: their fingerprint says whether they are the same.
So may the modules of plugins; what they register is compared by its names.

Everything else must equal the checkpoint's: also `schedule.epochs` (the cosine's length), `data.accumulate` against
`data.batch_size` (masks are drawn per micro-batch), `data.label_column` (splits are stratified) and `init_from` (a
run that has no checkpoint yet starts again).
"""


def settings_to_mapping(settings: Settings) -> dict[str, Any]:
    """Nested plain values (lists, text, numbers) from which `settings_from_mapping` makes equal settings."""
    return settings.model_dump(mode="json")


def recorded_mapping(settings: Settings) -> dict[str, Any]:
    """`settings_to_mapping` without passwords and tokens: for everything that is written or uploaded."""
    return {key: _redacted(value) for key, value in settings_to_mapping(settings).items()}


def settings_to_yaml(settings: Settings) -> str:
    """Every setting as YAML, without passwords; given as `--recipe FILE` it makes equal settings again."""
    return f"# All settings of the run '{settings.name}'\n{dump_yaml(recorded_mapping(settings))}"


def with_changes(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings that differ in some dotted keys, validated again: `with_changes(s, {"blocks": 1})`."""
    values = settings_to_mapping(settings)
    for key, value in changes.items():
        values = overlaid(values, key.split("."), value)
    return settings_from_mapping(values)


def end_to_end(settings: Settings) -> Settings:
    """The same run as ordinary MAE: one block, all masked tokens decoded, normalized pixels, one image size.

    The encoder skips masked units, except in backbones that can only see them as mask tokens (ConvNeXt, ResNet,
    PVTv2). Settings of MAE that are listed per block (mask ratio, decoder) take the value of the deepest block.
    """
    last = {key: settings.per_block(key)[-1] for key in PER_BLOCK}
    ordinary = {
        "blocks": 1,
        "baseline": "none",
        "placement.stages": None,
        "boundary_noise": 0.0,
        "mask.encode": "auto",
        "decoder.name": "auto",
        "decoder.throw_ratio": 0.0,
        "target.name": "pixels",
        "target.normalize": True,
        "schedule.resolution": None,
        "search.trials": 0,
    }
    return with_changes(settings, last | ordinary)


def overlaid(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested values with one of them replaced or added; missing sections are added."""
    copy = deepcopy(dict(values))
    inner = copy
    for part in path[:-1]:
        if not isinstance(inner.get(part), dict):
            inner[part] = {}
        inner = inner[part]
    inner[path[-1]] = value
    return copy


def flat(settings: Settings, redacted: bool = True) -> dict[str, Scalar]:
    """Dotted key -> value, for MLflow; lists as text (`[3, 3, 3, 3]`), each of `model_args` its own key.

    redacted: without passwords and tokens.
    """
    values = recorded_mapping(settings) if redacted else settings_to_mapping(settings)
    return {key: json.dumps(v) if isinstance(v, list) else v for key, v in _leaves(values)}


def differing_keys(a: Settings, b: Settings) -> list[str]:
    """Dotted keys by which two settings train other weights (see MAY_DIFFER_ON_RESUME), alphabetically.

    Passwords are not compared: saved settings have none. A key that changes nothing in either of them counts as equal:
    its default may have changed between two versions.
    """
    without_effect = ineffective_keys(a).keys() & ineffective_keys(b).keys()
    left, right = dict(_leaves(recorded_mapping(a))), dict(_leaves(recorded_mapping(b)))
    absent = object()
    return sorted(
        key
        for key in left.keys() | right.keys()
        if left.get(key, absent) != right.get(key, absent)
        and not _is_among(key, MAY_DIFFER_ON_RESUME)
        and key not in without_effect
    )


def changes_weights(key: str) -> bool:
    """Whether a setting, by its dotted key, changes the trained weights (see CHANGE_NO_WEIGHT)."""
    return not _is_among(key, CHANGE_NO_WEIGHT)


def _is_among(key: str, free_keys: Sequence[str]) -> bool:
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in free_keys)


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _redacted(inner) for key, inner in value.items()}
    return [_redacted(inner) for inner in value] if isinstance(value, list) else value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in values.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves


def by_model_argument(given: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys with one key for each of `backbone.model_args`, where they are given as a mapping."""
    result = dict(given)
    arguments = result.get(MODEL_ARGS)
    if isinstance(arguments, Mapping) and arguments:
        del result[MODEL_ARGS]
        result |= {f"{MODEL_ARGS}.{name}": value for name, value in arguments.items()}
    return result
