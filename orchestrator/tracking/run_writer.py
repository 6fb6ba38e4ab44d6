"""What a run sends to its store: a method for each kind of upload, called with plain values of JSON.

Part of `tracker.py`. Every method may raise and may be repeated.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from bim.orchestrator.search.record import row_from_record
from bim.orchestrator.tracking.open_run import is_refusal
from bim.orchestrator.tracking.records import DepthRecord, MetricPoint, StoredRun
from bim.orchestrator.tracking.store import StoreAddress, summarize_error
from bim.orchestrator.tracking.trial_runs import TrialRuns
from bim.orchestrator.tracking.variant_runs import DESCRIPTION_TAG, DepthRuns

RESUME_KEYS = {"resume", "from_scratch", "search.resume"}
"""Settings that every resumed run changes."""

log = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")


class UnknownUpload(ValueError):
    """An upload that this version does not know, or of which a file is gone."""


class RunWriter:
    """Writes one run and its child runs.

    Args:
        out: the output directory; names of files are relative to it.
    """

    def __init__(self, client: MlflowClient, address: StoreAddress, run: StoredRun, out: Path) -> None:
        self._client, self._run, self._out = client, run, out
        self._trials = TrialRuns(client, run)
        self._depths = DepthRuns(client, run, address.uri_to_set())
        self._methods: dict[str, Callable[..., object]] = {
            "settings": self.settings,
            "provenance": self.provenance,
            "tags": self.tags,
            "remove_tag": self.remove_tag,
            "description": self.description,
            "file": self.file,
            "depth": self.depth,
            "begin_depths": self.begin_depths,
            "depth_metrics": self.depth_metrics,
            "end_depth": self.end_depth,
            "end_children": self.end_children,
            "trial": self.trial,
            "reopen": self.reopen,
            "end": self.end,
        }

    def send(self, kind: str, arguments: Mapping[str, Any]) -> None:
        """Send an upload of the queue. Raises UnknownUpload, and the errors of the store."""
        if kind not in self._methods:
            raise UnknownUpload(f"{kind!r} is no kind of upload")
        try:
            self._methods[kind](**arguments)
        except (FileNotFoundError, TypeError, KeyError) as error:
            raise UnknownUpload(str(error)) from error

    def metrics(self, points: Sequence[MetricPoint]) -> None:
        # A character that MLflow refuses would make it refuse the whole batch, again and again.
        metrics = [Metric(re.sub(r"[^\w./ -]", "_", p.name), p.value, p.milliseconds, p.step) for p in points]
        try:
            self._client.log_batch(self._run.run_id, metrics=metrics)
        except MlflowException as error:
            if not is_refusal(error):
                raise
            log.warning(
                "MLflow refused %d metrics of run %s (%s)",
                len(points),
                self._run.run_id,
                summarize_error(error),
            )

    def settings(self, params: dict[str, str], text: str) -> None:
        """Settings as parameters, and whole as settings.yaml."""
        recorded = self._client.get_run(self._run.run_id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in recorded]
        self._client.log_batch(self._run.run_id, params=new)
        # MLflow never changes a parameter.
        changed = {key for key, value in recorded.items() if params.get(key, value) != value}
        for key in sorted(changed - RESUME_KEYS):
            log.info("resumed with %s = %s (MLflow shows %s)", key, params[key], recorded[key])
        self._client.log_text(self._run.run_id, text, "settings.yaml")

    def provenance(
        self, record: dict[str, Any], tags: dict[str, str], dataset: dict[str, str] | None
    ) -> None:
        self.tags(tags)
        self._client.log_dict(self._run.run_id, record, "provenance.json")
        if dataset is not None:
            self._client.log_inputs(self._run.run_id, [DatasetInput(Dataset(**dataset))])

    def tags(self, tags: dict[str, str]) -> None:
        self._client.log_batch(self._run.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def remove_tag(self, key: str) -> None:
        """Remove a tag, if it exists."""
        if key in self._client.get_run(self._run.run_id).data.tags:
            self._client.delete_tag(self._run.run_id, key)

    def description(
        self, text: str, rest: str = "", depth: int | None = None, model_name: str | None = None
    ) -> None:
        """Markdown above all else on the page of the run.

        depth, model_name: of a variant whose version in the registry is opened by lines between `text` and `rest`.
        """
        parts = [text]
        if depth is not None and model_name is not None:
            parts += self._depths.loading_notes(depth, model_name)
        self.tags({DESCRIPTION_TAG: "\n\n".join([*parts, rest]).rstrip()})

    def file(self, path: str, folder: str | None = None) -> None:
        self._client.log_artifact(self._run.run_id, str(self._out / path), folder)

    def depth(self, record: dict[str, Any], model_name: str, dataset: dict[str, str] | None) -> None:
        data = None if dataset is None else Dataset(**dataset)
        self._depths.send(_parsed(DepthRecord.from_plain, record, self._out), model_name, data)

    def begin_depths(
        self,
        series: str,
        params: dict[str, dict[str, str]],
        milliseconds: int,
        start: int,
        dataset: dict[str, str] | None,
    ) -> None:
        """Show variants as running. params: depth -> parameters."""
        data = None if dataset is None else Dataset(**dataset)
        for depth, values in params.items():
            record = _parsed(lambda: DepthRecord(int(depth), self._out, {}, values, series=series))  # noqa: B023
            self._depths.begin(record, milliseconds, start, data)

    def depth_metrics(self, series: str, step: int, values: dict[str, dict[str, float]]) -> None:
        """Values of one step of the training. values: depth -> name -> value."""
        for depth, metrics in values.items():
            record = _parsed(lambda: DepthRecord(int(depth), self._out, metrics, series=series))  # noqa: B023
            self._depths.add_metrics(record, step)

    def end_depth(self, series: str, depth: int, status: str, milliseconds: int) -> None:
        """End a variant that is not evaluated. milliseconds: Unix time of its end."""
        self._depths.end(DepthRecord(depth, self._out, {}, series=series), status, milliseconds)

    def trial(self, row: dict[str, Any], metric: str, cut_off: bool = False) -> None:
        self._trials.send(_parsed(row_from_record, row), metric, cut_off)

    def reopen(self) -> None:
        """Show the run as running; it was resumed while the store was away."""
        self._client.update_run(self._run.run_id, "RUNNING")

    def end(self, status: str, milliseconds: int) -> None:
        """End the run. milliseconds: Unix time of its end."""
        self._client.set_terminated(self._run.run_id, status, milliseconds)

    def status(self) -> str:
        """The status of the run in the store."""
        return str(self._client.get_run(self._run.run_id).info.status)

    def end_children(self) -> int:
        """End the runs of trials and variants that a process left running when it was killed. Returns their number."""
        running = [run for run in self._children("RUNNING") if {"trial", "variant"} & set(run.data.tags)]
        for run in running:
            if "trial" in run.data.tags:
                self._trials.cut_off(run)
            else:
                self._client.set_terminated(run.info.run_id, "KILLED")
        return len(running)

    def _children(self, status: str) -> Sequence[Run]:
        query = f"tags.mlflow.parentRunId = '{self._run.run_id}' and attributes.status = '{status}'"
        return list(self._client.search_runs([self._run.experiment_id], query))


def _parsed(parse: Callable[..., Parsed], *arguments: object) -> Parsed:
    """`parse(*arguments)`. Raises UnknownUpload for values of another form, which no repetition would make right."""
    try:
        return parse(*arguments)
    except (ValueError, AttributeError, LookupError, TypeError, OverflowError) as error:
        raise UnknownUpload(str(error)) from error


def dataset_of(name: str, digest: str, uri: str, profile: Mapping[str, object]) -> dict[str, str]:
    """The plain values of an MLflow dataset."""
    return {
        "name": name,
        "digest": digest,
        "source_type": "local",
        "source": json.dumps({"uri": uri}),
        "profile": json.dumps(profile),
    }


def now_ms() -> int:
    """Unix time in milliseconds."""
    return int(1000 * time.time())
