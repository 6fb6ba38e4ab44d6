"""Passwords in the URIs of settings: saved settings have none, so a run that is resumed gets them again."""

from __future__ import annotations

from collections.abc import Mapping

from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import flat, with_changes
from bim.orchestrator.text import is_redacted, redact


def with_credentials(settings: Settings, environment: Mapping[str, str]) -> Settings:
    """Settings in which every URI has its password again, where a saved recipe has it without.

    Of a run that is resumed the password comes from the command line, where the URI is given again, or from an environment
    variable whose value is that URI, such as MLFLOW_TRACKING_URI.

    Raises:
        SettingsError: neither has it.
    """
    changes, problems = {}, []
    for key, value in flat(settings, redacted=False).items():
        if not isinstance(value, str) or not is_redacted(value):
            continue
        full = next((uri for uri in environment.values() if uri != value and redact(uri) == value), None)
        if full is None:
            problems.append(
                f"{key} is {value}, as it was saved, without its password; give --{key} again, or set "
                f"{'MLFLOW_TRACKING_URI' if key == 'tracking.uri' else 'an environment variable'} to the whole URI"
            )
        else:
            changes[key] = full
    if problems:
        raise SettingsError("\n".join(problems))
    return with_changes(settings, changes) if changes else settings
