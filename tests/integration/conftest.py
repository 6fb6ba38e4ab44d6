"""One Ray for the session, one MLflow store for each module that asks for it, and the tiny model that tests train."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Callable[[], None]]:
    """Starts Ray, or starts it again after a test that shut it down; ends it with the session."""
    import ray

    def start() -> None:
        if not ray.is_initialized():
            ray.init(
                address="local", num_cpus=2, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False,
                logging_level="ERROR",
            )  # fmt: skip

    yield start
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(ray_session: Callable[[], None]) -> None:
    """One Ray for all modules that ask for it."""
    ray_session()


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store, to be copied: MLflow takes seconds to create its tables."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def home(mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an MLflow store of its own."""
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copyfile(mlflow_template, folder / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def client(home: Path) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
