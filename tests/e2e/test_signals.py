"""Signals in every phase of the whole command: what is printed, saved and left, the exit status, and MLflow's record."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from bim.orchestrator.training.checkpoint import CheckpointStore
from tests.e2e.command import (
    DEPTHS,
    LONG,
    TINY,
    Finished,
    arguments,
    call,
    differing,
    main_job,
    read_until,
    started,
)
from tests.e2e.test_main_job import child_runs, parent_run

ON_RAY = {"placement.backend": "ray", "placement.stages": "2"}

EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGQUIT": 131, "SIGUSR2": 75}


def signals_after(out: Path, text: str, numbers: Sequence[signal.Signals]) -> threading.Thread:
    """A thread that signals this process, one signal after the other, once a line of the run has the text."""

    def watch() -> None:
        events, end = out / "events.log", time.monotonic() + 120
        while time.monotonic() < end:
            if events.exists() and text in events.read_text(encoding="utf-8"):
                for number in numbers:
                    os.kill(os.getpid(), number)
                    while "checkpoint saved" not in events.read_text(encoding="utf-8"):
                        time.sleep(0.01)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def left_over(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def no_depth_is_running(store: str, out: Path) -> int:
    """The number of depths that the store knows."""
    runs = child_runs(store, parent_run(store, out))
    assert {run.info.status for run in runs} <= {"KILLED", "FINISHED"}
    return len(runs)


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on_and_sigusr2_saves_and_asks_to_be_resumed(
    tmp_path: Path, unbroken: Finished, unlabeled: Path, store: str
) -> None:
    out = tmp_path / "run"
    rare = {"checkpoint__every_epochs": "60"}
    thread = signals_after(out, "epoch  3/60", [signal.SIGUSR1, signal.SIGUSR2])
    stopped = main_job(out, unlabeled, store, **rare)
    thread.join()
    assert stopped.status == 75
    said = stopped.stdout.splitlines()
    assert "SIGUSR1: saving a checkpoint after the step under way; the training goes on" in said
    saved = [
        int(step) for step in re.findall(r"^checkpoint saved after step (\d+) of 300$", stopped.stdout, re.M)
    ]
    assert len(saved) == 2
    assert 15 <= saved[0] < saved[1] < 300
    assert re.fullmatch(
        r"stopped by SIGUSR2 to be resumed; resume me: python \S+ --out \S+ --resume", said[-1]
    )
    assert parent_run(store, out).info.status == "KILLED"
    assert no_depth_is_running(store, out) == len(DEPTHS)
    latest = CheckpointStore(out).latest()
    assert latest is not None
    assert latest.step == saved[1]
    assert not left_over(out)

    resumed = call(["--out", str(out), *arguments({"tracking.uri": store}), "--resume"])
    assert resumed.status == 0, resumed.stderr
    assert differing(unbroken.out, out) == []


@pytest.mark.parametrize("seconds", [0.4, 1.2, 2.5])
def test_a_signal_while_libraries_are_imported_ends_the_command_at_once(
    tmp_path: Path, seconds: float
) -> None:
    with started(arguments(TINY, {"out": "run"}), tmp_path) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        stdout, stderr = process.communicate()
    assert time.monotonic() - start < 5
    assert process.returncode in (143, -15)  # -15: before Python has run a line of the command
    assert stderr == ""
    assert process.returncode == -15 or stdout.splitlines()[-1].startswith("stopped by SIGTERM")
    assert not (tmp_path / "run").exists()


PHASES: dict[str, tuple[dict[str, str], Callable[[str], bool]]] = {
    "training": ({}, lambda line: line.startswith("epoch  2/")),
    "measuring": ({"schedule.epochs": "1"}, lambda line: line.startswith("measuring and exporting")),
    "on Ray, starting": (ON_RAY, lambda line: line.startswith("output: ")),
    "on Ray, training": (ON_RAY, lambda line: line.startswith("epoch  2/")),
    "on Ray, measuring": (ON_RAY | {"schedule.epochs": "1"}, lambda line: line.startswith("measuring and")),
    "search": (ON_RAY | {"search.trials": "2"}, lambda line: "trial 0" in line),
    "waiting for room": (
        ON_RAY | {"placement.gpus_per_stage": "1", "placement.wait_s": "300", "optim.precision": "fp32"},
        lambda line: line.startswith("output: "),
    ),
}

CASES = [
    *(("training", name) for name in EXIT_STATUS),
    ("measuring", "SIGTERM"),
    ("on Ray, starting", "SIGHUP"),
    ("on Ray, training", "SIGHUP"),
    ("on Ray, measuring", "SIGTERM"),
    ("search", "SIGTERM"),
    ("waiting for room", "SIGQUIT"),
]


@pytest.mark.nightly
@pytest.mark.parametrize(("phase", "name"), CASES)
def test_a_signal_to_the_whole_group_ends_any_phase_in_order_and_leaves_nothing(
    tmp_path: Path, unlabeled: Path, phase: str, name: str
) -> None:
    changes, begun = PHASES[phase]
    where = {"out": "run", "data.source": str(unlabeled)}
    with started(arguments(TINY, LONG, where, changes), tmp_path) as process:
        lines = read_until(process, begun)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.Signals[name])
        start = time.monotonic()
        stdout, stderr = process.communicate()
        seconds = time.monotonic() - start
    assert process.returncode == EXIT_STATUS[name], "".join(lines) + stdout + stderr
    assert seconds < 30
    assert "Traceback" not in stdout + stderr
    assert stdout.splitlines()[-1].startswith(f"stopped by {name}")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert parent_run(store, tmp_path / "run").info.status == "KILLED"
    no_depth_is_running(store, tmp_path / "run")
    psutil.wait_procs(family, timeout=5)
    left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []
    assert not left_over(tmp_path / "run")


@pytest.mark.nightly
@pytest.mark.parametrize("phase", ["on Ray, starting", "on Ray, training", "on Ray, measuring"])
def test_a_second_signal_ends_the_command_within_three_seconds(
    tmp_path: Path, unlabeled: Path, phase: str
) -> None:
    changes, begun = PHASES[phase]
    where = {"out": "run", "data.source": str(unlabeled)}
    with started(arguments(TINY, LONG, where, changes), tmp_path) as process:
        read_until(process, begun)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        process.communicate()
        assert time.monotonic() - start < 3
    assert process.returncode == 143
    psutil.wait_procs(family, timeout=5)
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert parent_run(store, tmp_path / "run").info.status == "KILLED"
    no_depth_is_running(store, tmp_path / "run")
