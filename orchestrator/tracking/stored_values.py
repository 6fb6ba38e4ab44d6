"""What an MLflow store holds of an experiment, as plain values by name, to be compared with another; serves benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException


def stored_values(uri: str, experiment: str) -> dict[str, object]:
    """Runs of the experiment, each with its parameters, points and artifacts, and the registered models named after it.

    Names are RUN/status, RUN/params/KEY, RUN/metrics/KEY (its distinct (step, value)), RUN/artifacts/PATH and models/DEPTH
    (the digests of the weights of the versions of EXPERIMENT-DEPTH).

    Raises:
        ValueError: no such experiment, or the store refuses.
    """
    try:
        return dict(_values(MlflowClient(tracking_uri=uri), experiment))
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri}: {error}") from error


def _values(client: MlflowClient, name: str) -> Iterator[tuple[str, object]]:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise ValueError(f"MLflow has no experiment {name}")
    runs = client.search_runs([experiment.experiment_id])
    yield "runs", sorted(run.info.run_name for run in runs)
    for run in runs:
        for key, value in _run_values(client, run):
            yield f"{run.info.run_name}/{key}", value
    models = client.search_logged_models([experiment.experiment_id])
    weights = {model.model_id: model.tags.get("weights") for model in models}
    for registered in client.search_registered_models(f"name LIKE '{name}-depth%'"):
        versions = client.search_model_versions(f"name = '{registered.name}'")
        versions = sorted(versions, key=lambda version: int(version.version))
        # The stores of MLflow leave `version.model_id` empty; the source is models:/MODEL_ID.
        digests = (weights.get(version.source.removeprefix("models:/")) for version in versions)
        yield f"models/{registered.name.removeprefix(f'{name}-')}", tuple(digests)


def _run_values(client: MlflowClient, run: Run) -> Iterator[tuple[str, object]]:
    run_id = run.info.run_id
    yield "status", run.info.status
    for key, value in run.data.params.items():
        yield f"params/{key}", value
    for metric in run.data.metrics:
        history = client.get_metric_history(run_id, metric)
        yield f"metrics/{metric}", tuple(sorted({(point.step, point.value) for point in history}))
    for path in _artifacts(client, run_id):
        yield f"artifacts/{path}", True


def _artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _artifacts(client, run_id, item.path)
        else:
            yield str(item.path)
