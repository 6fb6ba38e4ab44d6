from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.phases import PhaseSpec
from bim.orchestrator.data.spec import DataSpec


def test_images_that_changed_since_the_run_began_are_refused(tmp_path: Path) -> None:
    for i in range(8):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    spec = DataSpec(source=str(tmp_path), phases=(PhaseSpec(0, (8, 8), 2),))
    source, _ = spec.open()
    fixed = replace(spec, fingerprint=source.fingerprint())
    fixed.open()
    Image.new("RGB", (8, 8)).save(tmp_path / "late.png")
    with pytest.raises(DataError, match="have changed since this run began"):
        fixed.open()
