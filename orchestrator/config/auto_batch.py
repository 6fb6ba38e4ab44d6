"""`data.batch_size: auto`, of a run or of one of several backbones: taken out of plain values, put back as a number.

What is saved in `settings.yaml` is the number; a run that is resumed keeps it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bim.orchestrator.config.field_types import AUTO
from bim.orchestrator.config.recipes import SAVED_SETTINGS, RecipeError, read_recipe
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import overlaid, with_changes

log = logging.getLogger(__name__)

BATCH_SIZE, ACCUMULATE = "data.batch_size", "data.accumulate"

LargestBatch = Callable[[Settings], int]
"""From settings to the largest `data.batch_size` that fits; what they have there does not count."""


@dataclass(frozen=True)
class AutoBatches:
    """Whose batch is to be the largest that fits: the run's, and that of some entries of `backbones`, from 0."""

    run: bool = False
    entries: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.run or bool(self.entries)


def without_auto(values: Mapping[str, Any]) -> tuple[dict[str, Any], AutoBatches]:
    """Nested values that can be checked, with a batch of 1 for the run's `auto`, and where `auto` was.

    An entry of `backbones` is left without a batch of its own.
    """
    result, data, backbones = dict(values), values.get("data"), values.get("backbones")
    is_run = isinstance(data, Mapping) and data.get("batch_size") == AUTO
    if is_run:
        result = overlaid(result, ("data", "batch_size"), 1)
    entries = []
    if isinstance(backbones, list):
        result["backbones"] = list(backbones)
        for number, entry in enumerate(backbones):
            entry_settings = entry.get("settings") if isinstance(entry, Mapping) else None
            if isinstance(entry_settings, Mapping) and entry_settings.get(BATCH_SIZE) == AUTO:
                others = {key: value for key, value in entry_settings.items() if key != BATCH_SIZE}
                result["backbones"][number] = {**entry, "settings": others}
                entries.append(number)
    return result, AutoBatches(is_run, tuple(entries))


def with_largest_batches(
    settings: Settings, auto: AutoBatches, largest_batch: LargestBatch, chosen: frozenset[str] = frozenset()
) -> Settings:
    """The settings with numbers: those of the saved run where it is resumed, else the largest that fit.

    Args:
        chosen: keys that rules chose for the images. Of a batch among them, the images of an optimizer step stay as many.
    """
    saved = _saved_batches(settings, auto)
    if saved is not None:
        return with_changes(settings, saved)
    changes = dict[str, Any]()
    if auto.run:
        batch_size = largest_batch(_without_own_batches(settings, auto))
        changes = _fitted(settings, batch_size, chosen, settings.data.accumulate)
    if auto.entries:
        entries = _entries(settings)
        for number in auto.entries:
            entry_settings = dict(entries[number]["settings"])
            batch_size = largest_batch(with_changes(settings, {"backbones": [entries[number]]}))
            accumulate = entry_settings.get(ACCUMULATE, settings.data.accumulate)
            entry_settings |= _fitted(settings, batch_size, chosen - entry_settings.keys(), accumulate)
            log.info("%s of %s: %d", BATCH_SIZE, entries[number]["name"], entry_settings[BATCH_SIZE])
            entries[number] = {**entries[number], "settings": entry_settings}
        changes["backbones"] = entries
    return with_changes(settings, changes)


def _fitted(settings: Settings, batch_size: int, chosen: frozenset[str], accumulate: int) -> dict[str, Any]:
    if BATCH_SIZE not in chosen:
        return {BATCH_SIZE: batch_size}
    images_per_step = settings.data.batch_size * settings.data.accumulate
    if ACCUMULATE not in chosen:
        return {BATCH_SIZE: max(1, min(batch_size, images_per_step // accumulate))}
    return {
        BATCH_SIZE: min(batch_size, images_per_step),
        ACCUMULATE: max(1, images_per_step // batch_size),
    }


def _entries(settings: Settings) -> list[dict[str, Any]]:
    return [entry.model_dump(mode="json") for entry in settings.backbones or ()]


def _without_own_batches(settings: Settings, auto: AutoBatches) -> Settings:
    """With those backbones alone that take the batch of the run, if there are any."""
    entries = [
        entry
        for number, entry in enumerate(_entries(settings))
        if BATCH_SIZE not in entry["settings"] and number not in auto.entries
    ]
    return with_changes(settings, {"backbones": entries}) if entries else settings


def _saved_batches(settings: Settings, auto: AutoBatches) -> dict[str, Any] | None:
    """What a run to be resumed was started with; None for a new run, and where that cannot be read."""
    if settings.out is None or not (settings.resume or settings.search.resume):
        return None
    changes = dict[str, Any]()
    with suppress(RecipeError, KeyError, IndexError, TypeError):
        saved = read_recipe(str(settings.out / SAVED_SETTINGS))
        if auto.run:
            changes[BATCH_SIZE] = int(saved["data"]["batch_size"])
        if auto.entries:
            entries = _entries(settings)
            for number in auto.entries:
                batch_size = int(saved["backbones"][number]["settings"][BATCH_SIZE])
                entry_settings = {**entries[number]["settings"], BATCH_SIZE: batch_size}
                entries[number] = {**entries[number], "settings": entry_settings}
            changes["backbones"] = entries
        return changes
    return None
