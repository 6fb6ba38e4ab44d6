"""Keys of the previous minor version, in recipes, saved settings and on the command line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bim.orchestrator.config import renamed
from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import SettingsError, all_settings


@pytest.fixture(autouse=True)
def no_notice_yet() -> None:
    renamed._notify.cache_clear()


def test_every_old_key_leads_to_a_setting_of_today() -> None:
    for old, new in renamed.RENAMED.items():
        assert old not in all_settings()
        assert new in all_settings() or new.startswith("backbones.")


def test_an_old_key_on_the_command_line_works_and_is_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bim"):
        for _ in range(2):
            made = load_settings(["--mask.score_newly_dropped", "false"])
    assert made == load_settings(["--mask.loss_on_newly_masked", "false"])
    assert [record.getMessage() for record in caplog.records] == [
        "setting 'mask.score_newly_dropped' is now 'mask.loss_on_newly_masked'; "
        "the old name works until version 0.3"
    ]


def test_old_keys_in_a_recipe_work(tmp_path: Path) -> None:
    recipe = tmp_path / "old.yaml"
    recipe.write_text(
        "name: old\nmask: {score_newly_dropped: false}\ndata: {source: digits, batch_size: 8}\n"
        "schedule: {epochs: 1}\nbackbones: [{name: vit_tiny_patch16_224, called: tiny}]\n"
    )
    made = load_settings(["--recipe", str(recipe)])
    assert made.mask.loss_on_newly_masked is False
    assert made.backbones is not None
    assert made.backbones[0].alias == "tiny"


def test_a_dotted_key_in_a_file_is_still_an_error(tmp_path: Path) -> None:
    recipe = tmp_path / "old.yaml"
    recipe.write_text("mask.score_newly_dropped: false\n")
    with pytest.raises(SettingsError, match=r"mask\.score_newly_dropped"):
        load_settings(["--recipe", str(recipe)])
