"""What a module of `plugins` registers, and a data set that is an object, on Ray actors and in their data workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bim.orchestrator.data.source import dataset_object
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.distributed.ray_stage_group import RayStages
from bim.orchestrator.training.spec import DecoderSpec, TargetSpec
from bim.orchestrator.training.stage_group import InProcessStages
from tests.integration.tiny import data, differing, layout, state, tiny_spec, train

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]

OWN = "tests.own_parts"


def local_dataset() -> Any:
    """Of a class that no other process can import, as one of a notebook."""
    namespace: dict[str, Any] = {"__name__": "__main__", "np": np}
    code = """
class Local:
    targets = [index % 4 for index in range(240)]
    def __len__(self): return 240
    def __getitem__(self, index): return np.full((16, 16, 3), index, np.uint8), index % 4
"""
    exec(code, namespace)
    return namespace["Local"]()


@pytest.mark.parametrize("kind", ["registered", "object"])
def test_own_parts_train_on_ray_as_in_one_process(kind: str, tmp_path: Path) -> None:
    plugins = (OWN,)
    spec = tiny_spec(
        backbone="vit_own",
        plugins=plugins,
        targets=(TargetSpec("half"),) * 4,
        decoders=(DecoderSpec(1, 32, 2, name="counted"),) * 4,
    )
    images: DataSpec = data(source="stripes:240", plugins=plugins, workers=1)
    if kind == "object":
        source = dataset_object(local_dataset())
        images = data(source=source.name, given=source, workers=1)
    here = InProcessStages(spec, images.train_batches, layout(2).stage_blocks, threads=1)
    train(here, tmp_path / "here", steps=10, every=10)
    here.close()
    (tmp_path / "ray").mkdir()
    stages = RayStages(spec, images, layout(2), shared=tmp_path / "ray")
    try:
        train(stages, tmp_path / "ray", steps=10, every=10)
    finally:
        stages.close()
    assert differing(state(tmp_path / "here", 10), state(tmp_path / "ray", 10)) == []
