"""An MLflow store in memory, in place of `MlflowClient`: it may be slow, down, read-only, and remembers who asked."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from bim.orchestrator.tracking.descriptions import runs_view
from bim.orchestrator.tracking.tracker import Tracker

URI = "http://store:5000"


class FakeStore:
    """The store; `client` is what `MlflowClient(tracking_uri=...)` makes.

    Args:
        before: called with the name of every request, in the thread that asks; may raise or wait.
    """

    def __init__(self, before: Callable[[str], None] = lambda name: None) -> None:
        self.runs: dict[str, Any] = {}
        self.artifacts: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.before = before
        self.error: Exception | None = None

    def client(self, tracking_uri: str) -> Any:
        return _Client(self)

    def child(self, **tags: str) -> Any:
        """The only run with these tags."""
        (run,) = [run for run in self.runs.values() if tags.items() <= run.data.tags.items()]
        return run

    def request(self, name: str) -> None:
        self.requests.append((name, threading.current_thread().name))
        self.before(name)
        if self.error is not None:
            raise self.error


class _Client:
    """The requests that a run without models makes."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store

    def _run(self, name: str, run_id: str) -> Any:
        self._store.request(name)
        if run_id not in self._store.runs:
            raise MlflowException(f"Run '{run_id}' not found", RESOURCE_DOES_NOT_EXIST)
        return self._store.runs[run_id]

    def get_experiment_by_name(self, name: str) -> Any:
        self._store.request("get_experiment_by_name")
        tags = {"mlflow.sharedViewState.depth-variants": runs_view(0)}
        return SimpleNamespace(experiment_id="1", lifecycle_stage="active", tags=tags)

    def create_run(
        self, experiment_id: str, start_time: int = 7, tags: Any = None, run_name: str = ""
    ) -> Any:
        self._store.request("create_run")
        run_id = f"run{len(self._store.runs)}"
        info = SimpleNamespace(
            run_id=run_id,
            experiment_id=experiment_id,
            run_name=run_name,
            start_time=start_time,
            end_time=None,
            status="RUNNING",
        )
        data = SimpleNamespace(params={}, tags=dict(tags or {}), metrics={}, points=[])
        self._store.runs[run_id] = run = SimpleNamespace(info=info, data=data)
        return run

    def get_run(self, run_id: str) -> Any:
        return self._run("get_run", run_id)

    def update_run(self, run_id: str, status: str) -> None:
        self._run("update_run", run_id).info.status = status

    def set_terminated(self, run_id: str, status: str, end_time: int = 0) -> None:
        info = self._run("set_terminated", run_id).info
        info.status, info.end_time = status, end_time

    def log_batch(
        self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Any = ()
    ) -> None:
        data = self._run("log_batch", run_id).data
        data.points += [(metric.key, metric.step, metric.value) for metric in metrics]
        data.metrics |= {metric.key: metric.value for metric in metrics}
        data.params |= {param.key: param.value for param in params}
        data.tags |= {tag.key: tag.value for tag in tags}

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        points = self._run("get_metric_history", run_id).data.points
        return [SimpleNamespace(step=step, value=value) for name, step, value in points if name == key]

    def search_runs(self, experiment_ids: Sequence[str], query: str, max_results: int = 1000) -> list[Any]:
        self._store.request("search_runs")
        tags = dict(re.findall(r"tags\.([\w.]+) = '([^']*)'", query))
        status = re.findall(r"attributes\.status = '(\w+)'", query)
        return [
            run
            for run in self._store.runs.values()
            if tags.items() <= run.data.tags.items() and (not status or run.info.status == status[0])
        ]

    def log_text(self, run_id: str, text: str, path: str) -> None:
        self._run("log_text", run_id)
        self._store.artifacts.append(path)

    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None:
        self._run("log_artifact", run_id)
        with open(path, "rb"):
            self._store.artifacts.append(path.rpartition("/")[2])


def opened(out: Path, resume: bool = False, interval: float = 0.001) -> Tracker:
    """A tracker on the store of the fixture `store`."""
    out.mkdir(exist_ok=True)
    run_id = Tracker.recorded_run(out) if resume else None
    return Tracker.open(URI, "bim", "a run", out, run_id, interval=interval)
