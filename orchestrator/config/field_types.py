"""The types of settings: bounds as annotated types, lists read as tuples, text as paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from bim.orchestrator.config.messages import format_value


def _tuple_if_list(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _names(value: object) -> object:
    """`a,b` as the names a and b."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(","))
    return _tuple_if_list(value)


def _home(value: object) -> object:
    return os.path.expanduser(value) if isinstance(value, str) else value


def _storage_url(value: object) -> object:
    """Raises ValueError for text that is no URL, and for one with a secret, which it does not repeat."""
    if not isinstance(value, str):
        return value
    address = value.partition("://")[2].partition("/")[0]
    if ":" in address.rpartition("@")[0] or "?" in value or "#" in value:
        raise ValueError(
            "checkpoint.storage must have no password, query or fragment: it is written into settings.yaml and MLflow; keys "
            "belong into the environment or the provider's own configuration (AWS_ACCESS_KEY_ID, ~/.aws/credentials)"
        )
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s][^\s]*|file:///\S+", value):
        raise ValueError(
            f"checkpoint.storage must be a URL (e.g. 's3://bucket/checkpoints') or null, not {format_value(value)}; "
            "a folder that all nodes see needs none: give --out one"
        )
    return value.rstrip("/")


def _path_if_text(value: object) -> object:
    return Path(os.path.expanduser(value)) if isinstance(value, str) and value else value


AUTO = "auto"
"""In place of a batch size: the largest that fits. `auto_batch.py` puts a number in its place."""


def _batch_size(value: object) -> object:
    """Raises ValueError for `auto` where nothing can compute it."""
    if value == AUTO:
        raise ValueError(
            "data.batch_size: auto is for the settings of a run, as the command and bim.orchestrator.pretrain read them; "
            "give a number here"
        )
    return value


Count = Annotated[int, Field(ge=1)]
BatchSize = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(_batch_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "const": AUTO}]}),
]
Seed = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
HeldOut = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Location = Annotated[str, BeforeValidator(_home), Field(min_length=1)]
StorageUrl = Annotated[str, BeforeValidator(_storage_url), Field(min_length=1)]
OutPath = Annotated[Path, BeforeValidator(_path_if_text)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
ModuleNames = Annotated[
    tuple[ModuleName, ...],
    BeforeValidator(_names),
    Field(
        examples=["my_module"],
        json_schema_extra={"allowed": "names of modules, joined by commas or as a list"},
    ),
]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
Fractions = Annotated[tuple[Fraction, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
CropScale = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]],
    BeforeValidator(_tuple_if_list),
]
HeldOuts = Annotated[tuple[HeldOut, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
_OwnNames = Annotated[tuple[Identifier, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
# Editors offer the project's own names; `runs/resolve.py` also knows those that plugins register.
TargetNames = Annotated[
    Literal["pixels", "hog"] | Identifier | _OwnNames,
    Field(
        examples=["hog", ["hog", "hog", "pixels", "pixels"]],
        json_schema_extra={"allowed": "pixels, hog, the name of a registered target, or a list of them"},
    ),
]
DecoderNames = Annotated[
    Literal["auto", "local", "light"] | Identifier | _OwnNames,
    Field(
        examples=["auto", ["auto", "auto", "auto", "my_decoder"]],
        json_schema_extra={
            "allowed": "auto, local, light, the name of a registered decoder, or a list of them"
        },
    ),
]
PhaseEntry = Annotated[
    tuple[int | float, ...], BeforeValidator(_tuple_if_list), Field(min_length=2, max_length=4)
]
Phases = Annotated[tuple[PhaseEntry, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
Betas = Annotated[tuple[HeldOut, HeldOut], BeforeValidator(_tuple_if_list)]
SearchValues = list[Any] | dict[str, bool | int | float] | None
_Plain = bool | int | float | str
ModelArg = _Plain | list[_Plain | list[_Plain]] | None  # timm's window_size: [[4, 4], [8, 8]]


def _search_space(value: object) -> object:
    """Raises ValueError for single values, in words that name the key."""
    if isinstance(value, dict):
        problems = [
            f"search.space: {key} must be a list of values to try, or {{low: a, high: b}}, not {format_value(tried)}; "
            f"to set it without a search give --{key} {format_value(tried)}"
            for key, tried in value.items()
            if not (tried is None or isinstance(tried, list | dict))
        ]
        if problems:
            raise ValueError("\n".join(problems))
    return value


SearchSpace = Annotated[dict[str, SearchValues], BeforeValidator(_search_space)]


class Section(BaseModel):
    """A frozen section of settings that refuses unknown keys."""

    # Strict: "4" in a file is text, True is no number. Lists become tuples, text a path, where declared.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )
