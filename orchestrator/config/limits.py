"""Bounds of the settings: numbers that no run can use and text that no file system or record takes.

They are wide: a setting that a machine of today could use is within them. What is too large for one machine but not for
all is found where the model and the images are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bim.orchestrator.config.messages import format_value, shortened
from bim.orchestrator.config.schema import Settings

MAX_INT = 2**63 - 1
MAX_CHARACTERS = 1_000
MAX_ITEMS = 1_000
MAX_NAME = 100
MAX_PATH_PART = 255
MAX_IMAGE_SIZE = 8_192

LIMITS: dict[str, float] = {
    "blocks": 1_000,
    "boundary_noise": 1_000,
    "decoder.depth": 1_000,
    "decoder.dim": 65_536,
    "decoder.num_heads": 65_536,
    "decoder.thrown_weight": 1e6,
    "target.cell": MAX_IMAGE_SIZE,
    "target.bins": 1_024,
    "data.batch_size": 2**20,
    "data.accumulate": 2**20,
    "data.workers": 1_024,
    "schedule.epochs": 10**6,
    "schedule.resolution": 2**20,
    "optim.blr": 1e6,
    "optim.weight_decay": 1e6,
    "checkpoint.every_epochs": 10**6,
    "checkpoint.every_minutes": 10**6,
    "checkpoint.keep": 10**6,
    "evaluation.knn_k": 10**6,
    "evaluation.batch_size": 2**20,
    "evaluation.every_epochs": 10**6,
    "evaluation.patience": 10**6,
    "failures.max_restarts": 10**6,
    "placement.stages": 1_000,
    "placement.cpus_per_stage": 10**5,
    "placement.threads_per_stage": 1_024,
    "placement.window": 10**5,
    "placement.wait_s": 10**7,
    "search.trials": 10**5,
    "search.trial_epochs": 10**6,
    "search.grace_epochs": 10**6,
    "search.every_epochs": 10**6,
    "search.reduction_factor": 10**6,
    "search.trial_stages": 1_000,
    "search.concurrent": 10**5,
}
"""Dotted key -> the largest number that it, or an item of its list, may be; whole numbers elsewhere have 63 bits."""

MODEL_ARG_LIMITS = {
    "depth": 1_000,
    "depths": 1_000,
    "img_size": MAX_IMAGE_SIZE,
    "patch_size": MAX_IMAGE_SIZE,
}
"""timm keyword -> the largest number; the others have `MAX_MODEL_ARG`."""

MAX_MODEL_ARG = 2**17


def beyond_limits(settings: Settings) -> list[str]:
    """One sentence for each setting that is beyond its bounds."""
    problems: dict[str, str] = {}
    for key, value in _leaves(settings.model_dump(), ()):
        problem = _problem(key, value)
        if problem is not None:
            problems.setdefault(".".join(key), problem)
    return list(problems.values())


def _problem(path: tuple[str, ...], value: Any) -> str | None:
    key = shortened(".".join(path))
    if isinstance(value, str | Path):
        return _text_problem(key, str(value))
    if isinstance(value, list | tuple | Mapping):
        return (
            f"{key} lists {len(value)} values; at most {MAX_ITEMS} are allowed"
            if len(value) > MAX_ITEMS
            else None
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} must be a finite number, not {format_value(value)}"
    limit: float = LIMITS.get(".".join(path[:2]), LIMITS.get(path[0], MAX_INT))
    if path[:2] == ("backbone", "model_args"):
        limit = MODEL_ARG_LIMITS.get(path[2], MAX_MODEL_ARG)
    if abs(value) > limit:
        return f"{key} must be at most {int(limit)}, not {format_value(value)}"
    return None


def _text_problem(key: str, text: str) -> str | None:
    if len(text) > MAX_CHARACTERS:
        return f"{key} has {len(text)} characters; at most {MAX_CHARACTERS} are allowed"
    if key == "name" and len(text) > MAX_NAME:
        return f"{key} has {len(text)} characters; at most {MAX_NAME} are allowed"
    is_path = key in ("out", "data.source", "init_from")
    if is_path and any(len(part.encode(errors="replace")) > MAX_PATH_PART for part in text.split("/")):
        return f"{key} has a file name of more than {MAX_PATH_PART} bytes: {format_value(text)}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{key} is not text in UTF-8: {format_value(text)}"
    if any(character < " " or character == "\x7f" for character in text):
        return f"{key} holds a line break or another control character: {format_value(text)}"
    return None


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every scalar, list and free-form mapping with the dotted key that it belongs to."""
    if isinstance(value, Mapping):
        if len(path) >= 2:
            yield path, value
        for key, inner in value.items():
            yield (*path, "key"), str(key)
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        yield path, value
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, value
