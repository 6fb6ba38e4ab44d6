"""The entries of `backbones`: the settings of every one, with a name and an output folder of its own.

Pure: opens no backbone, reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bim.orchestrator.config.backbone_entry import BackboneEntry
from bim.orchestrator.config.messages import format_value, unknown
from bim.orchestrator.config.schema import Settings, SettingsError, all_settings
from bim.orchestrator.config.transforms import with_changes

RUN_LEVEL_SETTINGS = (
    "name",
    "out",
    "resume",
    "from_scratch",
    "baseline",
    "backbone",
    "backbones",
    "plugins",
    "data.source",
    "data.image_column",
    "data.label_column",
    "data.val_fraction",
    "data.test_fraction",
    "data.split_seed",
    "evaluation.",
    "placement.backend",
    "placement.wait_s",
    "search.",
    "tracking.",
)
"""Settings that are the same for all backbones: what is compared was trained and scored on the same images."""

RESERVED_NAMES = (
    "checkpoints",
    "pictures",
    "variants",
    "decoders",
    "search",
    "uploads",
    "events.log",
    "metrics.jsonl",
    "baseline_mae",
)
"""Names that a run gives to other files and folders of its output directory."""


def backbone_entries(settings: Settings) -> dict[str, Settings]:
    """Name of folder, lines and rows -> settings, for every one of `settings.backbones`; `settings.out` is known.

    A search is left out: it is for one backbone.

    Raises:
        SettingsError: one line for everything that does not fit a backbone, which it names.
    """
    assert settings.backbones is not None
    entries, errors = dict[str, Settings](), ErrorCollector(SettingsError)
    for name, entry in zip(_names(settings.backbones), settings.backbones, strict=True):
        with errors.of(name):
            entries[name] = _entry_settings(settings, entry, name)
    errors.raise_if_any()
    return entries


class ErrorCollector:
    """Errors of several backbones, raised at once as one; what all of them have in common is in it once.

    Args:
        kinds: the errors that are collected.
    """

    def __init__(self, *kinds: type[Exception]) -> None:
        self._kinds = kinds
        self._names_by_line: dict[str, list[str]] = {}
        self._names: list[str] = []
        self._first: Exception | None = None

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Inside, an error is collected for the backbone of that name, and ends the block."""
        self._names.append(name)
        try:
            yield
        except self._kinds as error:
            self._first = self._first or error
            for line in str(error).splitlines():
                self._names_by_line.setdefault(line, []).append(name)

    def raise_if_any(self) -> None:
        """Raise what was collected, as the kind of error that came first."""
        if self._first is None:
            return
        lines: list[str] = []
        for line, names in self._names_by_line.items():
            is_common = len(names) == len(self._names)
            lines += [line] if is_common else [f"{name}: {line}" for name in names]
        raise type(self._first)("\n".join(lines)) from self._first


def _entry_settings(settings: Settings, entry: BackboneEntry, name: str) -> Settings:
    assert settings.out is not None
    changes: dict[str, Any] = {
        "name": f"{settings.name}-{name}",
        "out": str(settings.out / name),
        "backbones": None,
        "backbone": {"name": entry.name, "model_args": entry.model_args or {}},
        "search.trials": 0,
    }
    if settings.tracking.model_name is not None:
        changes["tracking.model_name"] = f"{settings.tracking.model_name}-{name}"
    if entry.blocks is not None:
        changes["blocks"] = entry.blocks if isinstance(entry.blocks, int) else list(entry.blocks)
    return with_changes(settings, changes | _checked_overrides(entry))


def _checked_overrides(entry: BackboneEntry) -> dict[str, Any]:
    """`entry.settings`, of which every key is one that a single backbone may have of its own."""
    problems = []
    for key in entry.settings:
        if any(
            key == fixed or (fixed.endswith(".") and key.startswith(fixed)) for fixed in RUN_LEVEL_SETTINGS
        ):
            problems.append(
                f"settings: {key} is the same for all backbones of a run; set it for the run, or for a run of its own"
            )
        elif key == "blocks":
            problems.append("settings: 'blocks' belongs beside settings")
        elif key.startswith("backbone."):
            problems.append(f"settings: {format_value(key)} belongs beside settings, as name or model_args")
        elif key not in all_settings():
            problems.append(f"settings: {unknown(key, list(all_settings()))}")
    if problems:
        raise SettingsError("\n".join(problems))
    return entry.settings


def _names(entries: Sequence[BackboneEntry]) -> list[str]:
    """A name for every entry, fit for a folder; equal names get a number."""
    names: list[str] = []
    for entry in entries:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", entry.alias or entry.name).strip(".-_")
        if entry.alias is not None and _is_taken(name, names):
            raise SettingsError(
                f"backbones: the name {format_value(entry.alias)} is taken; give this one another alias"
            )
        number, unique = 1, name or "backbone"
        while _is_taken(unique, names):
            number += 1
            unique = f"{name}-{number}"
        names.append(unique)
    return names


def _is_taken(name: str, names: Iterable[str]) -> bool:
    # Some file systems do not tell capitals from small letters.
    names_in_use = {other.casefold() for other in (*RESERVED_NAMES, *names)}
    return name.casefold() in names_in_use or name.casefold().startswith(
        ("settings.", "summary.", "tracking.", "run.", "lease.", "checkpoints.", "storage.")
    )
