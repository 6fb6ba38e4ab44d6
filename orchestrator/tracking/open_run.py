"""A run in an MLflow store, new or resumed, or an error that names the remedy."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from dataclasses import dataclass
from typing import Any, cast

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from bim.orchestrator.tracking.descriptions import VIEW, runs_view
from bim.orchestrator.tracking.records import StoredRun
from bim.orchestrator.tracking.run_record import RunRecord
from bim.orchestrator.tracking.store import (
    RESPONSE_TIMEOUT_S,
    StoreAddress,
    TrackingError,
    exclusive_lock,
    http_timeouts,
    quiet_client_logs,
    summarize_error,
)
from bim.orchestrator.tracking.variant_runs import source_tags

MAX_MODEL_NAME = 200
"""Characters: MLflow's databases hold 256, of which the name of a backbone among several and `-depth06` take some."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedRun:
    """A run in a store, and a client of it.

    Args:
        is_resumed: whether an earlier process started it.
        is_reopened: whether the store shows it as running; not yet if the store cannot be reached.
    """

    client: MlflowClient
    address: StoreAddress
    run: StoredRun
    is_resumed: bool
    is_reopened: bool = True

    def abandon(self) -> None:
        """End a run of which nothing could be written, if the store allows it."""
        with contextlib.suppress(Exception):
            self.client.set_terminated(self.run.run_id, "FAILED")


def check_model_name(name: str) -> str:
    """The name of a registered model. Raises TrackingError if MLflow refuses it."""
    problem = None
    if re.search(r"[/:]", name):
        problem = "has a slash or a colon"
    elif re.search(r"['\"`\x00-\x1f\ud800-\udfff]", name):
        problem = "has a quotation mark or a control character"
    elif not name.strip() or name in (".", ".."):
        problem = "is empty or names a folder"
    elif len(name) > MAX_MODEL_NAME:
        problem = f"is longer than {MAX_MODEL_NAME} characters"
    if problem is not None:
        raise TrackingError(
            f"the model name {name[:60]!r} {problem}, which MLflow does not take in names of registered models; give "
            "another one with --tracking.model_name"
        )
    return name


def open_run(
    address: StoreAddress,
    experiment: str,
    run_name: str,
    resume_run_id: str | None,
    recorded: RunRecord | None,
    parent_run_id: str | None,
) -> OpenedRun:
    """A client of the store, and the run with `resume_run_id`, or a new one without.

    A run that is resumed goes on without its store.

    Args:
        recorded: what the output directory says of the run that is resumed.

    Raises:
        TrackingError: the store of a new run cannot be used, or does not have the run that is resumed.
    """
    try:
        with (
            http_timeouts(retries=0, seconds=RESPONSE_TIMEOUT_S),
            quiet_client_logs(),
            exclusive_lock(address),
        ):
            address.probe(create=resume_run_id is None)
            client = MlflowClient(tracking_uri=address.uri)
            if resume_run_id is not None:
                run = _resumed_run(client, resume_run_id, address)
                return OpenedRun(client, address, _stored(run), is_resumed=True)
            experiment_id = _experiment(client, experiment, address)
            parent = {} if parent_run_id is None else {"mlflow.parentRunId": parent_run_id}
            run = client.create_run(experiment_id, tags=source_tags() | parent, run_name=run_name)
            return OpenedRun(client, address, _stored(run), is_resumed=False)
    except TrackingError:
        raise
    except Exception as error:  # each kind of store has its own errors
        if recorded is None or is_refusal(error):
            raise TrackingError(
                f"the MLflow store {address} cannot be used: {summarize_error(error)}; "
                "start or repair it, or give another one with --tracking.uri (sqlite:///mlflow.db needs no server)"
            ) from error
        log.warning(
            "MLflow at %s cannot be used (%s); the run goes on, and what it records is kept and sent later",
            address,
            summarize_error(error),
        )
    run = recorded.stored_run(run_name)
    return OpenedRun(connect_later(address), address, run, is_resumed=True, is_reopened=False)


def connect_later(address: StoreAddress) -> MlflowClient:
    """A client that connects at its first request, and whenever that failed at the next one."""
    return cast(MlflowClient, _LateClient(address))


class _LateClient:
    def __init__(self, address: StoreAddress) -> None:
        self._address = address
        self._client: MlflowClient | None = None

    def __getattr__(self, name: str) -> Any:
        if self._client is None:
            # MLflow would create an SQLite store that is away, and the run would not be in it.
            self._address.probe(create=False)
            self._client = MlflowClient(tracking_uri=self._address.uri)
        return getattr(self._client, name)


DUPLICATE_ROW = ("UNIQUE constraint failed", "duplicate key value", "Duplicate entry")
"""What SQLite, PostgreSQL and MySQL say when two writers insert the same row at once; the next attempt finds the row."""


def is_duplicate_row(error: Exception) -> bool:
    """Whether another writer inserted the same row at the same time, so that repeating the upload helps at once.

    Backbones that start side by side record the same data set, for which MLflow looks before it inserts.
    """
    return isinstance(error, MlflowException) and any(text in str(error) for text in DUPLICATE_ROW)


def is_refusal(error: Exception) -> bool:
    """Whether the store does not take an upload because of its content, so that repeating it does not help."""
    if not isinstance(error, MlflowException) or is_duplicate_row(error):
        return False
    return error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def is_missing(error: Exception) -> bool:
    """Whether the store answers that it does not have the run."""
    return isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST"


def _experiment(client: MlflowClient, name: str, address: StoreAddress) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # The kind tells MLflow's pages to show runs and models rather than traces of language models.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        try:
            experiment_id = client.create_experiment(name, address.artifact_folder(name), kind)
            experiment = client.get_experiment(experiment_id)
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name)  # another run may have created it since
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} of the MLflow store {address} was deleted; choose another --tracking.experiment, "
            f"or bring it back with: mlflow experiments restore -x {experiment.experiment_id}"
        )
    view, now = f"mlflow.sharedViewState.{VIEW}", int(1000 * time.time())
    if _state(experiment.tags.get(view, "")) != _state(
        runs_view(now)
    ):  # an earlier version had other columns
        client.set_experiment_tag(experiment.experiment_id, view, runs_view(now))
    return str(experiment.experiment_id)


def _state(view: str) -> object:
    """What a saved view shows, without its dates; None if it cannot be read."""
    try:
        return json.loads(json.loads(view)["state"])
    except (ValueError, KeyError, TypeError):
        return None


def _resumed_run(client: MlflowClient, run_id: str, address: StoreAddress) -> Run:
    try:
        run = client.get_run(run_id)
        client.update_run(run_id, "RUNNING")
    except MlflowException as error:
        if not is_missing(error) and not is_refusal(error):
            raise
        raise TrackingError(
            f"the run {run_id} that is to be resumed is not in the MLflow store {address}; give --tracking.uri its "
            "store, or remove tracking.json from the output directory to continue as a new run"
        ) from error
    return run


def _stored(run: Run) -> StoredRun:
    info = run.info
    return StoredRun(info.run_id, info.experiment_id, info.run_name, info.start_time)
