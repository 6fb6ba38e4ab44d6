"""Several backbones in one launch: the settings of every one, with a name and an output folder of its own.

Pure: opens no backbone, reads and writes nothing. Serves `run_concurrently.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bim.orchestrator.config.backbone_entry import BackboneEntry
from bim.orchestrator.config.messages import format_value, unknown
from bim.orchestrator.config.schema import Settings, SettingsError, all_settings
from bim.orchestrator.config.transforms import with_changes

RUN_LEVEL_SETTINGS = (
    "name",
    "out",
    "resume",
    "baseline",
    "backbone",
    "backbones",
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
"""Settings that a single backbone cannot have of its own: what is compared saw, and was scored on, the same images."""

RESERVED_NAMES = ("checkpoints", "pictures", "variants", "decoders", "search", "events.log", "metrics.jsonl")
"""Names that a run gives to other things in its output directory."""


@dataclass(frozen=True)
class Member:
    """One backbone of several: `name` is that of its folder, its lines and its rows."""

    name: str
    settings: Settings


def members(settings: Settings) -> tuple[Member, ...]:
    """The run's settings for every one of its `backbones`; `settings.out` is known.

    A search is left out: it is for one backbone.

    Raises:
        SettingsError: one line for everything that does not fit a backbone, which it names.
    """
    assert settings.backbones is not None
    assert settings.out is not None
    names = _names(settings.backbones)
    made, problems = [], ErrorCollector()
    for name, entry in zip(names, settings.backbones, strict=True):
        with problems.of(name):
            made.append(Member(name, _own_settings(settings, entry, name, settings.out / name)))
    problems.tell()
    return tuple(made)


class ErrorCollector:
    """What is wrong with some of several members, told at once. What is wrong with all of them alike is told once."""

    def __init__(self, *kinds: type[Exception]) -> None:
        self._kinds = kinds or (SettingsError,)
        self._lines: dict[str, list[str]] = {}
        self._names: list[str] = []
        self._first: Exception | None = None

    def of(self, name: str) -> _Attempt:
        """A context in which errors are noted for the member of that name, and passed over."""
        self._names.append(name)
        return _Attempt(self._kinds, lambda error: self._note(name, error))

    def tell(self) -> None:
        """Raise what was noted, as the kind of error that came first."""
        if self._first is None:
            return
        lines = []
        for line, names in self._lines.items():
            everyone = len(names) == len(self._names)
            lines += [line] if everyone else [f"{name}: {line}" for name in names]
        raise type(self._first)("\n".join(lines)) from self._first

    def _note(self, name: str, error: Exception) -> None:
        self._first = self._first or error
        for line in str(error).splitlines():
            self._lines.setdefault(line, []).append(name)


class _Attempt:
    def __init__(self, kinds: tuple[type[Exception], ...], note: Callable[[Exception], None]) -> None:
        self._kinds, self._note = kinds, note

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, self._kinds):
            self._note(error)
            return True
        return False


def _own_settings(settings: Settings, entry: BackboneEntry, name: str, out: Path) -> Settings:
    own = _other_settings(entry)
    changes: dict[str, Any] = {
        "name": f"{settings.name}-{name}",
        "out": str(out),
        "backbones": None,
        "backbone": {"name": entry.name, "model_args": entry.model_args or {}},
        "search.trials": 0,
    }
    if settings.tracking.model_name is not None:
        changes["tracking.model_name"] = f"{settings.tracking.model_name}-{name}"
    if entry.blocks is not None:
        changes["blocks"] = entry.blocks if isinstance(entry.blocks, int) else list(entry.blocks)
    return with_changes(settings, changes | own)


def _other_settings(entry: BackboneEntry) -> dict[str, Any]:
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
    """A name for every entry, fit for a folder; a number tells those apart that have the same."""
    wanted = [re.sub(r"[^A-Za-z0-9._-]+", "-", entry.alias or entry.name).strip(".-_") for entry in entries]
    found: list[str] = []
    for name, entry in zip(wanted, entries, strict=True):
        if entry.alias is not None and _is_in(name, [*RESERVED_NAMES, *found]):
            raise SettingsError(
                f"backbones: the name {format_value(entry.alias)} is taken; give this one another alias"
            )
        number, free = 1, name or "backbone"
        while _is_in(free, [*RESERVED_NAMES, *found]):
            number += 1
            free = f"{name}-{number}"
        found.append(free)
    return found


def _is_in(name: str, names: Iterable[str]) -> bool:
    # Some file systems do not tell capitals from small letters.
    taken = {other.casefold() for other in names}
    return name.casefold() in taken or name.casefold().startswith(("settings.", "summary.", "tracking."))
