"""One run of the tiny job, with kills or without: starts its drivers, watches its processes, strikes when it is time."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bim.orchestrator.benchmarks.fault_job import command
from bim.orchestrator.benchmarks.fault_plan import LIVE_WHILE_MEASURING, Kill
from bim.orchestrator.benchmarks.fault_processes import TOKEN, ProcessTree, Remains, title, victims
from bim.orchestrator.benchmarks.mlflow_server import MlflowServer
from bim.orchestrator.distributed.nodes_on_one_machine import NodesOnOneMachine
from bim.orchestrator.training.manifest import MANIFEST

RESTART_AFTER_S = 2.0
"""Seconds until a killed MLflow server or node is replaced."""

WATCH_INTERVAL_S, POLL_INTERVAL_S, COMMIT_INTERVAL_S = 0.25, 0.02, 0.001
"""Seconds between two looks at the processes, at the driver, and at the checkpoints while one is waited for."""

MEASURING = b"measuring and exporting"
"""What a driver prints when its training is done."""

IN_FLIGHT = 4
"""Steps that may have begun after the last recorded one: the window of two stages."""

TAIL_BYTES = 4096
"""More than a line of metrics."""


@dataclass
class Strike:
    """A kill that was done.

    Args:
        victim: process id and title.
        step: the last one that the run had recorded.
        at: monotonic time.
        driver: the number of the driver process, from 0.
        recovered_s: seconds until a later checkpoint was committed; None if the training was over.
    """

    kill: Kill
    victim: str
    step: int
    at: float
    driver: int
    recovered_s: float | None = None


class FaultRun:
    """The driver processes of one run, one after the other, below a folder of its own.

    Each kill waits until the run has recovered from the one before it, which is when it has committed a checkpoint beyond
    the steps in flight at that one.

    Args:
        cluster: that the run joins; None: its driver starts Ray.
        images: that it trains on.
        kills: in their order.
    """

    def __init__(
        self,
        server: MlflowServer,
        cluster: NodesOnOneMachine | None,
        folder: Path,
        images: Path,
        kills: Sequence[Kill],
    ) -> None:
        self.out, self._output = folder / "run", folder / "output.txt"
        self._server, self._cluster, self._folder, self._images = server, cluster, folder, images
        self._pending = list(kills)
        self.strikes: list[Strike] = []
        self.missed: list[Kill] = []
        """Kills for which the run was over too early."""
        token = secrets.token_hex(8)
        self.remains = Remains(token, self.out, self._raylets)
        self._environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self._environment |= {TOKEN: token}
        if cluster is not None:
            self._environment["RAY_ADDRESS"] = cluster.address
        self._server_start: float | None = None
        self._node_start: float | None = None
        self._drivers = 0
        self._output_start = 0  # of the present driver, in bytes
        self._measuring_since: float | None = None

    def drive(self, resume: bool, deadline: float) -> int | None:
        """One driver to its end, struck by the kills that are due. Returns its exit status, None if it hung."""
        self._measuring_since = None
        with self._output.open("ab") as output:
            self._output_start = output.tell()
            driver = subprocess.Popen(
                command(self.out, self._server.uri, self._folder.name, resume, self._images),
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._watch(driver, deadline)
        finally:
            status = driver.poll()
            driver.kill()
            driver.wait()
            self._drivers += 1
        return status

    def close(self) -> None:
        """What was not killed was missed."""
        self.missed += self._pending
        self._pending = []

    def _watch(self, driver: subprocess.Popen[bytes], deadline: float) -> None:
        """Look at the processes until the driver or the time has ended, and strike."""
        first_seen: dict[str, float] = {}
        candidates: list[psutil.Process] = []
        kill: Kill | None = None
        next_look = 0.0
        while driver.poll() is None and (now := time.monotonic()) < deadline:
            if now >= next_look:
                next_look = now + WATCH_INTERVAL_S
                tree = ProcessTree()
                self.remains.look(tree, driver.pid)
                self._restart_what_is_due(now)
                self._note_progress(now)
                kill = self._pending[0] if self._pending else None
                candidates = [] if kill is None else self._candidates(kill.kind, tree, driver.pid)
                if kill is not None and candidates:
                    first_seen.setdefault(kill.kind, now)
            if kill is None or not candidates:
                time.sleep(POLL_INTERVAL_S)
                continue
            if self._is_due(kill, first_seen[kill.kind]) and self._strike(kill, candidates):
                self._pending.pop(0)
                kill, next_look = None, 0.0
                continue
            time.sleep(COMMIT_INTERVAL_S if kill.moment == "commit" else POLL_INTERVAL_S)
        self.remains.look(ProcessTree(), driver.pid)
        self._note_progress(time.monotonic())

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
        if self._server_start is not None:
            self._restart_what_is_due(float("inf"))
        self._server.wait_until_it_answers()

    def _restart_what_is_due(self, now: float) -> None:
        if self._server_start is not None and now >= self._server_start:
            self._server_start = None
            self._server.start()
        if self._cluster is not None and self._node_start is not None and now >= self._node_start:
            self._node_start = None
            self._cluster.complete()

    def _raylets(self) -> list[int]:
        return [] if self._cluster is None else self._cluster.raylets()

    def _candidates(self, kind: str, tree: ProcessTree, driver: int) -> list[psutil.Process]:
        if kind == "mlflow-server":  # a run whose server is away at its start is refused
            return self._server.processes() if (self.out / "tracking.json").exists() else []
        return victims(kind, tree, driver, self._raylets())

    def _note_progress(self, now: float) -> None:
        """Whether the training has recovered, or is over, and with it the time of kills in it."""
        if self.strikes and self.strikes[-1].recovered_s is None and self._has_recovered():
            self.strikes[-1].recovered_s = now - self.strikes[-1].at
        if self._measuring_since is None and MEASURING in self._printed():
            self._measuring_since = now
        if self._measuring_since is not None:
            late = [kill for kill in self._pending if not _can_be_measuring(kill)]
            self.missed += late
            self._pending = [kill for kill in self._pending if kill not in late]

    def _is_due(self, kill: Kill, first_seen: float) -> bool:
        now = time.monotonic()
        if kill.moment == "start":
            return now >= first_seen + kill.delay_s
        if self._measuring_since is not None:
            return now >= self._measuring_since + kill.delay_s
        if kill.moment == "measuring" or not self._has_recovered():
            return False
        if kill.moment == "step":
            return self._step() >= kill.step
        newest = self._checkpoint_steps(committed=True)
        return self._checkpoint_steps(committed=False) > max(newest, kill.step - 1)

    def _has_recovered(self) -> bool:
        """Whether a checkpoint beyond the last kill is committed, which gives the run its restarts back."""
        if not self.strikes:
            return True
        return self._checkpoint_steps(committed=True) > self.strikes[-1].step + IN_FLIGHT

    def _checkpoint_steps(self, committed: bool) -> int:
        """Of the newest checkpoint that has a manifest, or has none; 0 if there is none."""
        folders = (self.out / "checkpoints").glob("step-*")
        found = (int(folder.name[5:13]) for folder in folders if (folder / MANIFEST).exists() == committed)
        return max(found, default=0)

    def _step(self) -> int:
        """The last one in `metrics.jsonl`; 0 if there is none."""
        try:
            with (self.out / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().split(b"\n")
        except OSError:
            return 0
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0

    def _printed(self) -> bytes:
        """Output of the present driver."""
        with self._output.open("rb") as file:
            file.seek(self._output_start)
            return file.read()

    def _strike(self, kill: Kill, candidates: Sequence[psutil.Process]) -> bool:
        """Kill one of the candidates. Returns whether it was there, and had not just ended by itself."""
        if kill.moment == "commit":
            time.sleep(kill.delay_s)
        process = candidates[int(kill.choice * len(candidates))]
        strike = Strike(
            kill,
            f"{process.pid} {title(process)[:40]}".strip(),
            self._step(),
            time.monotonic(),
            self._drivers,
        )
        if kill.kind == "mlflow-server":
            self._server.kill()
            self._server_start = strike.at + RESTART_AFTER_S
        else:
            try:
                process.kill()
            except psutil.Error:
                return False
        if kill.kind == "raylet":
            self._node_start = strike.at + RESTART_AFTER_S
        self.strikes.append(strike)
        return True


def _can_be_measuring(kill: Kill) -> bool:
    """Whether a kill that did not come in the training may come after it."""
    return kill.kind in LIVE_WHILE_MEASURING and kill.moment != "commit"
