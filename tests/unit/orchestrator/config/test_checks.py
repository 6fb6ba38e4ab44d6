from __future__ import annotations

from typing import Any

import pytest

from bim.orchestrator.config.checks import ineffective_settings
from bim.orchestrator.config.cli import load_settings
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
        ({}, []),
    ],
)
def test_a_setting_that_changes_nothing_beside_the_others_is_told(
    changes: dict[str, Any], said: list[str]
) -> None:
    assert ineffective_settings(with_changes(load_settings([]), changes)) == said
