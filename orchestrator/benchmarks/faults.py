"""Kills (SIGKILL) of a tiny job's processes at random moments: every run must end equal to the unbroken one.

Serves `pipelines/benchmark.py faults`. Half of the kills come at a random moment, half while a checkpoint is written.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path

from bim.orchestrator.benchmarks.fault_job import COMMITS, Outcome, read_outcome
from bim.orchestrator.benchmarks.fault_processes import END_TIMEOUT_S, KILLED_TIMEOUT_S
from bim.orchestrator.benchmarks.fault_run import KINDS, FaultRun, Kill
from bim.orchestrator.benchmarks.mlflow_server import MlflowServer
from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.distributed.nodes_on_one_machine import NodesOnOneMachine
from bim.orchestrator.tables import render

RESUMABLE = (1, 75)
"""Exit statuses after which `--resume` continues; so it does after a signal."""

MAX_RESUMES = 3

LIMIT_FACTOR, LEAST_LIMIT_S, UNBROKEN_LIMIT_S = 10.0, 300.0, 1800.0
"""A run that takes this many times as long as the unbroken one, and at least so many seconds, hangs."""

MISSES, MISS_FACTOR = 4, 0.9
"""A run that ends before the kill is repeated so often, with an earlier moment each time."""


@dataclass
class Report:
    """How a run ended.

    Args:
        victim: process id and title; empty if the run ended before the kill.
        statuses: exit statuses of its drivers, the last one 0 if all is well.
        lost_s: seconds of all its drivers; after `FaultBench.run`, without those of the unbroken run.
        differing: names of what is not as in the unbroken run.
        left_behind: what is there five seconds after its end.
        error: why there is nothing to compare.
        synced: whether `bim sync` had to send what the run could not deliver.
    """

    kill: Kill | None
    folder: Path
    victim: str = ""
    statuses: list[int] = field(default_factory=list)
    lost_s: float = 0.0
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
        """Whether something was killed, the run ended equal all the same, and nothing is left."""
        return bool(self.victim) and self.is_equal and not self.left_behind

    def __str__(self) -> str:
        ends = " then ".join([*map(str, self.statuses), *["sync"] * self.synced])
        line = f"{self.kill}  exit {ends:<10}  {self.lost_s:+6.1f} s  {self.victim or 'NOT KILLED'}"
        problems = [self.error] if self.error else []
        if self.differing:
            more = f" and {len(self.differing) - 5} more" * (len(self.differing) > 5)
            problems.append(f"DIFFERS in {', '.join(self.differing[:5])}{more}")
        if self.left_behind:
            problems.append(f"LEFT BEHIND {', '.join(self.left_behind)}")
        if problems:
            problems.append(f"see {self.folder}")
        return "".join([line, *(f"\n     {problem}" for problem in problems)])


def plan(kills: int, seed: int, kinds: Sequence[str]) -> list[Kill]:
    """The kills in random order: as many of each kind, half of those in a commit."""
    chance = random.Random(f"faults {seed}")
    planned = []
    for number, kind in zip(range(kills), cycle(kinds), strict=False):
        in_commit = (number // len(kinds) + number) % 2 == 1
        planned.append(
            Kill(
                kind,
                fraction=None if in_commit else chance.random(),
                commit=chance.randrange(COMMITS),
                delay_s=chance.choice([0.0, chance.uniform(0.0, 0.03)]),
                choice=chance.random(),
                on_cluster=kind == "raylet" or (number // len(kinds)) % 3 == 2,
            )
        )
    chance.shuffle(planned)
    return planned


class FaultBench:
    """Runs of the job, unbroken and with a kill, below a folder. A context manager: the services end with it.

    Args:
        report_line: called with a line of text for a person.
    """

    def __init__(self, folder: Path, report_line: Callable[[str], None] = print) -> None:
        self._folder, self._report_line = folder.resolve(), report_line
        self._server = MlflowServer(self._folder / "mlflow")
        self._cluster: NodesOnOneMachine | None = None
        self._unbroken: dict[bool, tuple[Outcome, float]] = {}  # by whether it joined the cluster
        self._lifetimes: dict[bool, dict[str, float]] = {False: {}, True: {}}
        self._count = 0

    def __enter__(self) -> FaultBench:
        # Inherited by all nodes and drivers. Many processes share the cores of a small machine.
        for name, value in {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OMP_NUM_THREADS": "1"}.items():
            os.environ.setdefault(name, value)
        self._server.start()
        self._server.wait_until_it_answers()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cluster is not None:
            self._cluster.close()
        self._server.kill()

    def run(self, kill: Kill) -> Report:
        """A run with one kill, to its end, resumed if it has to be.

        Raises:
            RuntimeError: the unbroken run failed.
        """
        for _ in range(MISSES):
            unbroken, unbroken_s = self._reference(kill.on_cluster)
            report = self._run(kill, kill.on_cluster, max(LEAST_LIMIT_S, LIMIT_FACTOR * unbroken_s), unbroken)
            if report.victim or not report.is_equal or report.left_behind:
                break
            # It was an unbroken run, and a faster one than the last: the next one goes by its times.
            self._unbroken[kill.on_cluster] = unbroken, report.lost_s
            part = kill.commit / COMMITS if kill.fraction is None else kill.fraction
            kill = replace(kill, fraction=MISS_FACTOR * part)
        report.lost_s -= unbroken_s
        return report

    def _reference(self, on_cluster: bool) -> tuple[Outcome, float]:
        """The outcome and the seconds of an unbroken run at this place."""
        if on_cluster not in self._unbroken:
            if on_cluster:
                self._cluster = NodesOnOneMachine()
            report = self._run(None, on_cluster, UNBROKEN_LIMIT_S, None)
            if report.error or report.left_behind or report.statuses != [0]:
                raise RuntimeError(
                    f"the unbroken run failed: exit statuses {report.statuses}, {report.error or 'no error'}, left "
                    f"behind {report.left_behind}; see {report.folder}"
                )
            outcome = self._outcome(report.folder)
            self._report_line(f"unbroken, {_place(on_cluster)}: {report.lost_s:.1f} s")
            for other, _ in self._unbroken.values():
                if differing := outcome.differing(other):
                    raise RuntimeError(f"unbroken runs at two places differ: {', '.join(differing)}")
            self._unbroken[on_cluster] = outcome, report.lost_s
        return self._unbroken[on_cluster]

    def _outcome(self, folder: Path) -> Outcome:
        return read_outcome(folder / "run", self._server.uri, folder.name)

    def _run(self, kill: Kill | None, on_cluster: bool, limit_s: float, unbroken: Outcome | None) -> Report:
        cluster = self._cluster if on_cluster else None
        if cluster is not None:
            cluster.complete()
        folder = self._folder / f"run-{self._count:03d}"
        self._count += 1
        folder.mkdir()
        run = FaultRun(self._server, cluster, folder, self._lifetimes[on_cluster], unbroken is None)
        report = Report(kill, folder)
        try:
            _drive(run, report, time.monotonic() + limit_s)
        finally:
            run.remains.kill_processes()
        run.ensure_server()
        if not report.victim:
            self._lifetimes[on_cluster].update(run.lived)
        report.left_behind += run.remains.files()
        if cluster is not None:
            report.left_behind += cluster.placement_groups()
        if not report.error and unbroken is not None:
            try:
                report.differing = unbroken.differing(self._outcome(folder))
            except (OSError, ValueError) as error:
                report.error = str(error)
        return report


def _drive(run: FaultRun, report: Report, deadline: float) -> None:
    """Run the job, kill, and resume until it has ended well, or cannot."""
    kill = report.kill
    leave_s, killed_at = END_TIMEOUT_S, 0.0
    while True:
        was_begun = (run.out / SAVED_SETTINGS).exists()
        started = time.monotonic()
        status, victim = run.drive(None if report.victim else kill, was_begun, deadline)
        report.lost_s += time.monotonic() - started
        report.victim = report.victim or victim
        if status is None:
            report.error = "hangs"
            return
        report.statuses.append(status)
        if (
            status == -signal.SIGKILL
        ):  # the next driver starts while Ray's processes notice the end of this one
            leave_s, killed_at = KILLED_TIMEOUT_S, time.monotonic()
        else:
            left_s = leave_s - (time.monotonic() - killed_at)
            report.left_behind += run.remains.wait_for_processes(max(END_TIMEOUT_S, left_s))
        if status == 0:
            report.synced = run.sync_if_asked()
            return
        # Where nothing is there to be resumed, the job is started once more.
        goes_on = status < 0 or status in RESUMABLE or not (run.out / SAVED_SETTINGS).exists()
        if not goes_on or len(report.statuses) > MAX_RESUMES:
            report.error = f"exit status {status}"
            return
        run.ensure_server()


def _place(on_cluster: bool) -> str:
    return "cluster" if on_cluster else "local Ray"


def table(reports: Sequence[Report]) -> str:
    """A row per kind: kills, how the runs ended, and the median of the seconds that a kill cost."""
    rows = []
    for kind in KINDS:
        group = [report for report in reports if report.kill is not None and report.kill.kind == kind]
        if not group:
            continue
        rows.append(
            {
                "killed": kind,
                "kills": str(len(group)),
                "ended by itself": str(sum(report.statuses == [0] for report in group)),
                "needed --resume": str(sum(len(report.statuses) > 1 for report in group)),
                "needed bim sync": str(sum(report.synced for report in group) or ""),
                "equal": str(sum(report.is_equal for report in group)),
                "left behind": str(sum(bool(report.left_behind) for report in group)),
                "median s lost": f"{statistics.median(report.lost_s for report in group):.1f}",
            }
        )
    return render(rows)


def run_kills(kills: int, seed: int, kinds: Sequence[str], folder: Path) -> list[Report]:
    """Run the plan and print a line for every kill, and the table at the end or when it is interrupted.

    Raises:
        RuntimeError: the unbroken run failed.
    """
    reports: list[Report] = []
    try:
        with FaultBench(folder, lambda line: print(line, flush=True)) as bench:
            for number, kill in enumerate(plan(kills, seed, kinds), 1):
                reports.append(bench.run(kill))
                print(f"{number:3d}  {reports[-1]}", flush=True)
    finally:  # also of the kills before an interruption
        if reports:
            print("", table(reports), sep="\n", flush=True)
    return reports
