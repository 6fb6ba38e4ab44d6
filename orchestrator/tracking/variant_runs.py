"""The depth variants of a run in MLflow: for each a child run, a logged model, and a version of a registered model.

Part of `tracker.py`. Every method may raise and may be repeated: existing runs and models are used again.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from bim.orchestrator.evaluation.metric_info import QUALITY
from bim.orchestrator.tracking.descriptions import (
    downsample,
    loading_note,
    picture,
    registered_name,
    rounded,
    summary_line,
)
from bim.orchestrator.tracking.metric_log import BATCH
from bim.orchestrator.tracking.records import DepthRecord, StoredRun

DESCRIPTION_TAG = "mlflow.note.content"
"""The tag that MLflow's pages show as a description."""

UNMEASURED_NOTE = (
    "Its final scores, its reconstructions and its model come with the evaluation, after the last epoch. What it scores "
    "until then (evaluation.every_epochs) is under *Model metrics*."
)
"""Description of a variant from the start of its run to its evaluation."""


class DepthRuns:
    """Writes the variants of one parent run; threads may share it.

    Args:
        client: of the store.
        parent: the run that trained them.
        store: the tracking URI that a reader must set to open them; None for MLflow's default.
    """

    def __init__(self, client: MlflowClient, parent: StoredRun, store: str | None) -> None:
        self._client, self._parent, self._store = client, parent, store
        self._experiment_id = parent.experiment_id
        self._runs: dict[str, Run] = {}
        self._sent_steps: defaultdict[str, dict[str, set[int]]] = defaultdict(dict)
        self._begins: dict[str, int] = {}
        self._ends: dict[str, tuple[str, int]] = {}
        self._evaluated: set[str] = set()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._end_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def begin(self, record: DepthRecord, milliseconds: int, start: int, dataset: Dataset | None) -> None:
        """Show a variant as running, with the parameters that are known; a run that exists is used again.

        Args:
            record: its depth, series and parameters.
            milliseconds: Unix time at which its process began to train it.
            start: Unix time in milliseconds at which a new run starts.
        """
        key = record.variant
        with self._locks[key]:
            self._begins[key] = milliseconds
            self._evaluated.discard(key)
            run = self._runs[key] = self._child_run(record, dataset, start)
            run_id = run.info.run_id
            if run.info.status != "RUNNING":
                self._client.update_run(run_id, "RUNNING")
            tags = [] if DESCRIPTION_TAG in run.data.tags else [RunTag(DESCRIPTION_TAG, UNMEASURED_NOTE)]
            self._client.log_batch(run_id, params=_new_params(run, record), tags=tags)
            status, ended = self._ends.get(key, ("", -1))
            if ended >= milliseconds:  # the end goes before all other uploads, and beside them
                self._client.set_terminated(run_id, status, ended)

    def add_metrics(self, record: DepthRecord, step: int) -> None:
        """Values of one step of the training of a variant; what the store has of that step already stays."""
        with self._locks[record.variant]:
            run, sent = self._known_run(record), self._sent_steps[record.variant]
            run_id, now = run.info.run_id, int(1000 * time.time())
            for name in record.metrics.keys() - sent.keys():
                history = self._client.get_metric_history(run_id, name) if name in run.data.metrics else []
                sent[name] = {point.step for point in history}
            new = {name: value for name, value in record.metrics.items() if step not in sent[name]}
            if new:
                metrics = [Metric(name, value, now, step) for name, value in new.items()]
                self._client.log_batch(run_id, metrics=metrics)
            for name in new:
                sent[name].add(step)

    def end(self, record: DepthRecord, status: str, milliseconds: int) -> None:
        """End a variant that is not evaluated.

        Args:
            milliseconds: Unix time of the end; one that began later goes on.
        """
        key = record.variant
        self._ends[key] = status, milliseconds
        if key not in self._runs:
            with self._locks[key]:
                self._known_run(record)
        with self._end_locks[key]:
            if key not in self._evaluated and self._begins.get(key, -1) <= milliseconds:
                self._client.set_terminated(self._runs[key].info.run_id, status, milliseconds)

    def send(self, record: DepthRecord, model_name: str, dataset: Dataset | None) -> None:
        """Write one variant. dataset: the images on which it was evaluated, if known."""
        client = self._client
        run = self._child_run(record, dataset)
        run_id: str = run.info.run_id
        self._send_curves(run, record)
        model_id = self._logged_model(run, record, model_name, dataset)
        for path in record.pictures:
            client.log_artifact(run_id, str(path))
        note = [summary_line(record)]
        if not record.series:
            name = registered_name(model_name, record.depth)
            version = self._register(run_id, model_id, record, name)
            note.append(loading_note(name, version, self._store))
            text = f"Depth {record.depth} of {model_name}, a version for each run. The newest is of {self._parent.name}:"
            client.update_registered_model(name, "\n\n".join([text, *note]))
        client.set_logged_model_tags(model_id, {DESCRIPTION_TAG: "\n\n".join(note)})
        note += [picture(run_id, path.name) for path in record.pictures]
        tags = {**record.tags, DESCRIPTION_TAG: "\n\n".join(note)}
        client.log_batch(run_id, params=_new_params(run, record), tags=[RunTag(*tag) for tag in tags.items()])
        with self._end_locks[record.variant]:
            client.set_terminated(run_id, "FINISHED")
            self._evaluated.add(record.variant)

    def loading_notes(self, depth: int, model_name: str) -> list[str]:
        """Markdown that opens a variant of this run; none if it is not in the registry."""
        name = registered_name(model_name, depth)
        query = f"tags.mlflow.parentRunId = '{self._parent.run_id}' and tags.variant = 'depth{depth}'"
        runs = self._client.search_runs([self._experiment_id], query, max_results=1)
        if not runs:
            return []
        versions = self._client.search_model_versions(f"name = '{name}' and run_id = '{runs[0].info.run_id}'")
        newest = max((int(version.version) for version in versions), default=None)
        return [] if newest is None else [loading_note(name, newest, self._store)]

    def _known_run(self, record: DepthRecord) -> Run:
        run = self._runs.get(record.variant)
        if run is None:
            run = self._runs[record.variant] = self._child_run(record, None)
        return run

    def _child_run(self, record: DepthRecord, dataset: Dataset | None, start: int | None = None) -> Run:
        client, parent = self._client, self._parent
        query = f"tags.mlflow.parentRunId = '{parent.run_id}' and tags.variant = '{record.variant}'"
        if runs := client.search_runs([self._experiment_id], query, max_results=1):
            run = runs[0]
        else:
            run = self._new_child_run(record, parent.start_time if start is None else start)
        if dataset is not None and not run.inputs.dataset_inputs:
            client.log_inputs(run.info.run_id, [DatasetInput(dataset)])
        return run

    def _new_child_run(self, record: DepthRecord, start: int) -> Run:
        parent = self._parent
        tags = {"mlflow.parentRunId": parent.run_id, "variant": record.variant, **source_tags()}
        # In flat lists, of models above all, "depth 6" alone does not name the run. The milliseconds make MLflow list the
        # variants, which start together, by depth.
        name = f"{record.title} of {parent.name}"
        return self._client.create_run(self._experiment_id, start + record.depth, tags, name)

    def _send_curves(self, run: Run, record: DepthRecord) -> None:
        sent_steps, now = last_steps(self._client, run), int(1000 * time.time())
        metrics = [
            Metric(name, value, now, step)
            for name, curve in record.curves.items()
            for step, value in downsample(curve)
            if step > sent_steps.get(name, -1)
        ]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run.info.run_id, metrics=metrics[start : start + BATCH])

    def _logged_model(self, run: Run, record: DepthRecord, model_name: str, dataset: Dataset | None) -> str:
        """The id of the logged model with these weights, created and filled if there is none."""
        client, run_id, digest = self._client, run.info.run_id, record.digest()
        models = client.search_logged_models([self._experiment_id], f"tags.weights = '{digest}'")
        model = next((model for model in models if model.source_run_id == run_id), None)
        if model is None:
            name = re.sub(
                r"[/:.%\"']", "-", registered_name(f"{model_name}-{record.series}".rstrip("-"), record.depth)
            )
            params = {key: str(value) for key, value in record.params.items()}
            tags = {"weights": digest, **source_tags()}
            model = client.create_logged_model(self._experiment_id, name, run_id, tags, params, "timm")
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, record.step)])
        if str(model.status) != "READY":
            self._fill(run_id, str(model.model_id), record, dataset)
        return str(model.model_id)

    def _fill(self, run_id: str, model_id: str, record: DepthRecord, data: Dataset | None) -> None:
        client, now = self._client, int(1000 * time.time())
        name, digest = (None, None) if data is None else (data.name, data.digest)
        # Step 0: MLflow draws a metric that has no other step as a bar, which compares the variants; a curve from the
        # training ends with the last value. The standard errors stay with the run: among the models they would push the
        # sizes out of the page.
        known = client.get_run(run_id).data.metrics.keys() & record.metrics.keys()
        curves = {key for key in known if any(m.step for m in client.get_metric_history(run_id, key))}
        metrics = [
            Metric(
                key,
                rounded(value),
                now,
                record.step if key in curves else 0,
                None if key.endswith("_se") else model_id,
                name,
                digest,
                run_id,
            )
            for key, value in record.metrics.items()
        ]
        client.log_batch(run_id, metrics=metrics)
        with tempfile.TemporaryDirectory() as folder:
            # The registry and the pages need an MLmodel file; nothing in it is pickled or run.
            flavors = {"timm": {"data": "."}}
            Model(run_id=run_id, model_id=model_id, flavors=flavors).save(str(Path(folder) / "MLmodel"))
            client.log_model_artifacts(model_id, folder)
        client.log_model_artifacts(model_id, str(record.folder))
        client.finalize_logged_model(model_id, "READY")

    def _register(self, run_id: str, model_id: str, record: DepthRecord, name: str) -> int:
        """The version of the registered model that a logged model is, created if there is none."""
        client, source = self._client, f"models:/{model_id}"
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        version = next((v for v in versions if v.source == source), None)
        if version is None:
            values = record.metrics
            scores = {
                metric.key: metric.text(values[metric.key]) for metric in QUALITY if metric.key in values
            }
            tags = {"depth": str(record.depth), **scores, **record.tags}
            text = summary_line(record)
            with _default_store(client.tracking_uri):
                version = client.create_model_version(
                    name, source, run_id, tags, description=text, await_creation_for=0, model_id=model_id
                )
        link = json.dumps([{"name": name, "version": int(version.version)}])
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
        return int(version.version)


def _new_params(run: Run, record: DepthRecord) -> list[Param]:
    """The parameters of a variant that its run does not have; MLflow never changes one."""
    known = run.data.params
    return [Param(key, str(value)[:6000]) for key, value in record.params.items() if key not in known]


@contextlib.contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """MLflow's registry looks a logged model up in the default store of the process, not in its client's own."""
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def last_steps(client: MlflowClient, run: Run) -> dict[str, int]:
    """The highest step that the store holds of each metric of a run."""
    names = run.data.metrics
    return {name: max(m.step for m in client.get_metric_history(run.info.run_id, name)) for name in names}


def source_tags() -> dict[str, str]:
    """The tags that fill MLflow's columns User and Source."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # the user of a container may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags
