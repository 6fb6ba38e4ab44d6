"""The MLflow server of an interrupted run, which a kill takes away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil

START_TIMEOUT_S = 180.0


class MlflowServer:
    """An MLflow server with a store below a folder; killed and started again, it keeps its address and what it holds."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, without waiting until it answers."""
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port),
                "--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
                "--artifacts-destination", str(self._folder / "artifacts"),
            ],
            cwd=self._folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.DEVNULL,
            stdout=(self._folder / "server.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def wait_until_it_answers(self) -> None:
        """Raises TimeoutError if it does not within `START_TIMEOUT_S`."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.answers():
                return
            time.sleep(0.2)
        raise TimeoutError(f"the MLflow server did not start; see {self._folder}/server.log")

    def answers(self) -> bool:
        """Whether it takes connections."""
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            return True
        return False

    def processes(self) -> list[psutil.Process]:
        """The server itself, if it runs and answers."""
        assert self._process is not None
        is_running = self._process.poll() is None and self.answers()
        return [psutil.Process(self._process.pid)] if is_running else []

    def kill(self) -> None:
        """Kill it with all its worker processes, as when memory runs out."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def free_port() -> int:
    """A port of the loopback interface that no process listens on."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
