"""The benchmark that kills processes: its plan, how it compares and what it reports. Kills themselves are in tests/e2e."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bim.orchestrator.benchmarks.fault_job import (
    CHECKPOINT_STEPS,
    STEPS,
    Outcome,
    _is_comparable,
    command,
    write_images,
)
from bim.orchestrator.benchmarks.fault_plan import KILLS_PER_RUN, KINDS, LIVE_WHILE_MEASURING, Kill, plan
from bim.orchestrator.benchmarks.fault_processes import (
    DATA_WORKER,
    LOADER,
    STAGE,
    TOKEN,
    ProcessTree,
    Remains,
    victims,
)
from bim.orchestrator.benchmarks.fault_run import FaultRun, Strike
from bim.orchestrator.benchmarks.faults import Report, repeated, table
from bim.orchestrator.benchmarks.mlflow_server import MlflowServer
from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.runs.resolve import data_spec, resolve
from bim.orchestrator.training.meter import LOGS_PER_EPOCH


def test_a_plan_has_as_many_kills_of_each_kind_half_of_them_in_commits_and_half_on_a_cluster() -> None:
    kills = [kill for run in plan(96, 0, KINDS) for kill in run]
    assert Counter(kill.kind for kill in kills) == dict.fromkeys(KINDS, 16)
    for kind in KINDS:
        of_kind = Counter((kill.moment == "commit", kill.on_cluster) for kill in kills if kill.kind == kind)
        if kind == "raylet":  # of a cluster in any case
            assert of_kind == {(False, True): 8, (True, True): 8}
        else:
            assert of_kind == dict.fromkeys(((a, b) for a in (False, True) for b in (False, True)), 4)


@pytest.mark.parametrize("kinds", [("stage",), ("stage", "loader", "driver")])
def test_a_plan_of_some_kinds_has_half_of_each_in_commits(kinds: tuple[str, ...]) -> None:
    kills = [kill for run in plan(10 * len(kinds), 0, kinds) for kill in run]
    assert Counter(kill.kind for kill in kills if kill.moment == "commit") == dict.fromkeys(kinds, 5)


def test_ten_kills_are_of_all_kinds_at_both_places_in_two_runs() -> None:
    runs = plan(10, 0, KINDS)
    assert [len(run) for run in runs] == [5, 5]
    assert {run[0].on_cluster for run in runs} == {True, False}
    assert {kill.kind for run in runs for kill in run} == set(KINDS)


@pytest.mark.parametrize("seed", range(20))
def test_the_kills_of_a_run_are_at_one_place_and_in_order(seed: int) -> None:
    for run in plan(100, seed, KINDS):
        assert 1 <= len(run) <= KILLS_PER_RUN
        assert len({kill.on_cluster for kill in run}) == 1
        steps = [kill.step for kill in run]
        assert steps == sorted(steps)
        assert {kill.moment for kill in run[1:]} <= {
            "step",
            "commit",
            "measuring",
        }  # at the start: one at most
        late = [kill for kill in run if kill.moment == "measuring"]
        assert late in ([], [run[-1]])
        assert all(kill.kind in LIVE_WHILE_MEASURING for kill in late)
        assert all(kill.step < STEPS - CHECKPOINT_STEPS for kill in run if kill not in late)


def test_kills_that_came_too_late_are_repeated_earlier_at_their_place() -> None:
    missed = [
        Kill("stage", "step", 200),
        Kill("loader", "commit", 100, on_cluster=True),
        Kill("stage", "commit", 90),
    ]
    assert repeated(missed) == [
        (Kill("stage", "commit", 45), Kill("stage", "step", 100)),
        (Kill("loader", "commit", 50, on_cluster=True),),
    ]
    assert repeated([]) == []


def test_a_plan_is_a_function_of_its_seed() -> None:
    assert plan(10, 3, KINDS) == plan(10, 3, KINDS)
    assert plan(10, 3, KINDS) != plan(10, 4, KINDS)


@pytest.mark.parametrize("has_labels", [True, False])
def test_no_mean_of_the_job_spans_a_checkpoint_and_its_steps_are_counted(
    tmp_path: Path, has_labels: bool
) -> None:
    # A mean of several steps would depend on where a run was interrupted.
    images = None if has_labels else tmp_path / "images"
    if images is not None:
        write_images(images)
    settings = load_settings(command(tmp_path / "run", "sqlite:///x.db", "a", False, images)[3:])
    _, backbone = resolve(settings)
    (phase,) = data_spec(settings, backbone).train_batches().phases
    assert phase.steps_per_epoch < 2 * LOGS_PER_EPOCH
    assert round(settings.checkpoint.every_epochs * phase.steps_per_epoch) == CHECKPOINT_STEPS
    assert settings.schedule.epochs * phase.steps_per_epoch == STEPS


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
        ("models/depth01", True),
    ],
)
def test_what_depends_on_time_and_place_is_not_compared(key: str, is_compared: bool) -> None:
    assert _is_comparable(key) is is_compared


def strike(kind: str = "driver", driver: int = 0, recovered_s: float | None = 8.25) -> Strike:
    return Strike(Kill(kind, "step", 50), "71 python", 57, 0.0, driver, recovered_s)


def report(**values: object) -> Report:
    made = Report(Path("work/run-007"), False, [strike()], statuses=[-9, 0], seconds=61.5)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_a_good_report_is_a_line_and_one_for_every_kill() -> None:
    made = report(strikes=[strike("stage"), strike(recovered_s=None)])
    assert made.is_good
    first, *lines = [line.split() for line in str(made).splitlines()]
    assert first == ["run-007,", "local", "Ray:", "62", "s,", "exit", "-9", "then", "0"]
    assert lines == [
        ["stage", "step", "step", "57", "8.2", "s", "71", "python"],
        ["driver", "step", "step", "57", "71", "python"],
    ]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"differing": list("abcdefg")}, "DIFFERS in a, b, c, d, e and 2 more"),
        ({"left_behind": ["process 7 x"]}, "LEFT BEHIND process 7 x"),
        ({"error": "hangs"}, "hangs"),
    ],
)
def test_a_bad_report_says_what_is_wrong(values: dict[str, object], line: str) -> None:
    made = report(**values)
    assert not made.is_good
    assert line in str(made)
    assert "see work/run-007" in str(made)


def test_a_run_was_resumed_for_the_last_kill_of_its_driver() -> None:
    strikes = [strike("stage"), strike(), strike("loader", driver=1)]
    made = report(strikes=strikes)
    assert [made.ended_driver(each) for each in strikes] == [False, True, False]


def test_the_table_has_a_row_per_kind() -> None:
    reports = [
        report(),
        report(strikes=[strike(recovered_s=4.25), strike("stage", driver=1)], on_cluster=True),
        report(differing=["a"], statuses=[0], strikes=[strike(recovered_s=100.0)]),
    ]
    head, stage, driver = table(reports).splitlines()
    assert head.split("  ")[-1].strip() == "median s to the next checkpoint"
    assert stage.split() == ["stage", "1", "0", "1", "0", "1", "0", "8.2"]
    assert driver.split() == ["driver", "3", "0", "1", "2", "2", "0", "8.2"]


class ProgressOfARun:
    """A run whose files are written by hand."""

    def __init__(self, folder: Path, *kills: Kill) -> None:
        self.run = FaultRun(MlflowServer(folder / "mlflow"), None, folder, folder / "images", kills)
        self._output = folder / "output.txt"
        self._output.touch()
        self.run.out.mkdir()

    def reach(self, step: int) -> None:
        line = json.dumps({"step": step, "block0/loss": 1.0})
        with (self.run.out / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")

    def begin_checkpoint(self, step: int) -> Path:
        folder = self.run.out / "checkpoints" / f"step-{step:08d}-4f1b"
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int) -> None:
        (self.begin_checkpoint(step) / "manifest.json").touch()

    def measure(self) -> None:
        self._output.write_text("measuring and exporting depths 1, 2\n")
        self.run._note_progress(0.0)

    def is_due(self, kill: Kill) -> bool:
        return self.run._is_due(kill, first_seen=0.0)


def test_a_kill_comes_at_its_step_but_not_before_the_run_has_recovered_from_the_last_one(
    tmp_path: Path,
) -> None:
    progress, kill = ProgressOfARun(tmp_path), Kill("stage", "step", 30)
    assert not progress.is_due(kill)
    progress.reach(29)
    assert not progress.is_due(kill)
    progress.reach(30)
    assert progress.is_due(kill)
    progress.run.strikes.append(Strike(Kill("loader", "step", 30), "71 python", 37, 0.0, 0))
    progress.reach(45)
    progress.commit(40)  # step 41 may have been in flight
    assert not progress.is_due(kill)
    progress.commit(50)
    assert progress.is_due(kill)
    progress.run._note_progress(4.5)
    assert progress.run.strikes[0].recovered_s == 4.5


def test_a_kill_in_a_commit_comes_while_the_newest_checkpoint_has_no_manifest(tmp_path: Path) -> None:
    progress, kill = ProgressOfARun(tmp_path), Kill("stage", "commit", 20)
    progress.begin_checkpoint(10)
    assert not progress.is_due(kill)
    progress.commit(30)
    progress.begin_checkpoint(20)  # of a process that was killed
    assert not progress.is_due(kill)
    progress.begin_checkpoint(40)
    assert progress.is_due(kill)


def test_what_was_not_killed_in_the_training_is_missed_but_for_what_lives_on(tmp_path: Path) -> None:
    driver, server = Kill("driver", "step", 200), Kill("mlflow-server", "measuring", STEPS)
    late = [Kill("stage", "step", 190), Kill("driver", "commit", 195)]
    progress = ProgressOfARun(tmp_path, *late, driver, server)
    assert not progress.is_due(server)
    progress.measure()
    assert progress.run.missed == late
    assert progress.is_due(driver)
    assert progress.is_due(server)
    progress.run.close()
    assert progress.run.missed == [*late, driver, server]


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
