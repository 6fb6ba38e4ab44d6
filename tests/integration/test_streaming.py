"""A remote generator whose process dies: all of its items come again, however many were taken."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.distributed.placement_group import create_placement_group, release_placement_group
from bim.orchestrator.distributed.streaming import stream_from_bundle

LAYOUT = StageLayout(((0,),), gpus=0.0, cpus=0.1, loader_cpus=0.1, threads=1)


@pytest.mark.usefixtures("ray_cluster")
def test_a_generator_whose_process_dies_sends_everything_again(tmp_path: Path) -> None:
    def sent(folder: str) -> Iterator[str]:
        try:
            os.mkdir(f"{folder}/first")  # which attempt this is
        except FileExistsError:
            items = ["a", "b", "end"]
        else:
            items = ["how far it is", "still going", "a", "KILL"]
        for item in items:
            if item == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    group = create_placement_group(LAYOUT, 60.0)
    assert group is not None
    try:
        items = list(stream_from_bundle(sent, group, LAYOUT, lambda: False, str(tmp_path)))
    finally:
        release_placement_group(group)
    assert items[-3:] == ["a", "b", "end"]
