"""Two backbones on a cluster with room for one: the second waits, and starts when the first releases its resources."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.jobs import train_backbones as concurrent
from bim.orchestrator.jobs.backbone_run import BackboneRun
from bim.orchestrator.jobs.layouts import single_layouts
from bim.orchestrator.jobs.prepare import prepare
from bim.orchestrator.jobs.train_backbones import train_backbones
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from tests.e2e.command import image_folder
from tests.integration.conftest import MODEL_ARGS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

WAITS = "waiting for CPUs (held by: "


class Sink:
    """A tracker for runs that only train: nothing is kept."""

    def log_metrics(self, step: int, values: dict[str, float]) -> None: ...

    def rewind(self, step: int, prefix: str = "") -> None: ...

    def log_provenance(self, record: object) -> None: ...

    def begin_depths(self, params: object, series: str = "") -> None: ...

    def log_depth_metrics(self, step: int, values: object, series: str = "") -> None: ...

    def log_file(self, path: Path, folder: str | None = None) -> None: ...


class Lines(logging.Handler):
    """Keeps (name of the thread, line), and calls `on_line` with them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []
        self.on_line: Callable[[str, str], None] = lambda name, text: None

    def emit(self, record: logging.LogRecord) -> None:
        name, text = threading.current_thread().name, record.getMessage()
        self.lines.append((name, text))
        self.on_line(name, text)


class Scene:
    """Two backbones of 1.5 CPU on a cluster of 2, what they log, and the order in which they end."""

    def __init__(self, out: Path, epochs: int) -> None:
        self.stop = StopRequest()
        self.log = Lines()
        self.ended: list[str] = []
        self.on_end: Callable[[BackboneRun], None] = lambda backbone: None
        source = image_folder(out / "images", "{number}.png", 40)
        entry = {"name": "vit_tiny_patch16_224", "model_args": MODEL_ARGS, "blocks": 2}
        tiny = f"""--data.source {source} --data.batch_size 8 --data.workers 0 --schedule.epochs {epochs}
            --schedule.warmup_epochs 0 --decoder.dim 32 --decoder.num_heads 1 --evaluation.latency false
            --placement.stages 1 --placement.cpus_per_stage 1.5 --placement.threads_per_stage 1
            --out {out / "run"}"""
        backbones = json.dumps([entry | {"alias": name} for name in ("a", "b")])
        settings = load_settings([*tiny.split(), "--backbones", backbones])
        tracker: Any = Sink()
        self.backbones: list[BackboneRun] = []
        for prepared in prepare(settings).backbones:
            prepared.run.out.mkdir(parents=True)
            layouts = single_layouts(prepared, ClusterResources(2, 0))
            self.backbones.append(BackboneRun(prepared, layouts, "fp32", collect(), tracker, prepared.name))

    def record(self, backbone: BackboneRun) -> None:
        assert threading.current_thread() is threading.main_thread()
        if backbone.name not in self.ended:
            self.ended.append(backbone.name)
            self.on_end(backbone)

    def run(self) -> tuple[BackboneRun, BackboneRun]:
        """Both to their end. Returns (the one that was first, the one that waited)."""
        with attached(self.log):
            train_backbones(self.backbones, self.stop, self.record)
        (waiter,) = {name for name, text in self.log.lines if text.startswith(WAITS)}
        first, second = sorted(self.backbones, key=lambda backbone: backbone.name == waiter)
        return first, second

    def when(self, name: str, begins: str) -> int:
        """Of all lines, the number of the first one of that backbone that begins so."""
        return next(
            i for i, (who, text) in enumerate(self.log.lines) if who == name and text.startswith(begins)
        )


@contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("bim")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait is logged soon, and would soon be given up if the time in which another one holds resources counted."""
    monkeypatch.setattr(concurrent, "LOG_WAIT_AFTER_S", 0.5)
    monkeypatch.setattr(concurrent, "placement_timeout_s", lambda settings: 5.0)


def resources_are_free() -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        groups = placement_group_table().values()
        free = ray.available_resources().get("CPU", 0.0)
        if all(group["state"] == "REMOVED" for group in groups) and free == 2.0:
            return True
        time.sleep(0.1)
    return False


def test_the_second_starts_when_the_first_has_released_its_resources_and_both_finish(tmp_path: Path) -> None:
    scene = Scene(tmp_path, epochs=2)
    first, second = scene.run()
    assert [first.failed, second.failed] == [None, None]
    assert scene.ended == [first.name, second.name]
    assert [text for _, text in scene.log.lines if text.startswith(WAITS)] == [f"{WAITS}{first.name})"]
    assert scene.when(second.name, WAITS) < scene.when(first.name, "measuring")
    assert scene.when(first.name, "RankMe by depth") < scene.when(second.name, "epoch 1/2")
    for backbone in (first, second):
        assert backbone.evaluated
        (evaluation,) = backbone.evaluations
        assert [report.depth for report in evaluation.reports] == [2, 4]
        assert all(Path(folder).is_dir() for folder in evaluation.folders.values())
    assert resources_are_free()


def test_a_stop_request_ends_at_once_what_waits_for_resources_and_the_first_with_a_checkpoint(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path, epochs=500)
    times: dict[str, float] = {}

    def on_line(name: str, text: str) -> None:
        if text.startswith(WAITS):
            times["wait"] = time.monotonic()
        # A line of the first one, which has trained by then and so has something to save.
        elif "wait" in times and "stop" not in times and text.startswith("epoch"):
            times["stop"] = time.monotonic()
            scene.stop.reason = "SIGINT"

    def on_end(backbone: BackboneRun) -> None:
        times[backbone.name] = time.monotonic()

    scene.log.on_line, scene.on_end = on_line, on_end
    first, second = scene.run()
    assert sorted(scene.ended) == ["a", "b"]
    assert times[second.name] - times["stop"] < 5
    assert [first.failed, second.failed] == [None, None]
    assert [first.evaluations, second.evaluations] == [[], []]
    (wait,) = [text for name, text in scene.log.lines if name == second.name]
    assert wait.startswith(WAITS)
    assert CheckpointStore(second.out).latest() is None
    assert CheckpointStore(first.out).latest() is not None
    assert resources_are_free()
