"""Training on real Ray actors: the same weights as in one process, whatever is killed on the way."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.distributed.placement import consecutive
from bim.orchestrator.distributed.ray_stage_group import RayStages
from bim.orchestrator.distributed.stage_actor import StageActor
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import NonFiniteLossError, TrainingError
from bim.orchestrator.training.messages import StepRequest
from bim.orchestrator.training.stage_group import InProcessStages
from bim.orchestrator.training.transport import Payload
from bim.orchestrator.training.watchdog import Watchdog, WatchdogLimits
from tests.integration.tiny import (
    AtStep,
    data,
    differing,
    growing,
    in_process,
    layout,
    state,
    tiny_spec,
    train,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")


def ray_stages(out: Path, stages: int = 2) -> RayStages:
    """Two blocks a stage, while the oracles have one: where the blocks are placed does not change the weights."""
    out.mkdir(parents=True, exist_ok=True)
    return RayStages(tiny_spec(), data(), layout(stages), shared=out)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 200 steps in this process, with checkpoints at 50 and at the end: the oracle."""
    out = tmp_path_factory.mktemp("unbroken")
    train(in_process(), out, steps=200, every=50, keep=10)
    return out


@pytest.fixture(scope="module")
def unbroken_50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 50 steps in this process."""
    out = tmp_path_factory.mktemp("unbroken-50")
    train(in_process(), out, steps=50)
    return out


def test_ray_and_in_process_stages_give_bitwise_equal_weights_after_50_steps(
    tmp_path: Path, unbroken_50: Path
) -> None:
    stages = ray_stages(tmp_path, stages=4)
    try:
        train(stages, tmp_path, steps=50)
    finally:
        stages.close()
    assert differing(state(unbroken_50, 50), state(tmp_path, 50)) == []


@pytest.mark.slow
def test_a_run_stopped_by_request_on_ray_resumes_to_the_same_weights(tmp_path: Path, unbroken: Path) -> None:
    stop = StopRequest()

    def at_step(step: int) -> None:
        if step == 63:
            stop.reason = "SIGTERM"

    for request in (stop, StopRequest()):
        stages = ray_stages(tmp_path)
        try:
            result = train(stages, tmp_path, steps=200, every=50, callback=AtStep(at_step), stop=request)
        finally:
            stages.close()
        if request is stop:
            assert result.stopped == "SIGTERM"
            assert 63 <= result.step < 100
    assert differing(state(unbroken, 200), state(tmp_path, 200)) == []


@pytest.mark.nightly  # three kills a run are among those of the slow tests of tests/e2e/test_kills.py
def test_kills_at_random_steps_and_in_a_save_leave_the_weights_unchanged(
    tmp_path: Path, unbroken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stages and the loader are killed (-9) at random steps, one of them while a checkpoint is being written."""
    chance, count = random.Random(7), 20
    at = sorted(chance.sample([s for s in range(3, 199) if not 97 <= s <= 101], count - 1))
    stages = ray_stages(tmp_path, stages=4)
    killed: list[str] = []
    ready = [0]

    def kill(occasion: str) -> None:
        pid = chance.choice(stages.pids())
        os.kill(pid, signal.SIGKILL)
        killed.append(occasion)

    def at_step(step: int) -> None:
        # One kill at a time: the next one waits until the stage group is restored.
        restarts = sum("restart" in text for text in caplog.messages)
        if at and step >= at[0] and restarts >= ready[0]:
            ready[0] = restarts + 1
            kill(f"step {at.pop(0)}")

    done = threading.Event()

    def kill_in_a_save() -> None:
        half = tmp_path / "checkpoints" / "step-00000100"
        while not done.is_set():
            written = list(half.glob("*block-*")) if half.exists() else []
            if written and not (half / "manifest.json").exists():
                kill("save")
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=kill_in_a_save)
    watcher.start()
    try:
        result = train(stages, tmp_path, steps=200, every=10, callback=AtStep(at_step), max_restarts=40)
    finally:
        done.set()
        watcher.join()
        stages.close()
    assert len(killed) == count
    assert "save" in killed
    # The kill in a save can fall into the rewind after another one; each restart is one line of the log.
    assert result.restarts in (count - 1, count)
    assert sum("died" in text and "restart" in text for text in caplog.messages) == result.restarts
    assert differing(state(unbroken, 200), state(tmp_path, 200)) == []


@pytest.mark.slow
def test_a_killed_data_worker_costs_one_rewind(
    tmp_path: Path, unbroken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = RayStages(tiny_spec(), data(workers=1), layout(2), shared=tmp_path)
    killed: list[int] = []

    def at_step(step: int) -> None:
        if step == 60 and not killed:
            loader = psutil.Process(stages.pids()[0])
            killed.extend(child.pid for child in loader.children())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    try:
        result = train(stages, tmp_path, steps=200, every=50, callback=AtStep(at_step), max_restarts=1)
    finally:
        stages.close()
    assert killed
    assert result.restarts == 1
    assert any("the data loader failed" in text and "SIGKILL" in text for text in caplog.messages)
    assert differing(state(unbroken, 200), state(tmp_path, 200)) == []


@pytest.mark.slow
def test_data_that_cannot_be_opened_ends_the_run_before_any_step_and_without_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = RayStages(tiny_spec(), data(source=str(tmp_path / "gone")), layout(1), shared=tmp_path)
    try:
        with pytest.raises(DataError, match="gone"):
            train(stages, tmp_path / "out", max_restarts=3)
    finally:
        stages.close()
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG] == []


