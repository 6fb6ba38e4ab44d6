"""Quiet surroundings for runs of the whole command, and the runs that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import Finished, image_folder, main_job


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for all runs of which only a part is looked at; making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="session")
def unlabeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 scanned digits in one flat folder."""
    return image_folder(tmp_path_factory.mktemp("unlabeled"), "{number}.png", 60)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, unlabeled: Path, store: str) -> Finished:
    """A tiny run from its start to its end, in this process, with what it printed."""
    return main_job(tmp_path_factory.mktemp("unbroken") / "run", unlabeled, store)


@pytest.fixture(scope="session")
def brief(tmp_path_factory: pytest.TempPathFactory, unlabeled: Path, store: str) -> Finished:
    """The same in two epochs: 10 steps, a checkpoint after the fifth and the last."""
    changes = {"schedule__epochs": "2", "checkpoint__every_epochs": "1"}
    done = main_job(tmp_path_factory.mktemp("brief") / "run", unlabeled, store, **changes)
    assert done.status == 0, done.stderr
    return done
