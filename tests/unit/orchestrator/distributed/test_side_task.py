"""A call in another process: what it holds is freed at its end, and after an error its process serves no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from ray.exceptions import WorkerCrashedError

from bim.orchestrator.distributed import side_task as module
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.distributed.placement_group import PlacementGroup, node_of_first_bundle
from bim.orchestrator.distributed.side_task import SideProcess, SideTask
from bim.orchestrator.training.errors import TrainingError

GROUP = cast(PlacementGroup, object())


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    events: list[str] = []
    monkeypatch.setattr(module, "release_placement_group", lambda group: events.append("freed"))
    return events


def task(events: list[str], monkeypatch: pytest.MonkeyPatch, result: Callable[[], int]) -> SideTask[int]:
    monkeypatch.setattr(module, "task_result", lambda reference: result())
    return SideTask(None, lambda: events.append("ended"), GROUP)


def raising(error: Exception) -> Callable[[], int]:
    def result() -> int:
        raise error

    return result


def test_the_process_of_a_call_that_succeeds_stays(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = task(events, monkeypatch, lambda: 7)
    assert done.result() == 7
    assert events == ["freed"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(ValueError("no image"), ValueError), (WorkerCrashedError(), TrainingError)],
    ids=["error", "death"],
)
def test_that_of_a_call_that_fails_ends(
    events: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    failed = task(events, monkeypatch, raising(error))
    with pytest.raises(raised, match=r"no image|^its process died: "):
        failed.result()
    assert events == ["ended", "freed"]


def test_that_of_a_call_that_is_cancelled_ends(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = task(events, monkeypatch, lambda: 7)
    cancelled.cancel()
    assert events == ["ended", "freed"]


class FakeRay:
    """Starts actors with numbers."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.killed: list[int] = []

    def remote(self, actor_class: type) -> Any:
        return self

    def options(self, **options: Any) -> Any:
        fake = self

        class Options:
            def remote(self) -> Any:
                fake.started.append(options)
                return FakeActor(len(fake.started))

        return Options()

    def is_initialized(self) -> bool:
        return True

    def kill(self, actor: FakeActor) -> None:
        self.killed.append(actor.number)


class FakeActor:
    def __init__(self, number: int) -> None:
        self.number, self.call = number, self

    def remote(self, function: Callable[[], Any]) -> str:
        return f"{function()} by {self.number}"


def test_a_process_is_kept_on_its_node_and_holds_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ray, nodes = FakeRay(), [node * 56 for node in "aabb"]  # Ray checks that it looks like an id
    alive = True
    monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr(module, "gcs_is_reachable", lambda: True)
    monkeypatch.setattr(module, "node_of_first_bundle", lambda group: nodes.pop(0))
    monkeypatch.setattr(SideProcess, "_answers", lambda self: alive)
    process = SideProcess(StageLayout(((0,),), gpus=0.0, cpus=1.0, loader_cpus=0.0, threads=1), GROUP)

    def call() -> Any:
        return process.start_beside_first_stage(str, "score")._reference

    assert [call(), call(), call()] == ["score by 1", "score by 1", "score by 2"]
    alive = False
    assert call() == "score by 3"
    process.close()
    process.close()
    assert ray.killed == [1, 2, 3]
    assert [options["num_cpus"] for options in ray.started] == [0, 0, 0]


@pytest.mark.parametrize(
    "table",
    [
        {"state": "REMOVED"},
        {"state": "CREATED", "bundles_to_node_id": {0: ""}},
        {"state": "RESCHEDULING", "bundles_to_node_id": {0: "node", 1: ""}},
    ],
    ids=["removed", "no node", "rescheduling"],
)
def test_a_node_that_is_lost_is_told(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]) -> None:
    name = "bim.orchestrator.distributed.placement_group.placement_group_table"
    monkeypatch.setattr(name, lambda group: table)
    with pytest.raises(PlacementError, match=r"^a node of the run is lost$"):
        node_of_first_bundle(GROUP)
