from __future__ import annotations

from typing import Any

import pytest

from bim.orchestrator.config.checks import ineffective_settings
from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import SettingsError
from bim.orchestrator.config.transforms import with_changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target.cell": 4}, ["target.cell has no effect: no block's target is hog"]),
        ({"target.name": "hog", "target.cell": 4}, []),
        ({"target.name": ["pixels", "pixels", "pixels", "hog"], "target.cell": 4}, []),
        ({"decoder.sampler": "random"}, ["decoder.sampler has no effect: decoder.throw_ratio is 0"]),
        ({"decoder.sampler": "random", "decoder.throw_ratio": 0.5}, []),
        (
            {"decoder.throw_ratio": 0.5, "decoder.recovery": "none", "decoder.thrown_weight": 0.5},
            ["decoder.thrown_weight has no effect: thrown tokens are not recovered"],
        ),
        (
            {"mask.loss_on_newly_masked": False},
            ["mask.loss_on_newly_masked has no effect: mask.ratio is the same for all blocks"],
        ),
        ({"mask.loss_on_newly_masked": False, "mask.ratio": [0.5, 0.6, 0.7, 0.8]}, []),
        ({"blocks": 1, "boundary_noise": 0.1}, ["boundary_noise has no effect: there is one block"]),
        ({"boundary_noise": 0.1}, []),
        (
            {"placement.backend": "in_process", "placement.wait_s": 9.0},
            ["placement.wait_s has no effect: placement.backend is in_process"],
        ),
        ({}, []),
    ],
)
def test_a_setting_that_changes_nothing_beside_the_others_is_told(
    changes: dict[str, Any], said: list[str]
) -> None:
    assert ineffective_settings(with_changes(load_settings([]), changes)) == said


@pytest.mark.parametrize(
    "url",
    ["s3://bucket", "s3://bucket/a/b", "sftp://user@host/a", "abfs://box@account.dfs/a", "file:///mnt/a"],
)
def test_checkpoints_have_a_url_or_none(url: str) -> None:
    assert load_settings(["--checkpoint.storage", f"{url}/"]).checkpoint.storage == url
    assert load_settings(["--checkpoint.storage", "null"]).checkpoint.storage is None


@pytest.mark.parametrize(
    "url", ["runs/first", "/mnt/a", "s3://", "s3:/bucket", "s3:///a", "s3://a b", "://a"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(["--checkpoint.storage", url])
    assert str(error.value) == (
        f"checkpoint.storage must be a URL (e.g. 's3://bucket/checkpoints') or null, not '{url}'; "
        "a folder that all nodes see needs none: give --out one"
    )


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket/a", "s3://b/a?secret=hunter2", "s3://b#hunter2"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(SettingsError, match="must have no password") as error:
        load_settings(["--checkpoint.storage", url])
    assert "hunter2" not in str(error.value)
