"""Kills (SIGKILL) of a tiny job's processes at random moments: every run must end equal to the unbroken one.

Serves `pipelines/benchmark.py faults`. A run takes several kills, one after the other, and recovers from each. Half of them
come at a random moment, half while a checkpoint is written.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bim.orchestrator.benchmarks.fault_job import Outcome, read_outcome, write_images
from bim.orchestrator.benchmarks.fault_plan import KINDS, Kill, plan
from bim.orchestrator.benchmarks.fault_processes import END_TIMEOUT_S, KILLED_TIMEOUT_S
from bim.orchestrator.benchmarks.fault_run import FaultRun, Strike
from bim.orchestrator.benchmarks.mlflow_server import MlflowServer
from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.distributed.nodes_on_one_machine import NodesOnOneMachine
from bim.orchestrator.tables import render

RESUMABLE = (1, 75)
"""Exit statuses after which `--resume` continues; so it does after a signal."""

MAX_RESUMES = 3
"""Beside those that the kills of drivers ask for."""

UNBROKEN_LIMIT_S, KILL_LIMIT_S = 900.0, 300.0
"""A run that takes longer, and so much longer for each of its kills, hangs."""

ATTEMPTS, EARLIER = 4, 0.5
"""A kill that comes too late for a run is repeated in another one so often, each time at so much of its step."""


@dataclass
class Report:
    """How a run ended.

    Args:
        on_cluster: whether it joined a cluster.
        strikes: the kills that were done.
        statuses: exit statuses of its drivers, the last one 0 if all is well.
        seconds: of all its drivers.
        differing: names of what is not as in the unbroken run.
        left_behind: what is there five seconds after its end.
        error: why there is nothing to compare.
        synced: whether `bim sync` had to send what the run could not deliver.
    """

    folder: Path
    on_cluster: bool
    strikes: list[Strike] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    seconds: float = 0.0
    differing: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    error: str = ""
    synced: bool = False

    @property
    def is_equal(self) -> bool:
        """Whether the run ended as the unbroken one did."""
        return not self.differing and not self.error

    @property
    def is_good(self) -> bool:
        """Whether the run ended equal, and nothing is left."""
        return self.is_equal and not self.left_behind

    def ended_driver(self, strike: Strike) -> bool:
        """Whether the driver process ended with the kill, so that the run was resumed."""
        last = (
            strike is self.strikes[-1] or self.strikes[self.strikes.index(strike) + 1].driver > strike.driver
        )
        return last and strike.driver < len(self.statuses) - 1

    def __str__(self) -> str:
        ends = " then ".join([*map(str, self.statuses), *["sync"] * self.synced])
        lines = [f"{self.folder.name}, {_place(self.on_cluster)}: {self.seconds:.0f} s, exit {ends}"]
        lines += map(_strike_line, self.strikes)
        problems = [self.error] if self.error else []
        if self.differing:
            more = f" and {len(self.differing) - 5} more" * (len(self.differing) > 5)
            problems.append(f"DIFFERS in {', '.join(self.differing[:5])}{more}")
        if self.left_behind:
            problems.append(f"LEFT BEHIND {', '.join(self.left_behind)}")
        if problems:
            problems.append(f"see {self.folder}")
        return "\n     ".join([*lines, *problems])


def _strike_line(strike: Strike) -> str:
    seconds = "" if strike.recovered_s is None else f"{strike.recovered_s:.1f} s"
    kill = strike.kill
    return f"{kill.kind:<13}  {kill.moment:<9}  step {strike.step:3d}  {seconds:>7}  {strike.victim}"


def _place(on_cluster: bool) -> str:
    return "cluster" if on_cluster else "local Ray"


class FaultBench:
    """Runs of the job, unbroken and with kills, below a folder. A context manager: the services end with it.

    Args:
        report_line: called with a line of text for a person.
    """

    def __init__(self, folder: Path, report_line: Callable[[str], None] = print) -> None:
        self._folder, self._report_line = folder.resolve(), report_line
        self._server = MlflowServer(self._folder / "mlflow")
        self._images = self._folder / "images"
        self._cluster: NodesOnOneMachine | None = None
        self._unbroken: Outcome | None = None
        self._count = 0

    def __enter__(self) -> FaultBench:
        # Inherited by all nodes and drivers. Many processes share the cores of a small machine, on which Ray's workers
        # would yield to every other process.
        environment = {
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
        }
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        self._server.start()
        write_images(self._images)
        self._server.wait_until_it_answers()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cluster is not None:
            self._cluster.close()
        self._server.kill()

    def run(self, kills: Sequence[Kill]) -> tuple[Report, list[Kill]]:
        """A run with kills, all at one place, to its end, resumed if it has to be.

        Returns:
            How it ended, and the kills for which it was over too early.

        Raises:
            RuntimeError: the unbroken run failed.
        """
        if self._unbroken is None:
            report, _ = self._run((), on_cluster=False)
            if not report.is_good or report.statuses != [0]:
                raise RuntimeError(f"the unbroken run failed\n{report}")
            self._report_line(str(report))
            self._unbroken = self._outcome(report.folder)
        report, missed = self._run(kills, kills[0].on_cluster)
        if not report.error:
            try:
                report.differing = self._unbroken.differing(self._outcome(report.folder))
            except (OSError, ValueError) as error:
                report.error = str(error)
        return report, missed

    def _outcome(self, folder: Path) -> Outcome:
        return read_outcome(folder / "run", self._server.uri, folder.name)

    def _run(self, kills: Sequence[Kill], on_cluster: bool) -> tuple[Report, list[Kill]]:
        cluster = self._complete_cluster() if on_cluster else None
        folder = self._folder / f"run-{self._count:03d}"
        self._count += 1
        folder.mkdir()
        run = FaultRun(self._server, cluster, folder, self._images, kills)
        report = Report(folder, on_cluster, run.strikes)
        deadline = time.monotonic() + UNBROKEN_LIMIT_S + KILL_LIMIT_S * len(kills)
        try:
            _drive(run, report, deadline)
        finally:
            run.remains.kill_processes()
        run.ensure_server()
        run.close()
        report.left_behind += run.remains.files()
        if cluster is not None:
            report.left_behind += cluster.placement_groups()
        return report, run.missed

    def _complete_cluster(self) -> NodesOnOneMachine:
        if self._cluster is None:
            self._cluster = NodesOnOneMachine()
        self._cluster.complete()
        return self._cluster


def _drive(run: FaultRun, report: Report, deadline: float) -> None:
    """Run the job, kill, and resume until it has ended well, or cannot."""
    leave_s, killed_at = END_TIMEOUT_S, 0.0
    while True:
        was_begun = (run.out / SAVED_SETTINGS).exists()
        started = time.monotonic()
        status = run.drive(was_begun, deadline)
        report.seconds += time.monotonic() - started
        if status is None:
            report.error = "hangs"
            return
        report.statuses.append(status)
        # After a kill the next driver starts while Ray's processes notice the end of this one.
        if status == -signal.SIGKILL:
            leave_s, killed_at = KILLED_TIMEOUT_S, time.monotonic()
        else:
            left_s = leave_s - (time.monotonic() - killed_at)
            report.left_behind += run.remains.wait_for_processes(max(END_TIMEOUT_S, left_s))
        if status == 0:
            report.synced = run.sync_if_asked()
            return
        # Where nothing is there to be resumed, the job is started once more.
        goes_on = status < 0 or status in RESUMABLE or not (run.out / SAVED_SETTINGS).exists()
        drivers_killed = sum(strike.kill.kind == "driver" for strike in run.strikes)
        if not goes_on or len(report.statuses) > MAX_RESUMES + drivers_killed:
            report.error = f"exit status {status}"
            return
        run.ensure_server()


def table(reports: Sequence[Report]) -> str:
    """A row per kind: its kills, how the runs with them ended, and the median of the seconds to a later checkpoint."""
    rows = []
    for kind in KINDS:
        group = [(report, strike) for report, strike in _strikes(reports) if strike.kill.kind == kind]
        if not group:
            continue
        seconds = [strike.recovered_s for _, strike in group if strike.recovered_s is not None]
        rows.append(
            {
                "killed": kind,
                "kills": str(len(group)),
                "in a commit": str(sum(strike.kill.moment == "commit" for _, strike in group)),
                "on a cluster": str(sum(report.on_cluster for report, _ in group)),
                "needed --resume": str(sum(report.ended_driver(strike) for report, strike in group)),
                "equal": str(sum(report.is_equal for report, _ in group)),
                "left behind": str(sum(bool(report.left_behind) for report, _ in group)),
                "median s to the next checkpoint": f"{statistics.median(seconds):.1f}" if seconds else "",
            }
        )
    return render(rows)


def _strikes(reports: Sequence[Report]) -> Iterable[tuple[Report, Strike]]:
    return ((report, strike) for report in reports for strike in report.strikes)


def run_kills(kills: int, seed: int, kinds: Sequence[str], folder: Path) -> bool:
    """Run the plan and print lines for every run and kill, and the table at the end or when it is interrupted.

    Returns:
        Whether all kills were done, all runs ended equal to the unbroken one and nothing is left of them.

    Raises:
        RuntimeError: the unbroken run failed.
    """
    reports: list[Report] = []
    runs = plan(kills, seed, kinds)
    try:
        with FaultBench(folder, lambda line: print(line, flush=True)) as bench:
            for _ in range(ATTEMPTS):
                missed: list[Kill] = []
                for each in runs:
                    report, late = bench.run(each)
                    print(report, flush=True)
                    reports.append(report)
                    missed += late
                runs = repeated(missed)
    finally:  # also of the kills before an interruption
        if reports:
            print("", table(reports), sep="\n", flush=True)
    for kill in (kill for each in runs for kill in each):
        print(f"NOT KILLED {kill.kind} at a {kill.moment}: the run was over too early {ATTEMPTS} times")
    return not runs and all(report.is_good for report in reports)


def repeated(missed: Sequence[Kill]) -> list[tuple[Kill, ...]]:
    """Runs with the kills that came too late, at an earlier step."""
    earlier = sorted(
        (replace(kill, step=int(EARLIER * kill.step)) for kill in missed), key=lambda kill: kill.step
    )
    places = (tuple(kill for kill in earlier if kill.on_cluster == place) for place in (False, True))
    return [kills for kills in places if kills]
