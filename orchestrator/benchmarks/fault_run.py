"""One run of the tiny job, with a kill or without: starts its drivers, watches its processes, strikes when it is time."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bim.orchestrator.benchmarks.fault_job import command
from bim.orchestrator.benchmarks.fault_processes import TOKEN, ProcessTree, Remains, title, victims
from bim.orchestrator.benchmarks.mlflow_server import MlflowServer
from bim.orchestrator.distributed.nodes_on_one_machine import NodesOnOneMachine
from bim.orchestrator.training.manifest import MANIFEST

KINDS = ("stage", "loader", "data-worker", "driver", "raylet", "mlflow-server")
"""What is killed."""

RESTART_SERVER_AFTER_S = 2.0

WATCH_INTERVAL_S, POLL_INTERVAL_S, COMMIT_INTERVAL_S = 0.25, 0.02, 0.001
"""Seconds between two looks at the processes, at the driver, and at the checkpoints while one is waited for."""


@dataclass(frozen=True)
class Kill:
    """What is killed, where and when.

    Args:
        kind: one of `KINDS`.
        fraction: of the time that such a process lives in an unbroken run; None: in a commit.
        commit: the number of the checkpoint, from 0, whose folder has no manifest yet.
        delay_s: from the moment that the folder is seen.
        choice: which of several victims, in [0, 1).
        on_cluster: whether the job joins a cluster of several nodes instead of starting Ray.
    """

    kind: str
    fraction: float | None = None
    commit: int = 0
    delay_s: float = 0.0
    choice: float = 0.0
    on_cluster: bool = False

    def __str__(self) -> str:
        moment = f"commit {self.commit + 1}" if self.fraction is None else f"at {100 * self.fraction:.0f} %"
        return f"{self.kind:<13}  {'cluster' if self.on_cluster else 'local':<7}  {moment:<9}"


class FaultRun:
    """The driver processes of one run, one after the other, below a folder of its own.

    Args:
        cluster: that the run joins; None: its driver starts Ray.
        lifetimes: seconds that a victim of each kind lives in an unbroken run at this place.
        watches_all: whether the processes of all kinds are looked for, as in the unbroken run.
    """

    def __init__(
        self,
        server: MlflowServer,
        cluster: NodesOnOneMachine | None,
        folder: Path,
        lifetimes: Mapping[str, float],
        watches_all: bool,
    ) -> None:
        self.out, self._output = folder / "run", folder / "output.txt"
        self._server, self._cluster, self._folder = server, cluster, folder
        self._lifetimes, self._watches_all = lifetimes, watches_all
        self.lived: dict[str, float] = {}
        """Seconds for which processes of a kind were seen."""
        token = secrets.token_hex(8)
        self.remains = Remains(token, self.out, self._raylets)
        self._environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self._environment |= {TOKEN: token}
        if cluster is not None:
            self._environment["RAY_ADDRESS"] = cluster.address
        self._server_start: float | None = None
        self._commits: set[str] = set()

    def drive(self, kill: Kill | None, resume: bool, deadline: float) -> tuple[int | None, str]:
        """One driver to its end. Returns its exit status, None if it hung, and the victim if there was one."""
        with self._output.open("ab") as output:
            driver = subprocess.Popen(
                command(self.out, self._server.uri, self._folder.name, resume),
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            victim = self._watch(driver, kill, deadline)
        finally:
            status = driver.poll()
            driver.kill()
            driver.wait()
        return status, victim

    def _watch(self, driver: subprocess.Popen[bytes], kill: Kill | None, deadline: float) -> str:
        """Look at the processes until the driver or the time has ended, and strike once. Returns the victim."""
        kinds = KINDS if self._watches_all else () if kill is None else (kill.kind,)
        first_seen: dict[str, float] = {}
        candidates: list[psutil.Process] = []
        victim, next_look = "", 0.0
        while driver.poll() is None and time.monotonic() < deadline:
            if time.monotonic() >= next_look:
                now = time.monotonic()
                next_look = now + WATCH_INTERVAL_S
                tree = ProcessTree()
                self.remains.look(tree, driver.pid)
                self._start_server_if_due(now)
                for kind in kinds:
                    candidates = self._candidates(kind, tree, driver.pid)
                    if candidates:
                        self.lived[kind] = now - first_seen.setdefault(kind, now)
            if kill is None or victim:
                time.sleep(POLL_INTERVAL_S)
                continue
            if candidates and self._is_due(kill, first_seen[kill.kind]):
                victim = self._strike(kill, candidates)
            time.sleep(COMMIT_INTERVAL_S if kill.fraction is None else POLL_INTERVAL_S)
        self.remains.look(ProcessTree(), driver.pid)
        return victim

    def sync_if_asked(self) -> bool:
        """Deliver what the run could not, if it says so. Returns whether it did."""
        if "bim sync" not in self._output.read_text(encoding="utf-8", errors="replace"):
            return False
        self.ensure_server()
        argv = [sys.executable, "-m", "bim.pipelines.command", "sync", str(self.out)]
        with self._output.open("ab") as output:
            subprocess.run(
                argv, cwd=self._folder, env=self._environment, stdout=output, stderr=output, check=False
            )
        return True

    def ensure_server(self) -> None:
        """Start the MLflow server again if it was killed, and wait until it answers."""
        self._start_server_if_due(float("inf"))
        self._server.wait_until_it_answers()

    def _start_server_if_due(self, now: float) -> None:
        if self._server_start is not None and now >= self._server_start:
            self._server_start = None
            self._server.start()

    def _raylets(self) -> list[int]:
        return [] if self._cluster is None else self._cluster.raylets()

    def _candidates(self, kind: str, tree: ProcessTree, driver: int) -> list[psutil.Process]:
        if kind == "mlflow-server":  # a run whose server is away at its start is refused
            return self._server.processes() if (self.out / "tracking.json").exists() else []
        return victims(kind, tree, driver, self._raylets())

    def _is_due(self, kill: Kill, first_seen: float) -> bool:
        if kill.fraction is None:
            return self._is_committing(kill.commit)
        return time.monotonic() >= first_seen + kill.fraction * self._lifetimes.get(kill.kind, 0.0)

    def _is_committing(self, number: int) -> bool:
        """Whether the folder of checkpoint `number` of this run, or of a later one, has no manifest."""
        for folder in (self.out / "checkpoints").glob("step-*"):
            if folder.name not in self._commits and not (folder / MANIFEST).exists():
                self._commits.add(folder.name)
                return len(self._commits) > number
        return False

    def _strike(self, kill: Kill, candidates: Sequence[psutil.Process]) -> str:
        """Kill one of the candidates. Returns which one; empty if it has just ended by itself."""
        if kill.fraction is None:
            time.sleep(kill.delay_s)
        process = candidates[int(kill.choice * len(candidates))]
        description = f"{process.pid} {title(process)[:40]}".strip()
        if kill.kind == "mlflow-server":
            self._server.kill()
            self._server_start = time.monotonic() + RESTART_SERVER_AFTER_S
            return description
        with suppress(psutil.Error):
            process.kill()
            return description
        return ""
