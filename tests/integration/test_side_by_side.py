"""Two families on a cluster with room for one: the second waits, and starts when the first has given its room back."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.jobs import concurrent_runs as courses
from bim.orchestrator.jobs.concurrent_runs import BackboneRun, run_concurrently
from bim.orchestrator.jobs.several import prepare_several
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.runs.train import resolve_layout
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from tests.e2e.command import image_folder
from tests.integration.conftest import MODEL_ARGS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

WAITS = "waits until another backbone gives its room back"


class Sink:
    """A tracker for those who only train: nothing is kept."""

    def log_metrics(self, step: int, values: dict[str, float]) -> None: ...

    def log_event(self, text: str) -> None: ...

    def rewind(self, step: int, prefix: str = "") -> None: ...


class Scene:
    """Two backbones of 1.5 CPU on a cluster of 2, what they said, and in which order they ended."""

    def __init__(self, out: Path, epochs: int) -> None:
        self.stop = StopRequest()
        self.said: list[tuple[str, str]] = []
        self.ended: list[str] = []
        source = image_folder(out / "images", "{number}.png", 40)
        entry = {"name": "vit_tiny_patch16_224", "model_args": MODEL_ARGS, "blocks": 2}
        tiny = f"""--data.source {source} --data.batch_size 8 --data.workers 0 --schedule.epochs {epochs}
            --schedule.warmup_epochs 0 --decoder.dim 32 --decoder.num_heads 1 --evaluation.latency false
            --placement.stages 1 --placement.cpus_per_stage 1.5 --placement.threads_per_stage 1
            --out {out / "run"}"""
        backbones = json.dumps([entry | {"alias": name} for name in ("a", "b")])
        settings = load_settings([*tiny.split(), "--backbones", backbones])
        tracker: Any = Sink()
        self.courses: list[BackboneRun] = []
        for member in prepare_several(settings).members:
            family = member.prepared.family
            family.out.mkdir(parents=True)
            plans = [(family, resolve_layout(family.settings, ClusterResources(2, 0)))]
            say = self.say_for(member.name)
            self.courses.append(
                BackboneRun(member.name, member.prepared, plans, "fp32", collect(), tracker, say)
            )

    def say_for(self, name: str) -> Any:
        def say(text: str) -> None:
            self.said.append((name, text))
            self.on_line(name, text)

        return say

    def on_line(self, name: str, text: str) -> None: ...

    def note(self, course: BackboneRun) -> None:
        self.ended.append(course.name)

    def run(self) -> tuple[BackboneRun, BackboneRun]:
        """Both to their end. Returns (the one that was first, the one that waited)."""
        run_concurrently(self.courses, self.stop, lambda _: None, self.note)
        (waiter,) = {name for name, text in self.said if text == WAITS}
        first, second = sorted(self.courses, key=lambda course: course.name == waiter)
        return first, second

    def when(self, name: str, begins: str) -> int:
        """Of all lines, the number of the first one of that backbone that begins so."""
        return next(i for i, (who, text) in enumerate(self.said) if who == name and text.startswith(begins))


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait is told soon, and would soon be given up if the time in which another one holds room counted."""
    monkeypatch.setattr(courses, "LOG_WAIT_AFTER_S", 0.5)
    monkeypatch.setattr(courses, "PATIENCE_S", 5.0)


def room_is_free() -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        groups = placement_group_table().values()
        free = ray.available_resources().get("CPU", 0.0)
        if all(group["state"] == "REMOVED" for group in groups) and free == 2.0:
            return True
        time.sleep(0.1)
    return False


def test_the_second_starts_when_the_first_has_given_its_room_back_and_both_finish(tmp_path: Path) -> None:
    scene = Scene(tmp_path, epochs=2)
    first, second = scene.run()
    assert [first.failed, second.failed] == [None, None]
    assert scene.ended == [first.name, second.name]
    assert sum(text == WAITS for _, text in scene.said) == 1
    assert scene.when(second.name, WAITS) < scene.when(first.name, "measuring")
    assert scene.when(first.name, "RankMe by depth") < scene.when(second.name, "epoch 1/2")
    for course in (first, second):
        assert course.measured
        assert [report.depth for report in course.found[0].reports] == [2, 4]
        assert all(Path(folder).is_dir() for folder in course.found[0].folders.values())
    assert room_is_free()


def test_a_stop_request_ends_at_once_what_waits_for_room_and_the_first_with_a_checkpoint(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path, epochs=500)
    times: dict[str, float] = {}

    def on_line(name: str, text: str) -> None:
        if text == WAITS:
            times["asked"] = time.monotonic()
            scene.stop.reason = "SIGINT"

    def note(course: BackboneRun) -> None:
        assert threading.current_thread() is threading.main_thread()
        times[course.name] = time.monotonic()
        scene.ended.append(course.name)

    scene.on_line, scene.note = on_line, note  # type: ignore[method-assign]
    first, second = scene.run()
    assert scene.ended == [second.name, first.name]
    assert times[second.name] - times["asked"] < 5
    assert [first.failed, second.failed] == [None, None]
    assert [first.found, second.found] == [[], []]
    assert [text for name, text in scene.said if name == second.name] == [WAITS]
    assert CheckpointStore(second.prepared.family.out).latest() is None
    assert CheckpointStore(first.prepared.family.out).latest() is not None
    assert room_is_free()
