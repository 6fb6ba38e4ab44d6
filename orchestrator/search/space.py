"""Which values a search tries of each setting: our own candidates for a few, the recipe's lists and ranges for others.

Plain values and arithmetic; knows no Ray. To add candidates for a setting: one function, and one line in `SPACES`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bim.models.backbones.backbone import Backbone
from bim.models.masks.plan import visible_counts
from bim.models.masks.sampling import kept_count
from bim.orchestrator.config.messages import format_value, unknown
from bim.orchestrator.config.schema import Settings, SettingsError, all_settings, ratios_by_block
from bim.orchestrator.config.transforms import settings_to_mapping, with_changes

MASK_RATIOS = (0.5, 0.6, 0.75, 0.85, 0.9)
RAMPS = ((0.6, 0.75), (0.75, 0.9))
"""Mask ratios of the first and the last block, between which those of the others lie."""

THROW_RATIOS = (0.0, 0.25, 0.5)

MIN_MASK_UNITS = 9
"""Mask units of the smallest image that is tried: fewer leave nothing to choose between."""

SIZE_STEPS = (((0.0, 0.5), (0.5, 1.0)), ((0.0, 0.75), (0.5, 1.0)), ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0)))
"""Growing image sizes: (from this share of the epochs on, share of the backbone's own size)."""

MAX_SAMPLING_ATTEMPTS = 1000
"""Draws per setting that is wanted, until another one than those before is found."""

NOT_SEARCHABLE = {
    "name": "it changes no weight",
    "out": "it changes no weight",
    "resume": "it changes no weight",
    "seed": "a lucky seed is not a better setting",
    "init_from": "where a run starts from is not for a short trial to decide",
    "blocks": "other depths would be measured",
    "baseline": "it changes no weight",
    "backbones": "each backbone is a run of its own",
    "backbone.": "another backbone is another family, dearer or cheaper to use",
    "data.source": "scores on other images cannot be compared",
    "data.image_column": "scores on other images cannot be compared",
    "data.label_column": "scores by other labels cannot be compared",
    "data.val_fraction": "scores on other images cannot be compared",
    "data.test_fraction": "scores on other images cannot be compared",
    "data.split_seed": "scores on other images cannot be compared",
    "data.workers": "it changes no weight",
    "data.max_bad_fraction": "it changes no weight",
    "schedule.epochs": "every trial has the same budget, search.trial_epochs",
    "optim.precision": "it is the device's, and the same for all trials",
    "checkpoint.": "it changes no weight",
    "evaluation.": "scores measured in other ways cannot be compared",
    "failures.": "it changes no weight",
    "placement.": "it changes no weight",
    "search.": "a search does not search itself",
    "tracking.": "it changes no weight",
}
"""Settings, and groups (with a dot), that are not searched, and why."""


@dataclass(frozen=True)
class Choice:
    """A few values, the recipe's own first."""

    values: tuple[Any, ...]

    def stream(self, rng: random.Random) -> Iterator[Any]:
        """Every value equally often: shuffled, dealt out, shuffled again. A few trials see more of a setting that way."""
        while True:
            yield from rng.sample(self.values, len(self.values))


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, evenly or (`log`) by their logarithm; `whole` ones include both ends."""

    low: float
    high: float
    log: bool
    whole: bool

    def stream(self, rng: random.Random) -> Iterator[float]:
        """Independent draws."""
        while True:
            if self.log:
                value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            else:
                value = rng.uniform(self.low, self.high)
            # As it will be read, which may have rounded it out of the range.
            value = round(value) if self.whole else float(f"{value:.4g}")
            yield min(self.high, max(self.low, value))


Space = dict[str, Choice | Range]
"""Dotted key -> what is tried of it."""


def mask_ratios(settings: Settings, backbone: Backbone) -> list[Any]:
    """Ratios that leave each block at least two visible units, and two that rise from block to block."""
    units, blocks = backbone.grid[0] * backbone.grid[1], settings.num_blocks
    ramps = [list(ends) for ends in RAMPS if blocks > 1 and not _all_encoded(backbone)]
    return [ratio for ratio in (*MASK_RATIOS, *ramps) if min(_visible(units, ratio, blocks), default=0) >= 2]


def throw_ratios(settings: Settings, backbone: Backbone) -> list[Any]:
    """Ratios that leave something to decode at most of the mask ratios; none where decoders add no mask tokens."""
    if _all_encoded(backbone):
        return [0.0]
    units, blocks = backbone.grid[0] * backbone.grid[1], settings.num_blocks

    def fits(throw: float, ratio: Any) -> bool:
        try:
            return all(kept_count(units, visible, throw) > 0 for visible in _visible(units, ratio, blocks))
        except ValueError:
            return False

    ratios = _mask_values(settings, backbone)
    return [throw for throw in THROW_RATIOS if 2 * sum(fits(throw, ratio) for ratio in ratios) >= len(ratios)]


def resolutions(settings: Settings, backbone: Backbone) -> list[Any]:
    """Schedules that grow to the backbone's own size and take most of the mask ratios; null is that size throughout."""
    side, unit, blocks = backbone.image_size[0], backbone.mask_unit_px, settings.num_blocks
    if backbone.image_size != (side, side):  # a schedule names one number of pixels
        return [None]
    ratios = _mask_values(settings, backbone)
    kinds = zip(settings.per_block("target.name"), settings.per_block("target.cell"), strict=True)
    cells = {cell for name, cell in kinds if name == "hog"}

    def fits(pixels: int) -> bool:
        if any(pixels % cell for cell in cells):
            return False
        try:
            backbone.check_size((pixels, pixels))
            rows, columns = backbone.grid_at((pixels, pixels))
        except ValueError:
            return False
        if rows * columns < MIN_MASK_UNITS:
            return False
        return 2 * sum(bool(_visible(rows * columns, ratio, blocks)) for ratio in ratios) >= len(ratios)

    found: list[Any] = [None]
    for steps in SIZE_STEPS:
        schedule = [
            [int(start) if start == 0 else start, unit * round(share * side / unit)] for start, share in steps
        ]
        sizes = [pixels for _, pixels in schedule]
        if len(set(sizes)) == len(sizes) and all(fits(int(pixels)) for pixels in sizes):
            found.append(schedule)
    return found


SPACES: dict[str, Callable[[Settings, Backbone], list[Any]]] = {
    "mask.ratio": mask_ratios,
    "decoder.throw_ratio": throw_ratios,
    "schedule.resolution": resolutions,
}
"""Setting -> our own candidates."""


def space_of(settings: Settings, backbone: Backbone) -> Space:
    """What `search.space` asks for, checked; the recipe's own value is among the candidates of every setting.

    Raises SettingsError: all that is wrong with it, one sentence a line.
    """
    space: Space = {}
    problems: list[str] = []
    for key, given in settings.search.space.items():
        try:
            space[key] = _one(settings, backbone, key, given)
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
    """The recipe's own value of every setting that is searched, as plain values."""
    return {key: _plain(settings, key) for key in space}


def draw_settings(space: Space, own: Mapping[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` different settings, the recipe's own first, the others drawn from `seed`; fewer if there are no more."""
    streams = {key: values.stream(random.Random(f"{seed} {key}")) for key, values in space.items()}
    found = {json.dumps(own): dict(own)}
    wanted = min(count, combinations(space))
    for _ in range(MAX_SAMPLING_ATTEMPTS * count):  # a narrow range may hold fewer numbers than are wanted
        if len(found) >= wanted:
            break
        drawn = {key: next(stream) for key, stream in streams.items()}
        found.setdefault(json.dumps(drawn), drawn)
    return list(found.values())


def combinations(space: Space) -> float:
    """How many different settings the space has."""
    return math.prod(
        len(values.values)
        if isinstance(values, Choice)
        else values.high - values.low + 1
        if values.whole
        else math.inf
        for values in space.values()
    )


def encoded(value: Any) -> str:
    """A candidate as one word: Tune does not take nested lists, and MLflow shows text."""
    return json.dumps(value)


def decoded(word: str) -> Any:
    """What `encoded` was given."""
    return json.loads(word)


def changes_text(changes: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """What a trial does otherwise than the recipe: `mask.ratio 0.6, decoder.throw_ratio 0.5`."""
    parts = [
        f"{key} {f'{value:.4g}' if isinstance(value, float) else format_value(value)}"
        for key, value in changes.items()
        if value != own.get(key)
    ]
    return ", ".join(parts) or "the recipe's own setting"


def _one(settings: Settings, backbone: Backbone, key: str, given: Any) -> Choice | Range:
    known = all_settings()
    parent = known.get(key.rpartition(".")[0])
    if key not in known and not (parent is not None and parent.is_open):
        raise SettingsError(f"search.space: {unknown(key, list(known))}")
    for refused, why in NOT_SEARCHABLE.items():
        if key == refused or (refused.endswith(".") and key.startswith(refused)):
            raise SettingsError(f"search.space: {key} cannot be searched: {why}")
    own = _plain(settings, key)
    if isinstance(given, dict):
        return _range(settings, key, given, own)
    if given is None:
        if key not in SPACES:
            raise SettingsError(
                f"search.space: there are no candidates of our own for {key}, only for {', '.join(SPACES)}; list its "
                "values, [a, b], or give {low: a, high: b}"
            )
        given = SPACES[key](settings, backbone)
    elif not given:
        raise SettingsError(f"search.space: {key} must list at least one value, not []")
    values = [own]
    for value in given:
        _check(settings, key, value)
        if value not in values:
            values.append(value)
    return Choice(tuple(values))


def _range(settings: Settings, key: str, given: Mapping[str, Any], own: Any) -> Range:
    form = f"search.space: {key} must be a list of values or {{low: a, high: b, log: false}} with a below b"
    low, high, log = given.get("low"), given.get("high"), given.get("log", False)
    if (
        set(given) - {"low", "high", "log"}
        or not (_number(low) and _number(high))
        or not isinstance(log, bool)
    ):
        raise SettingsError(f"{form}, not {format_value(dict(given))}")
    assert low is not None
    assert high is not None
    if low >= high or (log and low <= 0):
        raise SettingsError(f"{form}{' and above 0' * log}, not {format_value(dict(given))}")
    if not _number(own) or not low <= own <= high:
        raise SettingsError(
            f"search.space: {key} goes from {low:g} to {high:g}, and the recipe's own value, which trial 0 takes, is "
            f"{format_value(own)}; widen it, or change {key}"
        )
    _check(settings, key, low)
    _check(settings, key, high)
    return Range(
        low, high, log, whole=isinstance(low, int) and isinstance(high, int) and isinstance(own, int)
    )


def _check(settings: Settings, key: str, value: Any) -> None:
    """Refuse a value that no trial could have; what only some combinations rule out is found by the trials."""
    try:
        with_changes(settings, {key: value})
    except SettingsError as error:
        raise SettingsError(f"search.space: {str(error).splitlines()[0]}") from None


def _plain(settings: Settings, key: str) -> Any:
    value: Any = settings_to_mapping(settings)
    for part in key.split(".", 2):
        value = value[part]
    return value


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mask_values(settings: Settings, backbone: Backbone) -> Sequence[Any]:
    """The mask ratios that a search would combine with another setting."""
    given = settings.search.space.get("mask.ratio", [_plain(settings, "mask.ratio")])
    return given if isinstance(given, list) and given else mask_ratios(settings, backbone)


def _visible(units: int, ratio: Any, blocks: int) -> tuple[int, ...]:
    """Visible units of every block; () if a ratio leaves a block none, or nothing to predict."""
    try:
        return visible_counts(units, ratios_by_block(ratio, blocks))
    except (ValueError, TypeError):
        return ()


def _all_encoded(backbone: Backbone) -> bool:
    return backbone.encode == "all"
