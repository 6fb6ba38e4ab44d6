"""The record of a run in MLflow: a parent run, and a child run and a logged model per depth variant.

The only code that speaks MLflow; the driver alone uses it. A store that cannot be reached is an error at the start
and never later: metrics wait in `metrics.jsonl`, files stay in the output directory, the training goes on.
"""

from __future__ import annotations

import contextlib
import csv
import getpass
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from orchestrator.delivery import Courier, Debts
from orchestrator.metric_log import MetricLog, Point
from orchestrator.provenance import Provenance
from orchestrator.run_notes import DepthRecord, depth_rows, loading_note, results_table, thinned
from orchestrator.store_address import SECONDS, StoreAddress, gist, http_patience, no_tracebacks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["FINISHED", "FAILED", "KILLED"]

NOTE = "mlflow.note.content"  # the tag that MLflow's pages show as a description
BATCH = 1000  # metrics that MLflow takes in one request

log = logging.getLogger(__name__)


class TrackingError(ValueError):
    """The MLflow store cannot be used; raised only when a run starts."""


class Tracker:
    """One run's record. A context manager: leaving it by an exception ends the run as FAILED or KILLED.

    After `open` nothing raises on account of the store. What it did not take is said in one line, kept in `out`, and
    offered again when the run ends.
    """

    def __init__(
        self, client: MlflowClient, address: StoreAddress, run: Run, out: Path, interval: float
    ) -> None:
        self.out = out
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._started: int = run.info.start_time
        self._client, self._address = client, address
        self._open_things = contextlib.ExitStack()
        self._open_things.enter_context(http_patience(retries=1, seconds=30))
        self._open_things.enter_context(no_tracebacks())
        self._debts = Debts(str(address), _refused)
        self._depths: dict[str, DepthRecord] = {}
        self._metrics = MetricLog(out / "metrics.jsonl")
        self._events = out / "events.log"
        self._events_sent = 0
        self._interval = interval
        self._courier: Courier | None = None

    @classmethod
    def open(
        cls,
        uri: str | None,
        experiment: str,
        run_name: str,
        out: Path,
        resume_run_id: str | None = None,
        interval: float = 2.0,
    ) -> Tracker:
        """Start a run, or go on with the one that `recorded_run(out)` gave.

        uri: MLflow tracking URI; None is MLflow's own default (MLFLOW_TRACKING_URI, else ./mlflow.db).
        interval: seconds between two deliveries of metrics. Raises TrackingError, within seconds.
        """
        address = StoreAddress(uri or mlflow.get_tracking_uri())
        try:
            with http_patience(retries=0, seconds=int(SECONDS)), no_tracebacks():
                address.probe()
                client = MlflowClient(tracking_uri=address.uri)
                if resume_run_id is None:
                    run = _new_run(client, _experiment(client, experiment, address), run_name)
                    sent: dict[str, int] = {}
                else:
                    run = _continued_run(client, resume_run_id, address)
                    sent = _last_steps(client, run)
        except TrackingError:
            raise
        except Exception as error:  # each kind of store has its own errors
            raise TrackingError(
                f"the MLflow store {address} cannot be used: {gist(error)}; "
                "start or repair it, or give another one with --tracking.uri (sqlite:///mlflow.db needs no server)"
            ) from error
        tracker = cls(client, address, run, out, interval)
        if resume_run_id is None:
            tracker._metrics.rewind(-1)
        tracker._metrics.already_delivered(sent)
        note = {"run_id": tracker.run_id, "experiment_id": tracker.experiment_id, "uri": str(address)}
        (out / "tracking.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        tracker._courier = Courier(
            [tracker._carry_metrics, tracker._carry_events], str(address), str(out), interval
        )
        return tracker

    @staticmethod
    def recorded_run(out: Path) -> str | None:
        """The run id that an earlier process left in this output directory."""
        try:
            return str(json.loads((out / "tracking.json").read_text(encoding="utf-8"))["run_id"])
        except (OSError, ValueError, KeyError):
            return None

    def ui_hint(self) -> str:
        """The command that opens the pages, or their address if the store is a server."""
        return self._address.ui_hint(self.experiment_id, self.run_id)

    # -- while training -----------------------------------------------------------------------------------------

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step, names like block2/loss. Costs one line in a file; never blocks or raises."""
        self._metrics.append(step, values)

    def rewind(self, step: int) -> None:
        """The training goes on after `step`: forget what was recorded later. After a restart and at --resume."""
        self._metrics.rewind(step)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric so far, processes before this one included."""
        return self._metrics.history(name)

    def log_event(self, text: str) -> None:
        """Record something that happened once (a restart, skipped images) with its time, in events.log."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), self._events.open("a", encoding="utf-8") as file:
            file.write(f"{stamp}  {text}\n")

    # -- about the run ------------------------------------------------------------------------------------------

    def log_settings(self, flat: Mapping[str, object], yaml_text: str) -> None:
        """Settings as parameters (flat: mask.ratio -> 0.6) and whole, as settings.yaml."""

        def job() -> None:
            known = self._client.get_run(self.run_id).data.params
            new = {key: str(value)[:6000] for key, value in flat.items()}
            params = [Param(key, value) for key, value in new.items() if key not in known]
            self._client.log_batch(self.run_id, params=params)
            for key in sorted(
                k for k in new if known.get(k, new[k]) != new[k]
            ):  # MLflow never changes a parameter
                self.log_event(f"resumed with {key} = {new[key]} (started with {known[key]})")
            self._client.log_text(self.run_id, yaml_text, "settings.yaml")

        self._debts.do("the settings", job)

    def log_provenance(self, record: Provenance) -> None:
        """Code revision, versions, hardware and data: whole as provenance.json, the gist as tags and a dataset."""
        tags = {"hardware": str(record.hardware), "python": record.python, **record.packages}
        if record.code.commit is not None:
            tags["mlflow.source.git.commit"] = record.code.commit
            tags["git_dirty"] = str(record.code.dirty).lower()

        def job() -> None:
            self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])
            self._client.log_dict(self.run_id, record.as_dict(), "provenance.json")
            if (data := record.data) is not None:
                profile = {"images": data.images, "train": data.train, "val": data.val, "test": data.test}
                dataset = Dataset(
                    name=Path(data.source).name or data.source,
                    digest=data.fingerprint[:36],
                    source_type="local",
                    source=json.dumps({"uri": data.source}),
                    profile=json.dumps(profile),
                )
                self._client.log_inputs(self.run_id, [DatasetInput(dataset)])

        self._debts.do("the provenance", job)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tags of the parent run."""
        pairs = [RunTag(key, str(value)) for key, value in tags.items()]
        self._debts.do("tags", lambda: self._client.log_batch(self.run_id, tags=pairs))

    def describe(self, markdown: str) -> None:
        """The text at the head of the parent run's page."""
        self._debts.do("the description", lambda: self._client.set_tag(self.run_id, NOTE, markdown))

    def log_picture(self, picture: Path | Figure, name: str) -> Path:
        """A picture on the parent run; a figure is first written to out/pictures. Returns the file."""
        if isinstance(picture, Path):
            path = picture
        else:
            path = self.out / "pictures" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.savefig(path, dpi=120, bbox_inches="tight")
        self.log_file(path, "pictures")
        return path

    def log_table(self, rows: Sequence[Mapping[str, object]], name: str) -> Path:
        """A table on the parent run, written to out/NAME.csv (MLflow shows that as a table). Returns the file."""
        path = self.out / f"{name}.csv"
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        self.log_file(path)
        return path

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """A file of the output directory on the parent run."""
        self._debts.do(path.name, lambda: self._client.log_artifact(self.run_id, str(path), folder))

    # -- depth variants -----------------------------------------------------------------------------------------

    def log_depth(self, record: DepthRecord, model_name: str | None = None) -> str | None:
        """Child run and logged model of one variant; with `model_name` also a version of that registered model.

        Finishing a run twice uses what is there: the same child run, and the same model if its weights are equal.
        Returns the address that `mlflow.artifacts.download_artifacts` takes, None if there is none yet.
        """
        self._depths[record.alias] = record
        return self._debts.do(record.title, lambda: self._send_depth(record, model_name))

    def _send_depth(self, record: DepthRecord, model_name: str | None) -> str:
        run = self._child_run(record)
        run_id: str = run.info.run_id
        curve_steps = _last_steps(self._client, run)
        now = int(1000 * time.time())
        curves = [
            Metric(name, value, now, step)
            for name, curve in record.curves.items()
            for step, value in thinned(curve)
            if step > curve_steps.get(name, -1)
        ]
        for start in range(0, len(curves), BATCH):
            self._client.log_batch(run_id, metrics=curves[start : start + BATCH])
        model_id = self._logged_model(run, record, model_name)
        for picture in record.pictures:
            self._client.log_artifact(run_id, str(picture))
        uri = f"models:/{model_id}"
        note = results_table(depth_rows([record]))
        if model_name is not None:
            self._register(run_id, model_id, record, model_name)
            uri = f"models:/{model_name}@{record.alias}"
            note += "\n\n" + loading_note(model_name, record.alias, self._store_to_name())
        params = [Param(key, str(value)[:6000]) for key, value in record.params.items()]
        known = run.data.params
        self._client.log_batch(
            run_id, params=[p for p in params if p.key not in known], tags=[RunTag(NOTE, note)]
        )
        self._client.set_terminated(run_id, "FINISHED")
        return uri

    def _child_run(self, record: DepthRecord) -> Run:
        mine = f"tags.mlflow.parentRunId = '{self.run_id}' and tags.variant = '{record.alias}'"
        found = self._client.search_runs([self.experiment_id], mine, max_results=1)
        if found:
            return found[0]
        tags = {"mlflow.parentRunId": self.run_id, "variant": record.alias, **_origin()}
        return self._client.create_run(self.experiment_id, self._started, tags, record.title)

    def _logged_model(self, run: Run, record: DepthRecord, model_name: str | None) -> str:
        """The id of the logged model with these weights, made and filled if there is none."""
        client, run_id, digest = self._client, run.info.run_id, record.digest()
        if run.data.tags.get("weights") == digest:
            model = client.get_logged_model(run.data.tags["model_id"])
        else:
            name = re.sub(r"[/:.%\"']", "-", f"{model_name or 'bim'}-{record.alias}")
            params = {key: str(value) for key, value in record.params.items()}
            model = client.create_logged_model(self.experiment_id, name, run_id, {}, params, "timm")
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, record.step)])
            tags = [RunTag("model_id", model.model_id), RunTag("weights", digest)]
            client.log_batch(run_id, tags=tags)
        if str(model.status) != "READY":
            now = int(1000 * time.time())
            client.log_batch(
                run_id,
                metrics=[
                    Metric(name, value, now, record.step, model_id=model.model_id, run_id=run_id)
                    for name, value in record.metrics.items()
                ],
            )
            with tempfile.TemporaryDirectory() as folder:
                # The registry and the pages want an MLmodel file; nothing in it is pickled or run.
                Model(run_id=run_id, model_id=model.model_id, flavors={"timm": {"data": "."}}).save(
                    str(Path(folder) / "MLmodel")
                )
                client.log_model_artifacts(model.model_id, folder)
            client.log_model_artifacts(model.model_id, str(record.folder))
            client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _register(self, run_id: str, model_id: str, record: DepthRecord, model_name: str) -> None:
        client = self._client
        try:
            client.create_registered_model(model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"models:/{model_id}"
        versions = client.search_model_versions(f"name = '{model_name}' and run_id = '{run_id}'")
        version = next((v for v in versions if v.source == source), None)
        if version is None:
            row = depth_rows([record])[0]
            text = ", ".join(f"{key} {value}" for key, value in row.items() if key != "model")
            tags = {"depth": str(record.depth), "run": self.run_id}
            version = client.create_model_version(
                model_name, source, run_id, tags, description=text, model_id=model_id
            )
        client.set_registered_model_alias(model_name, record.alias, version.version)
        note = results_table(depth_rows(list(self._depths.values())))
        note += "\n\n" + loading_note(model_name, record.alias, self._store_to_name())
        client.update_registered_model(model_name, note)

    def _store_to_name(self) -> str | None:
        """The tracking URI that a reader must set; None for the default store."""
        default = self._address.sqlite_file == Path("mlflow.db").absolute()
        return None if default else str(self._address)

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(self, status: Status = "FINISHED", patience: float = 20.0) -> bool:
        """Send what is left and end the run. Waits at most `patience` seconds for metrics. True if all arrived."""
        if self._courier is None:
            return not self._debts.open
        courier, self._courier = self._courier, None
        arrived = courier.close(patience)
        if arrived:
            self._debts.do("the end of the run", lambda: self._client.set_terminated(self.run_id, status))
            arrived = self._debts.settle()
        if not arrived:
            missing = ", ".join(self._debts.open) or "the last metrics"
            log.warning("MLflow at %s has not taken %s; they are in %s", self._address, missing, self.out)
        self._open_things.close()
        return arrived

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    # -- towards the store --------------------------------------------------------------------------------------

    def _carry_metrics(self) -> None:
        self._metrics.deliver(self._send_points)

    def _send_points(self, points: Sequence[Point]) -> None:
        # A character that MLflow refuses would make it refuse the whole batch, again and again.
        metrics = [Metric(re.sub(r"[^\w./ -]", "_", p.name), p.value, p.milliseconds, p.step) for p in points]
        try:
            self._client.log_batch(self.run_id, metrics=metrics)
        except MlflowException as error:
            if not _refused(error):
                raise
            log.warning("MLflow refused %d metrics of run %s (%s)", len(points), self.run_id, gist(error))

    def _carry_events(self) -> None:
        size = self._events.stat().st_size if self._events.exists() else 0
        if size != self._events_sent:
            self._client.log_artifact(self.run_id, str(self._events))
            self._events_sent = size


def _experiment(client: MlflowClient, name: str, address: StoreAddress) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # The tag tells MLflow's pages to show runs and models rather than traces of language models.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, address.artifact_folder(name), tags))
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} of the MLflow store {address} was deleted; choose another --tracking.experiment, "
            f"or bring it back with: mlflow experiments restore -x {found.experiment_id}"
        )
    return str(found.experiment_id)


def _new_run(client: MlflowClient, experiment_id: str, name: str) -> Run:
    return client.create_run(experiment_id, tags=_origin(), run_name=name)


def _continued_run(client: MlflowClient, run_id: str, address: StoreAddress) -> Run:
    try:
        run = client.get_run(run_id)
        client.update_run(run_id, "RUNNING")
    except MlflowException as error:
        if not _refused(error):
            raise
        raise TrackingError(
            f"the run {run_id} that is to be resumed is not in the MLflow store {address}; give --tracking.uri its "
            "store, or remove tracking.json from the output directory to go on as a new run"
        ) from error
    return run


def _last_steps(client: MlflowClient, run: Run) -> dict[str, int]:
    """The highest step that the store holds of each metric of a run."""
    names = run.data.metrics
    return {name: max(m.step for m in client.get_metric_history(run.info.run_id, name)) for name in names}


def _origin() -> dict[str, str]:
    """The tags that fill MLflow's columns User and Source."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _refused(error: Exception) -> bool:
    """The store is there and the request is at fault: to repeat it would be in vain."""
    codes = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
    return isinstance(error, MlflowException) and error.error_code in codes
