"""A run in an MLflow store, new or resumed, or an error within seconds that names the remedy."""

from __future__ import annotations

import re
import time

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from bim.orchestrator.tracking.descriptions import VIEW, runs_view
from bim.orchestrator.tracking.store import (
    CONNECT_TIMEOUT_S,
    StoreAddress,
    exclusive_lock,
    http_timeouts,
    quiet_client_logs,
    summarize_error,
)
from bim.orchestrator.tracking.variant_runs import source_tags

MAX_MODEL_NAME = 200
"""Characters: MLflow's databases hold 256, of which the name of a backbone among several may take some."""


class TrackingError(ValueError):
    """The MLflow store cannot be used; raised only when a run starts."""


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
    parent_run_id: str | None,
) -> tuple[MlflowClient, Run]:
    """A client of the store, and the run with `resume_run_id`, or a new one without. Raises TrackingError."""
    try:
        with (
            http_timeouts(retries=0, seconds=int(CONNECT_TIMEOUT_S)),
            quiet_client_logs(),
            exclusive_lock(address),
        ):
            address.probe()
            client = MlflowClient(tracking_uri=address.uri)
            if resume_run_id is not None:
                return client, _resumed_run(client, resume_run_id, address)
            experiment_id = _experiment(client, experiment, address)
            parent = {} if parent_run_id is None else {"mlflow.parentRunId": parent_run_id}
            return client, client.create_run(experiment_id, tags=source_tags() | parent, run_name=run_name)
    except TrackingError:
        raise
    except Exception as error:  # each kind of store has its own errors
        raise TrackingError(
            f"the MLflow store {address} cannot be used: {summarize_error(error)}; "
            "start or repair it, or give another one with --tracking.uri (sqlite:///mlflow.db needs no server)"
        ) from error


def is_permanent_error(error: Exception) -> bool:
    """Whether the store answers and refuses the request, so that repeating it does not help."""
    codes = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
    return isinstance(error, MlflowException) and error.error_code in codes


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
    view = f"mlflow.sharedViewState.{VIEW}"
    if view not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, view, runs_view(int(1000 * time.time())))
    return str(experiment.experiment_id)


def _resumed_run(client: MlflowClient, run_id: str, address: StoreAddress) -> Run:
    try:
        run = client.get_run(run_id)
        client.update_run(run_id, "RUNNING")
    except MlflowException as error:
        if not is_permanent_error(error):
            raise
        raise TrackingError(
            f"the run {run_id} that is to be resumed is not in the MLflow store {address}; give --tracking.uri its "
            "store, or remove tracking.json from the output directory to continue as a new run"
        ) from error
    return run
