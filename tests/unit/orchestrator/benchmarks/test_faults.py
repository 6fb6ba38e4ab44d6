"""The benchmark that kills processes: its plan, how it compares and what it reports. Kills themselves are in tests/e2e."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bim.orchestrator.benchmarks.fault_job import COMMITS, JOB, Outcome, _is_comparable, command
from bim.orchestrator.benchmarks.fault_processes import (
    DATA_WORKER,
    LOADER,
    STAGE,
    TOKEN,
    ProcessTree,
    Remains,
    victims,
)
from bim.orchestrator.benchmarks.fault_run import KINDS, Kill
from bim.orchestrator.benchmarks.faults import Report, plan, table
from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.runs.resolve import data_spec, resolve
from bim.orchestrator.training.meter import LOGS_PER_EPOCH


def test_a_plan_has_as_many_kills_of_each_kind_half_of_them_in_commits() -> None:
    kills = plan(120, 0, KINDS)
    assert Counter(kill.kind for kill in kills) == dict.fromkeys(KINDS, 20)
    for kind in KINDS:
        assert sum(kill.fraction is None for kill in kills if kill.kind == kind) == 10
    assert all(kill.on_cluster for kill in kills if kill.kind == "raylet")
    assert {kill.on_cluster for kill in kills if kill.kind == "driver"} == {True, False}


def test_a_plan_is_a_function_of_its_seed() -> None:
    assert plan(10, 3, KINDS) == plan(10, 3, KINDS)
    assert plan(10, 3, KINDS) != plan(10, 4, KINDS)


def test_no_mean_of_the_job_spans_a_checkpoint_and_its_checkpoints_are_counted() -> None:
    # A mean of several steps would depend on where a run was interrupted.
    argv = [word for key, value in JOB.items() for word in (f"--{key}", value)]
    settings = load_settings(argv)
    _, backbone = resolve(settings)
    (phase,) = data_spec(settings, backbone).train_batches().phases
    assert phase.steps_per_epoch < 2 * LOGS_PER_EPOCH
    every = round(settings.checkpoint.every_epochs * phase.steps_per_epoch)
    assert -(-settings.schedule.epochs * phase.steps_per_epoch // every) == COMMITS


def test_a_run_is_resumed_with_the_settings_it_was_started_with(tmp_path: Path) -> None:
    started, resumed = (command(tmp_path, "sqlite:///x.db", "a", resume) for resume in (False, True))
    assert resumed == [*started, "--resume"]


def test_outcomes_differ_in_what_one_of_them_lacks() -> None:
    whole = Outcome({"checkpoint/step": 114, "mlflow/run/status": "FINISHED"})
    assert whole.differing(whole) == []
    assert whole.differing(Outcome({"checkpoint/step": 114})) == ["mlflow/run/status"]
    assert Outcome({}).differing(whole) == ["checkpoint/step", "mlflow/run/status"]


@pytest.mark.parametrize(
    ("key", "is_compared"),
    [
        ("run/metrics/block0/loss", True),
        ("run/metrics/stage0/busy_share", False),
        ("run/metrics/images_per_s", False),
        ("run/params/mask.ratio", True),
        ("run/params/placement.stages", False),
        ("run/artifacts/summary.csv", True),
        ("run/artifacts/events.log", False),
        ("run/status", True),
        ("models/run-depth01", True),
    ],
)
def test_what_depends_on_time_and_place_is_not_compared(key: str, is_compared: bool) -> None:
    assert _is_comparable(key) is is_compared


def report(**values: object) -> Report:
    made = Report(
        Kill("driver", 0.25), Path("work/run-007"), victim="71 python", statuses=[-9, 0], lost_s=8.25
    )
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_a_good_report_is_one_line() -> None:
    made = report()
    assert made.is_good
    assert str(made).split() == [
        "driver",
        "local",
        "at",
        "25",
        "%",
        "exit",
        "-9",
        "then",
        "0",
        "+8.2",
        "s",
        "71",
        "python",
    ]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"differing": list("abcdefg")}, "DIFFERS in a, b, c, d, e and 2 more"),
        ({"left_behind": ["process 7 x"]}, "LEFT BEHIND process 7 x"),
        ({"error": "hangs"}, "hangs"),
        ({"victim": ""}, "NOT KILLED"),
    ],
)
def test_a_bad_report_says_what_is_wrong(values: dict[str, object], line: str) -> None:
    made = report(**values)
    assert not made.is_good
    assert line in str(made)


def test_the_table_has_a_row_per_kind() -> None:
    reports = [report(), report(lost_s=4.25), report(differing=["a"], statuses=[0], lost_s=100.0)]
    head, row = table(reports).splitlines()
    assert head.split("  ")[-1].strip() == "median s lost"
    assert row.split() == ["driver", "3", "1", "2", "2", "0", "8.2"]


def sleeping(title: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()", title], stdin=subprocess.PIPE, env=environment)


def test_what_outlives_a_run_is_named_until_it_is_gone(tmp_path: Path) -> None:
    remains = Remains("4f1b", tmp_path, list)
    assert remains.wait_for_processes(0.0) == []
    process = sleeping("worker", {TOKEN: "4f1b"})
    try:
        (line,) = remains.wait_for_processes(0.0)
        assert str(process.pid) in line
        remains.kill_processes()
        assert process.wait(10) == -9
        assert remains.wait_for_processes(0.0) == []
    finally:
        process.kill()


def test_temporary_files_and_a_lease_are_left_behind(tmp_path: Path) -> None:
    remains = Remains("4f1b", tmp_path, list)
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/.block-0.safetensors.71.tmp", "lease.json", "settings.yaml"):
        (tmp_path / name).touch()
    assert sorted(Path(name).name for name in remains.files()) == [
        ".block-0.safetensors.71.tmp",
        "lease.json",
    ]


class HandMadeTree(ProcessTree):
    """Processes by the number of their parent."""

    def __init__(self, children: dict[int, list[FakeProcess]]) -> None:
        self._children = children  # type: ignore[assignment]


class FakeProcess:
    def __init__(self, pid: int, title: str) -> None:
        self.pid, self._title = pid, title

    def cmdline(self) -> list[str]:
        return self._title.split()


def test_victims_are_found_by_their_titles_below_the_driver_and_the_nodes() -> None:
    tree = HandMadeTree(
        {
            1: [FakeProcess(2, "raylet"), FakeProcess(3, "gcs_server")],
            2: [
                FakeProcess(4, f"{STAGE}.train_step"),
                FakeProcess(5, f"{LOADER}"),
                FakeProcess(6, "ray::IDLE"),
            ],
            5: [FakeProcess(7, f"python -c from {DATA_WORKER}")],
            8: [FakeProcess(9, STAGE)],
        }
    )
    assert {process.pid for process in victims("stage", tree, 1, [8])} == {4, 9}
    assert [process.pid for process in victims("loader", tree, 1, [])] == [5]
    assert [process.pid for process in victims("data-worker", tree, 1, [])] == [7]
