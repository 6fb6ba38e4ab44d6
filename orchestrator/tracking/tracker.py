"""The record of a run in MLflow: a parent run, and a child run and a logged model per depth variant.

Only the driver uses it. A store that cannot be reached is an error at the start and never later: metrics wait in
`metrics.jsonl`, files stay in the output directory, the training goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from bim.orchestrator.files import atomic_write
from bim.orchestrator.runs.provenance import Provenance
from bim.orchestrator.tracking.background_upload import BackgroundUploader, RetryQueue
from bim.orchestrator.tracking.descriptions import pages, picture
from bim.orchestrator.tracking.metric_log import MetricLog
from bim.orchestrator.tracking.open_run import check_model_name, is_permanent_error, open_run
from bim.orchestrator.tracking.records import DepthRecord, MetricPoint
from bim.orchestrator.tracking.store import StoreAddress, http_timeouts, quiet_client_logs, summarize_error
from bim.orchestrator.tracking.trial_runs import TrialRuns
from bim.orchestrator.tracking.variant_runs import DESCRIPTION_TAG, DepthRuns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bim.orchestrator.search.results import TrialRow

TAGGED_PACKAGES = ("torch", "timm", "ray")
"""Packages whose versions are tags of the run; provenance.json has all of them."""

Status = Literal["FINISHED", "FAILED", "KILLED"]

log = logging.getLogger(__name__)


class Tracker:
    """One run's record. A context manager: leaving it by an exception ends the run as FAILED or KILLED.

    After `open` nothing raises because of the store. What could not be uploaded is one line in the log, stays in
    `out`, and is tried again when the run ends.
    """

    def __init__(
        self,
        client: MlflowClient,
        address: StoreAddress,
        run: Run,
        out: Path,
        model_name: str,
        continued: bool,
    ) -> None:
        self.out = out
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._client, self._address = client, address
        self._resources = contextlib.ExitStack()
        self._resources.enter_context(http_timeouts(retries=1, seconds=60))
        self._resources.enter_context(quiet_client_logs())
        self._uploader: BackgroundUploader | None = None
        self._retries = RetryQueue(str(address), is_permanent_error, self._store_is_unavailable)
        self._depths = DepthRuns(client, run, model_name, address.uri_to_set())
        self._trials = TrialRuns(client, run)
        self._trial_rows: dict[int, TrialRow] = {}
        self._metrics = MetricLog(out / "metrics.jsonl", same_store=continued)
        self._events = out / "events.log"
        self._events_sent = 0

    @classmethod
    def open(
        cls,
        uri: str | None,
        experiment: str,
        run_name: str,
        out: Path,
        resume_run_id: str | None = None,
        model_name: str | None = None,
        parent_run_id: str | None = None,
        interval: float = 2.0,
    ) -> Tracker:
        """Start a run, or continue the one that `recorded_run(out)` gave.

        Metrics in `out` belong to the run: those that its store has not received are sent.

        Args:
            uri: MLflow tracking URI; None is MLflow's own default (MLFLOW_TRACKING_URI, else ./mlflow.db).
            model_name: the registered model whose versions the depth variants become; None is the experiment's name.
            parent_run_id: the parent of a new run; a run of several backbones has a child run for each.
            interval: seconds between two uploads of metrics.

        Raises:
            TrackingError: within seconds.
        """
        model_name = check_model_name(model_name or experiment)
        address = StoreAddress(uri or mlflow.get_tracking_uri())
        client, run = open_run(address, experiment, run_name, resume_run_id, parent_run_id)
        tracker = cls(client, address, run, out, model_name, continued=resume_run_id is not None)
        record = {"run_id": tracker.run_id, "experiment_id": tracker.experiment_id, "uri": str(address)}
        atomic_write(out / "tracking.json", json.dumps(record, indent=2) + "\n")
        tracker._uploader = BackgroundUploader(
            [tracker._upload_metrics, tracker._upload_events], str(address), str(out), interval
        )
        return tracker

    @staticmethod
    def recorded_run(out: Path) -> str | None:
        """The run id that an earlier process left in this output directory."""
        try:
            return str(json.loads((out / "tracking.json").read_text(encoding="utf-8"))["run_id"])
        except (OSError, ValueError, KeyError):
            return None

    @property
    def uri_to_set(self) -> str | None:
        """The tracking URI that a reader must set before loading a model; None for MLflow's default."""
        return self._address.uri_to_set()

    def ui_hint(self) -> tuple[str | None, str]:
        """The command that starts MLflow's pages, None if a server shows them already, and this run's address there."""
        return self._address.ui_hint(self.experiment_id, self.run_id)

    # -- while training -----------------------------------------------------------------------------------------

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step, names like block2/loss. Appends one line to a file; never blocks or raises."""
        self._metrics.append(step, values)

    def rewind(self, step: int, prefix: str = "") -> None:
        """Drop what was recorded after `step`, from which the training continues; see `MetricLog.rewind`."""
        self._metrics.rewind(step, prefix)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric so far, earlier processes included."""
        return self._metrics.history(name)

    def log_event(self, text: str) -> None:
        """Record an event (a restart, skipped images) with its time, in events.log."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), self._events.open("a", encoding="utf-8") as file:
            file.write(f"{stamp}  {text}\n")

    # -- about the run ------------------------------------------------------------------------------------------

    def log_settings(self, flat: Mapping[str, object], yaml_text: str) -> None:
        """Settings as parameters (flat: mask.ratio -> 0.6) and whole, as settings.yaml."""

        def job() -> None:
            recorded = self._client.get_run(self.run_id).data.params
            new = {key: str(value)[:6000] for key, value in flat.items()}
            params = [Param(key, value) for key, value in new.items() if key not in recorded]
            self._client.log_batch(self.run_id, params=params)
            # MLflow never changes a parameter.
            for key in sorted(key for key, value in recorded.items() if new.get(key, value) != value):
                self.log_event(f"resumed with {key} = {new[key]} (started with {recorded[key]})")
            self._client.log_text(self.run_id, yaml_text, "settings.yaml")

        self._retries.submit("the settings", job)

    def log_provenance(self, record: Provenance) -> None:
        """Code revision, versions, hardware and data as provenance.json; the main ones as tags and a dataset."""
        tags = {"hardware": record.hardware_text, "python": record.python}
        tags |= {name: version for name, version in record.packages.items() if name in TAGGED_PACKAGES}
        if record.code.commit is not None:
            tags["mlflow.source.git.commit"] = record.code.commit
            tags["git_dirty"] = str(record.code.dirty).lower()
        if (data := record.data) is not None:
            self._depths.dataset = Dataset(
                name=Path(data.source).name or data.source,
                digest=data.fingerprint[:8],
                source_type="local",
                source=json.dumps({"uri": data.source}),
                profile=json.dumps(dataclasses.asdict(data)),
            )

        def job() -> None:
            self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])
            self._client.log_dict(self.run_id, record.as_dict(), "provenance.json")
            self._depths.log_dataset(self.run_id)

        self._retries.submit("the provenance", job)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tags of the parent run."""
        pairs = [RunTag(key, str(value)) for key, value in tags.items()]
        self._retries.submit("tags", lambda: self._client.log_batch(self.run_id, tags=pairs))

    def remove_tag(self, key: str) -> None:
        """Remove a tag of the parent run, if it exists."""

        def job() -> None:
            if key in self._client.get_run(self.run_id).data.tags:
                self._client.delete_tag(self.run_id, key)

        self._retries.submit("tags", job)

    def describe(self, markdown: str, pictures: Sequence[str] = ()) -> None:
        """The description at the top of the parent run's page, with links to related pages.

        pictures: names given to `log_picture`, shown below the text.
        """
        parts = [markdown, pages(self.experiment_id)]
        parts += [picture(self.run_id, f"pictures/{name}.png") for name in pictures]
        note = "\n\n".join(parts)
        self._retries.submit(
            "the description", lambda: self._client.set_tag(self.run_id, DESCRIPTION_TAG, note)
        )

    def log_picture(self, figure: Path | Figure, name: str) -> Path:
        """A picture on the parent run, kept as out/pictures/NAME.png. Returns the file."""
        path = self.out / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(figure, Path):
            content = figure.read_bytes()
        else:
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=120, bbox_inches="tight")
            content = png.getvalue()
        atomic_write(path, content)
        self.log_file(path, "pictures")
        return path

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """A file of the output directory on the parent run."""
        self._retries.submit(path.name, lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def log_depth(self, record: DepthRecord, model_name: str | None = None) -> str | None:
        """Child run and logged model of one variant; one of this run (not of a baseline) is also registered.

        Finishing a run twice uses the existing child run, and the existing model if its weights are equal.
        model_name: the registered model of which it becomes a version; None is the experiment's name. Returns the
        address that `mlflow.artifacts.download_artifacts` takes, None if the upload is pending.
        """
        return self._retries.submit(record.title, lambda: self._depths.send(record, model_name))

    def log_trial(self, row: TrialRow, metric: str) -> None:
        """A child run for one trial of a search in its present state. metric: the key of its scores."""
        self._trial_rows[row.number] = row
        name = f"trial {row.number}"
        if name not in self._retries.pending:  # a pending trial is sent in the state that it has by then
            self._retries.submit(name, lambda: self._trials.send(self._trial_rows[row.number], metric))

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(self, status: Status = "FINISHED", timeout: float = 20.0) -> bool:
        """Send what is left and end the run. Waits at most `timeout` seconds for metrics. True if all arrived."""
        if self._uploader is None:
            return not self._retries.pending
        uploader, self._uploader = self._uploader, None
        metrics_sent = uploader.close(timeout)
        complete = False
        if metrics_sent:
            for row in [row for row in self._trial_rows.values() if row.status == "running"]:
                self._retries.submit(
                    f"the end of trial {row.number}", partial(self._trials.mark_cut_off, row)
                )
            self._retries.submit(
                "the end of the run", lambda: self._client.set_terminated(self.run_id, status)
            )
            complete = self._retries.flush()
        if not complete:
            missing = ", ".join(["the last metrics"] * (not metrics_sent) + self._retries.pending)
            log.warning("MLflow at %s: not uploaded: %s; kept in %s", self._address, missing, self.out)
        self._resources.close()
        return complete

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    # -- upload -------------------------------------------------------------------------------------------------

    def _store_is_unavailable(self) -> bool:
        return self._uploader is not None and self._uploader.is_unavailable

    def _upload_metrics(self) -> None:
        self._metrics.deliver(self._send_points)

    def _send_points(self, points: Sequence[MetricPoint]) -> None:
        # A character that MLflow refuses would make it refuse the whole batch, again and again.
        metrics = [Metric(re.sub(r"[^\w./ -]", "_", p.name), p.value, p.milliseconds, p.step) for p in points]
        try:
            self._client.log_batch(self.run_id, metrics=metrics)
        except MlflowException as error:
            if not is_permanent_error(error):
                raise
            log.warning(
                "MLflow refused %d metrics of run %s (%s)", len(points), self.run_id, summarize_error(error)
            )

    def _upload_events(self) -> None:
        size = self._events.stat().st_size if self._events.exists() else 0
        if size != self._events_sent:
            self._client.log_artifact(self.run_id, str(self._events))
            self._events_sent = size
