"""Search space: the values that a search tries of each setting, default candidates or lists and ranges of the recipe."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.config.messages import format_value, unknown
from bim.orchestrator.config.schema import Settings, SettingsError, all_settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.search.candidates import DEFAULT_CANDIDATES, value_of
from bim.orchestrator.text import first_line

MAX_SAMPLING_ATTEMPTS = 1000
"""Draws per trial, until one differs from those before."""

NOT_SEARCHABLE = {
    "name": "it changes no weight",
    "out": "it changes no weight",
    "resume": "it changes no weight",
    "seed": "a lucky seed is not a better setting",
    "init_from": "where a run starts from is not for a short trial to decide",
    "blocks": "other depths would be measured",
    "baseline": "it changes no weight",
    "backbones": "each backbone is a run of its own",
    "backbone.": "another backbone has another cost in use",
    "data.source": "scores on other images cannot be compared",
    "data.image_column": "scores on other images cannot be compared",
    "data.label_column": "scores by other labels cannot be compared",
    "data.val_fraction": "scores on other images cannot be compared",
    "data.test_fraction": "scores on other images cannot be compared",
    "data.split_seed": "scores on other images cannot be compared",
    "data.workers": "it changes no weight",
    "data.max_bad_fraction": "it changes no weight",
    "schedule.epochs": "every trial has the same budget, search.trial_epochs",
    "optim.precision": "it depends on the device, and is the same for all trials",
    "checkpoint.": "it changes no weight",
    "evaluation.": "scores measured in other ways cannot be compared",
    "failures.": "it changes no weight",
    "placement.": "it changes no weight",
    "search.": "a search does not search itself",
    "tracking.": "it changes no weight",
}
"""Settings, and sections (with a dot), that are not searched, and why."""


@dataclass(frozen=True)
class Choice:
    """A few values, the baseline value first."""

    values: tuple[Any, ...]

    def stream(self, rng: random.Random) -> Iterator[Any]:
        """Every value equally often, shuffled in each round: a few trials cover more of a setting that way."""
        while True:
            yield from rng.sample(self.values, len(self.values))


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, uniform or (`log`) log-uniform; integers include both ends."""

    low: float
    high: float
    log: bool
    is_integer: bool

    def stream(self, rng: random.Random) -> Iterator[float]:
        """Independent draws."""
        while True:
            if self.log:
                value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            else:
                value = rng.uniform(self.low, self.high)
            # Rounded as it is printed, which may leave the range.
            value = round(value) if self.is_integer else float(f"{value:.4g}")
            yield min(self.high, max(self.low, value))


Space = dict[str, Choice | Range]
"""Dotted key -> the values that are tried."""


def space_of(settings: Settings, backbone: Backbone) -> Space:
    """The space that `search.space` describes; the baseline value is among the candidates of every setting.

    Raises SettingsError that lists every problem, one a line.
    """
    space: Space = {}
    problems: list[str] = []
    for key, entry in settings.search.space.items():
        try:
            space[key] = _candidates(settings, backbone, key, entry)
        except SettingsError as error:
            problems.append(str(error))
    if not settings.search.space:
        problems.append(
            "search.space must name at least one setting; to train without a search set search.trials to 0"
        )
    if problems:
        raise SettingsError("\n".join(dict.fromkeys(problems)))
    return space


def baseline_values(settings: Settings, space: Mapping[str, object]) -> dict[str, Any]:
    """The recipe's value of every setting that is searched, as plain values."""
    return {key: value_of(settings, key) for key in space}


def draw_settings(space: Space, baseline: Mapping[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` different configurations, the baseline first, the others drawn from `seed`; fewer if there are no more."""
    streams = {key: values.stream(random.Random(f"{seed} {key}")) for key, values in space.items()}
    configs = {json.dumps(baseline): dict(baseline)}
    count = int(min(count, combinations(space)))
    for _ in range(MAX_SAMPLING_ATTEMPTS * count):  # a narrow range may hold fewer different numbers
        if len(configs) >= count:
            break
        config = {key: next(stream) for key, stream in streams.items()}
        configs.setdefault(json.dumps(config), config)
    return list(configs.values())


def combinations(space: Space) -> float:
    """Number of different configurations of the space; infinite with a range of real numbers."""
    return math.prod(_size(values) for values in space.values())


def _size(values: Choice | Range) -> float:
    if isinstance(values, Choice):
        return len(values.values)
    return values.high - values.low + 1 if values.is_integer else math.inf


def changes_text(changes: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """How a trial differs from the baseline: `mask.ratio 0.6, decoder.throw_ratio 0.5`."""
    parts = [
        f"{key} {f'{value:.4g}' if isinstance(value, float) else format_value(value)}"
        for key, value in changes.items()
        if value != baseline.get(key)
    ]
    return ", ".join(parts) or "baseline config"


def _candidates(settings: Settings, backbone: Backbone, key: str, entry: Any) -> Choice | Range:
    """The values of one entry of `search.space`. Raises SettingsError."""
    known = all_settings()
    parent = known.get(key.rpartition(".")[0])
    if key not in known and not (parent is not None and parent.is_open):
        raise SettingsError(f"search.space: {unknown(key, list(known))}")
    for refused, reason in NOT_SEARCHABLE.items():
        if key == refused or (refused.endswith(".") and key.startswith(refused)):
            raise SettingsError(f"search.space: {key} cannot be searched: {reason}")
    baseline = value_of(settings, key)
    if isinstance(entry, dict):
        return _range(settings, key, entry, baseline)
    if entry is None:
        if key not in DEFAULT_CANDIDATES:
            raise SettingsError(
                f"search.space: {key} has no default candidates, only {', '.join(DEFAULT_CANDIDATES)} have; list its "
                "values, [a, b], or give {low: a, high: b}"
            )
        entry = DEFAULT_CANDIDATES[key](settings, backbone)
    elif not entry:
        raise SettingsError(f"search.space: {key} must list at least one value, not []")
    values = [baseline]
    for value in entry:
        _check(settings, key, value)
        if value not in values:
            values.append(value)
    return Choice(tuple(values))


def _range(settings: Settings, key: str, entry: Mapping[str, Any], baseline: Any) -> Range:
    form = f"search.space: {key} must be a list of values or {{low: a, high: b, log: false}} with a below b"
    low, high, log = entry.get("low"), entry.get("high"), entry.get("log", False)
    unknown_keys = set(entry) - {"low", "high", "log"}
    if unknown_keys or not isinstance(log, bool) or not _is_number(low) or not _is_number(high):
        raise SettingsError(f"{form}, not {format_value(dict(entry))}")
    assert low is not None
    assert high is not None
    if low >= high or (log and low <= 0):
        raise SettingsError(f"{form}{' and above 0' * log}, not {format_value(dict(entry))}")
    if not _is_number(baseline) or not low <= baseline <= high:
        raise SettingsError(
            f"search.space: {key} goes from {low:g} to {high:g}, and the recipe's value, which trial 0 takes, is "
            f"{format_value(baseline)}; widen the range, or change {key}"
        )
    _check(settings, key, low)
    _check(settings, key, high)
    return Range(low, high, log, is_integer=all(isinstance(value, int) for value in (low, high, baseline)))


def _check(settings: Settings, key: str, value: Any) -> None:
    """Raise SettingsError for a value that no trial could have; a trial reports an infeasible combination itself."""
    try:
        with_changes(settings, {key: value})
    except SettingsError as error:
        raise SettingsError(f"search.space: {first_line(error)}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
