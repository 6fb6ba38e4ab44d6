from __future__ import annotations

import pickle

import pytest
import torch

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.facts import image_facts
from bim.orchestrator.data.source import open_source


def test_synthetic_images_have_their_number_and_size() -> None:
    source = open_source("synthetic:1281167x50x37")
    assert len(source) == 1281167
    assert source.name == "synthetic:1281167x50x37"
    assert source.load(5).shape == (3, 37, 50)
    assert source.load(5).dtype == torch.uint8
    assert source.fingerprint() != open_source("synthetic:3x50x37").fingerprint()
    assert len(pickle.dumps(source)) < 20_000
    facts = image_facts(source, sampled=3)
    assert (facts.splits, facts.short_side_px, facts.is_labeled) == ({"train": 1281167}, 37, False)


@pytest.mark.parametrize(
    "text", ["", "10", "10x20", "0x20x20", "10x20x7", "10x20x99999", "ax20x20", "10x20x20x3"]
)
def test_what_names_no_images_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="write synthetic:COUNTxWIDTHxHEIGHT"):
        open_source(f"synthetic:{text}")
