"""A store in memory in place of MLflow's."""

from __future__ import annotations

import pytest

from bim.orchestrator.tracking import open_run as open_run_module
from bim.orchestrator.tracking.store import StoreAddress
from tests.unit.orchestrator.tracking.fake_mlflow import FakeStore


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    store = FakeStore()
    monkeypatch.setattr(open_run_module, "MlflowClient", store.client)
    monkeypatch.setattr(StoreAddress, "probe", lambda self, create=True: store.request("probe"))
    return store