@pytest.mark.slow
def test_a_stage_that_keeps_dying_ends_the_run_with_one_sentence(tmp_path: Path) -> None:
    stages = ray_stages(tmp_path)

    def at_step(step: int) -> None:
        if step >= 3:
            # Steps that were done before the kill still come in after it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(stages.pids()[2], signal.SIGKILL)

    try:
        with pytest.raises(TrainingError, match=r"stage 1 \(blocks 2-3\) died .*, after 1 restart without"):
            train(stages, tmp_path, callback=AtStep(at_step), max_restarts=1)
    finally:
        stages.close()


@pytest.mark.slow
def test_what_a_step_raises_in_an_actor_is_what_the_user_sees(tmp_path: Path) -> None:
    out = tmp_path
    stages = RayStages(tiny_spec(mean=(float("nan"),) * 3), data(), layout(2), shared=out)
    try:
        with pytest.raises(NonFiniteLossError, match="loss of block 0 is not finite at step 0"):
            train(stages, out, max_restarts=3)
    finally:
        stages.close()


class StickyStage(StageActor):
    """The device of blocks 2 and 3 breaks once, at step 30; from then on every call of that process fails."""

    broken = False
    is_second_process = False

    def train_step(self, request: StepRequest, images: Payload, incoming: Payload | None) -> Any:
        if self._blocks == (2, 3) and request.step == 30 and not self.is_second_process:
            self.broken = True
        self._raise_if_broken()
        return super().train_step(request, images, incoming)

    def restore(self, checkpoint: str | None, step: int) -> int:
        self._raise_if_broken()
        self.is_second_process = checkpoint is not None
        return super().restore(checkpoint, step)

    def _raise_if_broken(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class StickyStages(RayStages):
    stage_class = StickyStage


@pytest.mark.slow
def test_a_process_whose_device_is_broken_is_replaced_in_one_restart(
    tmp_path: Path, unbroken_50: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = StickyStages(tiny_spec(), data(), layout(2), shared=tmp_path)
    try:
        # With several marks before step 30 one of them is committed by then, however slow the disk is.
        result = train(stages, tmp_path, steps=50, every=8, max_restarts=1)
    finally:
        stages.close()
    assert result.restarts == 1
    assert any(
        "stage 1 (blocks 2-3) failed at step 30 (RuntimeError: CUDA error" in text for text in caplog.messages
    )
    assert differing(state(unbroken_50, 50), state(tmp_path, 50)) == []


@pytest.mark.slow
def test_a_stopped_process_is_killed_by_the_watchdog_and_costs_one_restart(
    tmp_path: Path, unbroken_50: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages, stopped = ray_stages(tmp_path), list[int]()

    def at_step(step: int) -> None:
        if step == 30 and not stopped:
            stopped.append(stages.pids()[2])
            os.kill(stopped[0], signal.SIGSTOP)

    watchdog = Watchdog(WatchdogLimits(least_s=15, unknown_s=300))
    try:
        result = train(
            stages, tmp_path, steps=50, every=25, callback=AtStep(at_step), max_restarts=1, watchdog=watchdog
        )
    finally:
        stages.close()
    assert result.restarts == 1
    assert any("stage 1 (blocks 2-3) died (hung)" in text for text in caplog.messages)
    assert not psutil.pid_exists(stopped[0])
    assert differing(state(unbroken_50, 50), state(tmp_path, 50)) == []


@pytest.mark.slow
def test_a_killed_process_is_told_with_its_signal_its_node_and_its_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="bim")
    stages, killed = ray_stages(tmp_path), list[int]()

    def at_step(step: int) -> None:
        if not killed:
            killed.append(stages.pids()[1])
            os.kill(killed[0], signal.SIGKILL)

    try:
        assert train(stages, tmp_path, steps=10, callback=AtStep(at_step), max_restarts=1).restarts == 1
    finally:
        stages.close()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(
        r"stage 0 \(blocks 0-1\) died at step \d+: .* signal 9 .*\(node [\d.]+ \(.+\)\), its log: /", line
    )
    story = next(record.getMessage() for record in caplog.records if record.levelname == "DEBUG")
    assert "Worker exit type: SYSTEM_ERROR" in story
    assert f"process {killed[0]} on node" in story


@pytest.mark.slow
def test_growing_resolution_and_thrown_tokens_give_bitwise_equal_weights_on_ray(tmp_path: Path) -> None:
    spec, images, phases = growing()
    here = InProcessStages(spec, images.train_batches, consecutive(4, 4), threads=1)
    train(here, tmp_path / "here", steps=21, phases=phases)
    (tmp_path / "ray").mkdir()
    stages = RayStages(spec, images, layout(2), shared=tmp_path / "ray")
    try:
        train(stages, tmp_path / "ray", steps=21, phases=phases)
    finally:
        stages.close()
    assert differing(state(tmp_path / "here", 21), state(tmp_path / "ray", 21)) == []
