"""What an MLflow store holds of an experiment, as plain values."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from bim.orchestrator.tracking.stored_values import stored_values


def test_the_values_of_an_experiment_have_names(client: MlflowClient, home: Path) -> None:
    uri = f"sqlite:///{home}/mlflow.db"
    experiment = client.create_experiment("kills", str(home / "artifacts"))
    run_id = client.create_run(experiment, run_name="run").info.run_id
    client.log_param(run_id, "seed", 3)
    for _ in range(2):  # a point that was sent twice is one value
        client.log_metric(run_id, "loss", 0.5, step=1)
    client.log_text(run_id, "x", "pictures/x.txt")
    client.set_terminated(run_id)
    model_id = client.create_logged_model(experiment, "m", run_id, {"weights": "a1"}).model_id
    client.create_registered_model("kills-depth06")
    client.create_model_version("kills-depth06", f"models:/{model_id}", run_id, model_id=model_id)
    assert stored_values(uri, "kills") == {
        "runs": ["run"],
        "run/status": "FINISHED",
        "run/params/seed": "3",
        "run/metrics/loss": ((1, 0.5),),
        "run/artifacts/pictures/x.txt": True,
        "models/depth06": ("a1",),
    }


def test_an_experiment_that_is_not_there_is_an_error(client: MlflowClient, home: Path) -> None:
    with pytest.raises(ValueError, match="no experiment nothing"):
        stored_values(f"sqlite:///{home}/mlflow.db", "nothing")
