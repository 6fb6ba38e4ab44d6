"""The retries of a remote generator, over a double of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from bim.orchestrator.distributed import streaming
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.distributed.streaming import RETRIES, stream_from_bundle
from bim.orchestrator.training.errors import ClusterLostError, TrainingError

LAYOUT = StageLayout(((0,),), gpus=0.0, cpus=0.1, loader_cpus=0.1, threads=1)


def streamed(monkeypatch: pytest.MonkeyPatch, *attempts: list[object]) -> list[object]:
    """What arrives if the attempts of a generator give these items; an exception ends one."""
    left = iter(attempts)

    def stream(*arguments: object) -> Iterator[object]:
        for item in next(left):
            if isinstance(item, Exception):
                raise item
            yield item

    monkeypatch.setattr(streaming, "_stream", stream)
    return list(stream_from_bundle(cast(Any, None), cast(Any, None), LAYOUT, lambda: False))


def test_after_a_death_all_items_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert streamed(monkeypatch, [1, WorkerCrashedError()], [2, 3, 4]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "error", [RayTaskError("f", "traceback", ValueError("wrong")), ClusterLostError("the head is lost")]
)
def test_what_its_code_raises_and_a_lost_cluster_are_not_tried_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)):
        streamed(monkeypatch, [1, error], [2])


def test_a_process_that_dies_each_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="a process that measures died: "):
        streamed(monkeypatch, *[[WorkerCrashedError()]] * (RETRIES + 1))
