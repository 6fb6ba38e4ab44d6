"""Where a function of a job runs, over a double of Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from bim.orchestrator.distributed import cluster
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.training.errors import TrainingError


class Ray:
    """Counts remote calls, which are done at once."""

    def __init__(self, nodes: int) -> None:
        self.count = nodes
        self.options: list[dict[str, Any]] = []

    def is_initialized(self) -> bool:
        return self.count > 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}] * self.count + [{"Alive": False}]

    def remote(self, function: Callable[..., Any]) -> Any:
        calls = self.options

        class Remote:
            def options(self, **options: Any) -> Any:
                calls.append(options)
                return self

            def remote(self, *arguments: Any) -> Any:
                return function(*arguments)

        return Remote()

    def wait(self, refs: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        return refs, []

    def get(self, ref: Any) -> Any:
        return ref


@pytest.mark.parametrize(
    ("nodes", "gpus", "is_remote"),
    [(0, 0.0, False), (1, 0.0, False), (2, 0.0, True), (1, 1.0, True)],
    ids=["no Ray", "one machine", "several machines", "a GPU"],
)
def test_a_measurement_runs_in_this_process_only_where_the_stages_can_run_too(
    nodes: int, gpus: float, is_remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Ray(nodes)
    monkeypatch.setattr(cluster, "ray", ray)
    layout = StageLayout(((0,),), gpus, cpus=0.5, loader_cpus=0.5, threads=1)
    assert cluster.run_on_worker(os.path.basename, layout, "/a/b") == "b"
    assert len(ray.options) == is_remote
    # A head that gives Ray no CPUs is no place for a task that requests some.
    assert all(options["num_cpus"] == 0.5 for options in ray.options)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OutOfMemoryError("Task was killed due to the node running low on memory."),
            "memory of the node was nearly full",
        ),
        (WorkerCrashedError(), "a process that measures died: "),
    ],
)
def test_a_measurement_whose_process_dies_ends_in_a_sentence_with_the_cause(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Ray(2)
    monkeypatch.setattr(ray, "get", lambda ref: (_ for _ in ()).throw(error))
    monkeypatch.setattr(cluster, "ray", ray)
    with pytest.raises(TrainingError, match=told) as caught:
        cluster.result_of(object())
    assert len(str(caught.value).splitlines()) == 1
