"""One Ray for the session, one MLflow store for each module that asks for it, and the tiny model that tests train."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with one MLflow store for all tests of a module: making one costs seconds."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("DO_NOT_TRACK", "1")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        yield folder


@pytest.fixture
def client(home: Path) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
