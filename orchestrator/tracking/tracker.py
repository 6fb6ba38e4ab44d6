"""The record of a run in MLflow: a parent run, and a child run and a logged model per depth variant and per trial.

Only the driver uses it. A new run needs its store at the start; after that, and when it is resumed, a store that is slow,
away, read-only or full costs nothing: metrics wait in `metrics.jsonl`, everything else in `uploads/`, and a background
thread sends them. What is left at the end is sent by `bim sync`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import mlflow

from bim.orchestrator.files import atomic_write, make_folder
from bim.orchestrator.runs.lease import LeaseLostError
from bim.orchestrator.runs.provenance import Provenance
from bim.orchestrator.text import short_path
from bim.orchestrator.tracking.background_upload import BackgroundUploader
from bim.orchestrator.tracking.delivery import Delivery
from bim.orchestrator.tracking.depth_uploads import DepthUploads
from bim.orchestrator.tracking.descriptions import pages, picture, run_address, run_pages, view_address
from bim.orchestrator.tracking.metric_log import MetricLog
from bim.orchestrator.tracking.open_run import OpenedRun, check_model_name, open_run
from bim.orchestrator.tracking.records import DepthRecord, UiPages, relative_path
from bim.orchestrator.tracking.run_record import RunRecord, read_run_record, write_run_record
from bim.orchestrator.tracking.run_writer import RunWriter, dataset_of, now_ms
from bim.orchestrator.tracking.store import StoreAddress, http_timeouts, quiet_client_logs
from bim.orchestrator.tracking.upload_queue import FOLDER, UploadQueue

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bim.orchestrator.search.results import TrialRow

TAGGED_PACKAGES = ("torch", "timm", "ray")
"""Packages whose versions are tags of the run; provenance.json has all of them."""

MAX_PICTURE_PX = 840
"""Width of a picture in a description; a wider one pushes the list of child runs out of a window of 1,440 pixels."""

Status = Literal["FINISHED", "FAILED", "KILLED"]

FINISH_TIMEOUTS_S: dict[Status, float] = {"FINISHED": 600.0, "FAILED": 60.0, "KILLED": 12.0}
"""How long the end of a run waits for its store; a process that a signal ends has little time."""

log = logging.getLogger(__name__)


END, REOPENING = "the end of the run", "the resumption of the run"
"""Names of the uploads that end a run in the store and show it as running again."""

CHILDREN_END = "the end of its depths and trials"
"""Name of the upload that ends what an earlier process left running."""


class Tracker:
    """One run's record. A context manager: leaving it by an exception ends the run as FAILED or KILLED.

    After `open` nothing raises or waits because of the store, but for the end of the run.
    """

    def __init__(self, opened: OpenedRun, out: Path, model_name: str, interval: float = 2.0) -> None:
        run, address = opened.run, opened.address
        self.out = out
        self.run_id, self.experiment_id = run.run_id, run.experiment_id
        self._run, self._address, self._model_name = run, address, model_name
        self._resources = contextlib.ExitStack()
        self._resources.enter_context(http_timeouts(retries=1, seconds=60))
        self._resources.enter_context(quiet_client_logs())
        self._metrics = MetricLog(out / "metrics.jsonl", same_store=opened.is_resumed)
        self._queue = UploadQueue(out / FOLDER)
        if opened.is_resumed:
            self._queue.discard(END, CHILDREN_END)
        else:  # what an earlier process left was meant for another run
            self._queue.clear()
        if opened.is_resumed and not opened.is_reopened:
            self._queue.put(REOPENING, "reopen", {})
        self._dataset: dict[str, str] | None = None
        self._is_resumed = opened.is_resumed
        self._depth_uploads = DepthUploads(self._queue, out, run.start_time)
        self._running_trials: dict[int, tuple[TrialRow, str]] = {}
        self._is_ending = self._is_finished = False
        self._writer = RunWriter(opened.client, address, run, out)
        delivery = Delivery(out, self._metrics, self._queue, self._writer)
        self._uploader = BackgroundUploader(delivery, str(address), short_path(out), interval)

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

        What an earlier process recorded in `out`, and its store has not received, is sent.

        Args:
            uri: MLflow tracking URI; None is MLflow's own default (MLFLOW_TRACKING_URI, else ./mlflow.db).
            model_name: begins the names of the registered models of the depths; None is the experiment's name.
            parent_run_id: the parent of a new run; a run of several backbones has a child run for each.
            interval: seconds between two uploads.

        Raises:
            TrackingError: the store of a new run cannot be used, or does not have the run that is resumed.
        """
        model_name = check_model_name(model_name or experiment)
        recorded = None if resume_run_id is None else read_run_record(out)
        address = StoreAddress(uri or _default_uri(recorded))
        opened = open_run(address, experiment, run_name, resume_run_id, recorded, parent_run_id)
        try:
            write_run_record(out, RunRecord.of(opened.run, address))
            return cls(opened, out, model_name, interval)
        except BaseException:
            opened.abandon()
            raise

    @staticmethod
    def recorded_run(out: Path) -> str | None:
        """The run id that an earlier process left in this output directory. Raises TrackingError if it cannot be read."""
        record = read_run_record(out)
        return None if record is None else record.run_id

    @property
    def uri_to_set(self) -> str | None:
        """The tracking URI that a reader must set before loading a model; None for MLflow's default."""
        return self._address.uri_to_set()

    def ui_pages(self) -> UiPages:
        """Where a person looks at this run and at the depths of all runs."""
        address = self._address
        return UiPages(
            address.ui_command(),
            address.page(view_address(self.experiment_id)),
            address.page(run_address(self.experiment_id, self.run_id)),
        )

    def run_links(self, losses: Sequence[str]) -> str:
        """Markdown links to the depths of this run, and to a chart of these metrics."""
        return run_pages(self.experiment_id, self.run_id, losses)

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

    def begin_depths(self, params: Mapping[int, Mapping[str, object]], series: str = "") -> None:
        """A child run for every depth, shown as running until `log_depth`, or until the end of this run.

        Those of an earlier process, and of an earlier call, are used again: a call adds parameters that were not known.

        Args:
            params: depth -> the parameters of its run that are known; `log_depth` adds the others.
            series: as of `DepthRecord`.
        """
        self._depth_uploads.begin(params, series, self._dataset)

    def log_depth_metrics(
        self, step: int, values: Mapping[int, Mapping[str, float]], series: str = ""
    ) -> None:
        """Values of one step of the training for the runs of `begin_depths`; a repeated step changes nothing.

        Args:
            step: optimizer steps.
            values: depth -> name of the metric -> value. What the evaluation measures of other images, or of fewer,
                should have another name than there.
            series: as of `DepthRecord`.
        """
        self._depth_uploads.add_metrics(step, values, series)

    # -- about the run ------------------------------------------------------------------------------------------

    def log_settings(self, flat: Mapping[str, object], yaml_text: str) -> None:
        """Settings as parameters (flat: mask.ratio -> 0.6) and whole, as settings.yaml."""
        params = {key: str(value)[:6000] for key, value in flat.items()}
        self._queue.put("the settings", "settings", {"params": params, "text": yaml_text})

    def log_provenance(self, record: Provenance) -> None:
        """Code revision, versions, hardware and data as provenance.json; the main ones as tags and a dataset."""
        tags = {"hardware": record.hardware_text, "python": record.python}
        tags |= {name: version for name, version in record.packages.items() if name in TAGGED_PACKAGES}
        if record.code.commit is not None:
            tags["mlflow.source.git.commit"] = record.code.commit
            tags["git_dirty"] = str(record.code.dirty).lower()
        if (data := record.data) is not None:
            name = Path(data.source).name or data.source
            profile = dataclasses.asdict(data)
            self._dataset = dataset_of(name, data.fingerprint[:8], data.source, profile)
        arguments = {"record": record.as_dict(), "tags": tags, "dataset": self._dataset}
        self._queue.put("the provenance", "provenance", arguments)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tags of the parent run."""
        texts = {key: str(value) for key, value in tags.items()}
        self._queue.put(f"the tags {', '.join(sorted(tags))}", "tags", {"tags": texts})

    def remove_tag(self, key: str) -> None:
        """Remove a tag of the parent run, if it exists."""
        self._queue.put(f"the tags {key}", "remove_tag", {"key": key})

    def describe(
        self,
        markdown: str,
        pictures: Sequence[str] = (),
        depth: int | None = None,
        model_name: str | None = None,
    ) -> None:
        """The description at the top of the parent run's page, with links to related pages.

        Args:
            pictures: names given to `log_picture`, shown below the text.
            depth: of a variant given to `log_depth` before, of which the description has the lines that open it.
            model_name: as there.
        """
        parts = [pages(self.experiment_id)]
        parts += [picture(self.run_id, f"pictures/{name}.png") for name in pictures]
        arguments: dict[str, object] = {"text": markdown, "rest": "\n\n".join(parts)}
        if depth is not None:  # the version of its model is known when it was sent
            arguments |= {"depth": depth, "model_name": model_name or self._model_name}
        self._queue.put("the description", "description", arguments)

    def log_picture(self, figure: Path | Figure, name: str) -> Path:
        """A picture on the parent run, kept as out/pictures/NAME.png. Returns the file."""
        path = self.out / "pictures" / f"{name}.png"
        make_folder(path.parent)
        if isinstance(figure, Path):
            content = figure.read_bytes()
        else:
            png = io.BytesIO()
            dpi = min(120.0, MAX_PICTURE_PX / figure.get_figwidth())
            figure.savefig(png, format="png", dpi=dpi, bbox_inches="tight")
            content = png.getvalue()
        atomic_write(path, content)
        self.log_file(path, "pictures")
        return path

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """A file of the output directory on the parent run, as it is when it is sent."""
        name = relative_path(path, self.out)
        self._queue.put(name, "file", {"path": name, "folder": folder})

    def log_depth(self, record: DepthRecord, model_name: str | None = None) -> None:
        """Child run and logged model of one variant; one of this run (not of a baseline) is also registered.

        Finishing a run twice uses the existing child run, and the existing model if its weights are equal.
        model_name: begins the name of the registered model of which it becomes a version, `registered_name`; None is the
            experiment's name.
        """
        self._depth_uploads.add_evaluated(record, model_name or self._model_name, self._dataset)

    def log_trial(self, row: TrialRow, metric: str) -> None:
        """A child run for one trial of a search in its present state. metric: the key of its scores."""
        if row.status in ("waiting", "running"):
            self._running_trials[row.number] = (row, metric)
        else:
            self._running_trials.pop(row.number, None)
        self._put_trial(row, metric)

    def _put_trial(self, row: TrialRow, metric: str, cut_off: bool = False) -> None:
        arguments = {"row": dataclasses.asdict(row), "metric": metric, "cut_off": cut_off}
        self._queue.put(f"trial {row.number}", "trial", arguments, first=cut_off)

    # -- the end ------------------------------------------------------------------------------------------------

    def request_end(self, status: Status) -> None:
        """Begin to end the run, without waiting; `finish` waits. Of several runs all can end at the same time."""
        if self._is_ending:
            return
        self._is_ending = True
        self._queue.discard(REOPENING)
        # Before everything else: a process that is told to stop may not have the time to send all.
        self._queue.put(END, "end", {"status": status, "milliseconds": now_ms()}, first=True)
        for row, metric in self._running_trials.values():
            self._put_trial(row, metric, cut_off=True)
        self._depth_uploads.end(status)
        if self._is_resumed:
            self._queue.put(CHILDREN_END, "end_children", {})
        self._uploader.request_end()

    def finish(
        self, status: Status = "FINISHED", idle_timeout: float = 20.0, timeout: float | None = None
    ) -> bool:
        """End the run and send what is left. True if the store has taken everything.

        Waits while the store takes something every `idle_timeout` seconds, at most `timeout` seconds: by default
        `FINISH_TIMEOUTS_S`.
        """
        if self._is_finished:
            return not self._queue.waiting()
        self._is_finished = True
        if timeout is None:
            timeout = FINISH_TIMEOUTS_S[status]
        self.request_end(status)
        complete = self._uploader.close(idle_timeout, timeout)
        if not complete:
            names = _short_list(upload.name for upload in self._queue.waiting())
            log.warning(
                "MLflow at %s has not taken everything (%s); it is kept in %s, and sent by: bim sync %s",
                self._address,
                names or "metrics",
                short_path(self.out),
                short_path(self.out),
            )
        self._resources.close()
        return complete

    def abandon(self) -> None:
        """Leave the run to the process that took its output directory over: nothing more is recorded or sent."""
        self._is_ending = self._is_finished = True
        self._uploader.abandon()
        self._resources.close()

    def end_at_once(self) -> None:
        """Mark the run as KILLED and send nothing more: for an exit that cannot wait."""
        if not self._is_ending:
            milliseconds = now_ms()
            self._queue.put(END, "end", {"status": "KILLED", "milliseconds": milliseconds}, first=True)
            ends = self._depth_uploads.end("KILLED")
            self._writer.end("KILLED", milliseconds)
            for end in ends:
                self._writer.end_depth(**end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, LeaseLostError):
            if not self._is_finished:
                self.abandon()
        elif kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")


def _default_uri(recorded: RunRecord | None) -> str:
    """The store of a run that names none: where it is resumed, the one that it was started with."""
    is_set = mlflow.is_tracking_uri_set() or "MLFLOW_TRACKING_URI" in os.environ
    if recorded is None or is_set or not recorded.is_complete:
        return mlflow.get_tracking_uri()
    return recorded.uri


def _short_list(names: Iterable[str], limit: int = 5) -> str:
    """`a, b and 3 more`."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")
