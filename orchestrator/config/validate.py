"""Plain values, as a recipe holds them, to checked settings; every wrong key and value is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from bim.orchestrator.config.checks import contradictions
from bim.orchestrator.config.limits import beyond_limits
from bim.orchestrator.config.messages import explain
from bim.orchestrator.config.renamed import with_new_keys
from bim.orchestrator.config.schema import Settings, SettingsError, all_settings, setting_sections


def settings_from_mapping(
    values: Mapping[str, Any], file: str | None = None, typed: Mapping[str, str] | None = None
) -> Settings:
    """Validate nested plain values, as a YAML recipe holds them. A section that is null counts as not given.

    Args:
        file: where the values come from; put before each message about one of them.
        typed: dotted key -> text of those values that the command line gave; shown as typed, without `file`.

    Raises:
        SettingsError: one line for every key that is unknown, missing, wrong or out of bounds, or that contradicts another.
    """
    try:
        return _checked(values, file, typed or {})
    except RecursionError:  # JSON has no bounds, unlike a recipe
        raise SettingsError(f"{f'{file}: ' if file else ''}settings are nested too deeply") from None


def _checked(values: Mapping[str, Any], file: str | None, typed: Mapping[str, str]) -> Settings:
    sections = setting_sections()
    given = {k: v for k, v in with_new_keys(values).items() if not (v is None and k in sections)}
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        problems = explain(error.errors(), given, all_settings(), typed)
        lines = [f"{file}: {text}" if file and key and key not in typed else text for key, text in problems]
        raise SettingsError("\n".join(lines)) from None
    if disagreements := beyond_limits(settings) or contradictions(settings):
        raise SettingsError("\n".join(disagreements))
    return settings
