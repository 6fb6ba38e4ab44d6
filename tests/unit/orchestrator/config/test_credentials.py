"""Saved settings have no passwords; they come from the command line or the environment again."""

from __future__ import annotations

import pytest

from bim.orchestrator.config.credentials import with_credentials
from bim.orchestrator.config.recipes import parse_value
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import (
    differing_keys,
    flat,
    recorded_mapping,
    settings_to_yaml,
    with_changes,
)
from bim.orchestrator.config.validate import settings_from_mapping

URI = "postgresql://ada:hunter2@db/mlflow"


@pytest.fixture
def settings(default_settings: Settings) -> Settings:
    return with_changes(default_settings, {"tracking.uri": URI, "init_from": "https://t0ken@hub/weights"})


@pytest.fixture
def default_settings() -> Settings:
    from bim.orchestrator.config.cli import load_settings

    return load_settings([])


def test_what_is_recorded_has_no_password(settings: Settings) -> None:
    text = settings_to_yaml(settings) + str(flat(settings)) + str(recorded_mapping(settings))
    assert "hunter2" not in text
    assert "t0ken" not in text
    assert settings.tracking.uri == URI


def test_saved_settings_equal_those_with_the_password(settings: Settings) -> None:
    saved = settings_from_mapping(parse_value(settings_to_yaml(settings)))
    assert differing_keys(saved, settings) == []
    other = with_changes(settings, {"init_from": "https://t0ken@hub/others"})
    assert differing_keys(saved, other) == ["init_from"]


def test_passwords_come_from_any_variable_that_holds_the_uri(settings: Settings) -> None:
    saved = settings_from_mapping(recorded_mapping(settings))
    environment = {"MLFLOW_TRACKING_URI": URI, "WEIGHTS": "https://t0ken@hub/weights", "OTHER": "x"}
    assert with_credentials(saved, environment) == settings
    assert with_credentials(settings, {}) == settings


def test_without_a_password_every_uri_is_named(settings: Settings) -> None:
    saved = settings_from_mapping(recorded_mapping(settings))
    with pytest.raises(SettingsError) as raised:
        with_credentials(saved, {"MLFLOW_TRACKING_URI": "postgresql://ada:hunter2@another/mlflow"})
    lines = str(raised.value).splitlines()
    assert sorted(line.partition(" is ")[0] for line in lines) == ["init_from", "tracking.uri"]
    assert "--tracking.uri" in str(raised.value)
