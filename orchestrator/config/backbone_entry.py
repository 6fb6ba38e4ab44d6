"""The entries of `backbones`: what one of several backbones sets for itself; the rest is the run's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from bim.orchestrator.config.field_types import Count, Counts, Identifier, ModelArg, Section, Text
from bim.orchestrator.config.messages import explain, format_value, setting_infos
from bim.orchestrator.config.renamed import with_new_keys


class BackboneEntry(Section):
    """One of several backbones: what it has of its own; everything else is the run's."""

    name: Text = Field(description="timm name")
    model_args: dict[str, ModelArg] | None = Field(
        default=None,
        description="timm keywords; null: timm's own values",
        examples=[{"img_size": 128, "depth": 8}],
    )
    blocks: Count | Counts | None = Field(
        default=None, description="null: as in the run", examples=[4, [2, 2, 6, 2]]
    )
    alias: Identifier | None = Field(
        default=None, description="name of its folder and in tables; null: its timm name"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="other settings of its own, by dotted key",
        examples=[{"optim.blr": 1.0e-3, "decoder.dim": 128}],
    )


def parse_backbone_entries(value: object) -> object:
    """Names joined by commas, or a list of names and mappings. Raises ValueError in words that name the entry."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list):
        return value
    infos, entries, problems = setting_infos(BackboneEntry.model_json_schema()), [], []
    for number, entry in enumerate(value, 1):
        given = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict):
            problems.append(
                f"backbones: entry {number} must be a timm name or a mapping, not {format_value(entry)}"
            )
            continue
        try:
            entries.append(BackboneEntry.model_validate(with_new_keys(given, "backbones")))
        except ValidationError as error:
            problems += [
                f"backbones: entry {number}: {text}" for _, text in explain(error.errors(), given, infos)
            ]
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(entries)


BackboneEntries = Annotated[
    tuple[BackboneEntry, ...], BeforeValidator(parse_backbone_entries), Field(min_length=1)
]
