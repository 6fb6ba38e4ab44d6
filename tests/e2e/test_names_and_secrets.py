"""File names that are not UTF-8 end no run, and passwords leave no trace of a run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from bim.orchestrator.tracking import tracker
from bim.orchestrator.tracking.store import StoreAddress
from bim.orchestrator.training.checkpoint import CheckpointStore
from tests.e2e.command import arguments, call, main_job

SHORT = {"schedule__epochs": "2", "checkpoint__every_epochs": "1"}

SECRET_URI = "http://ada:hunter2@store:5000/?token=hunter2"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="the file system takes UTF-8 alone")
def test_names_that_are_not_utf8_pass_through_the_run_and_its_resume(
    tmp_path: Path, unlabeled: Path, store: str
) -> None:
    images, out = tmp_path / "images", tmp_path / "run"
    shutil.copytree(unlabeled, images)
    for number in range(12):  # some of them are in the training split
        name = os.fsencode(images) + b"/caf\xe9-%d.png" % number
        with open(name, "wb") as file:
            file.write(b"no image")
    finished = main_job(out, images, store, data__max_bad_fraction="0.5", **SHORT)
    assert finished.status == 0, finished.stderr
    assert r"caf\xe9-" in finished.stdout
    assert r"caf\xe9-" in (out / "events.log").read_text(encoding="utf-8")
    latest = CheckpointStore(out).latest()
    assert latest is not None
    assert any("caf\udce9" in name for name in latest.facts["bad_images"])

    again = call(["--out", str(out), *arguments({"tracking.uri": store}), "--resume"])
    assert again.status == 0, again.stderr
    assert again.stderr == ""


@pytest.mark.slow
def test_no_password_is_in_anything_that_a_run_leaves_and_resuming_asks_for_it_again(
    tmp_path: Path, unlabeled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, database = tmp_path / "run", tmp_path / "mlflow.db"

    class Address(StoreAddress):
        """Shown as the URI that the user gave; the store is a file."""

        def __init__(self, uri: str) -> None:
            super().__init__(f"sqlite:///{database}" if "store:5000" in uri else uri)

    monkeypatch.setattr(tracker, "StoreAddress", Address)
    monkeypatch.setattr(sys, "argv", ["bim_pipeline.py", f"--tracking.uri={SECRET_URI}"])
    finished = main_job(out, unlabeled, SECRET_URI, **SHORT)
    assert finished.status == 0, finished.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert database in left
    for path in left:
        assert b"hunter2" not in path.read_bytes(), path
    assert "hunter2" not in finished.stdout + finished.stderr
    assert "http://***@store:5000/?token=***" in (out / "settings.yaml").read_text()

    resume = ["--out", str(out), "--resume"]
    refused = call(resume)
    assert refused.status == 2
    assert "without its password; give --tracking.uri again, or set MLFLOW_TRACKING_URI" in refused.stderr
    assert call([*resume, "--tracking.uri", SECRET_URI]).status == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET_URI)
    assert call(resume).status == 0
    assert json.loads((out / "tracking.json").read_text())["run_id"]


@pytest.mark.parametrize("name", ["a/b", "a:b", "it's", "..", "x" * 300])
def test_a_name_that_mlflow_refuses_for_models_is_refused_before_anything_starts(
    tmp_path: Path, unlabeled: Path, store: str, name: str
) -> None:
    refused = main_job(tmp_path / "run", unlabeled, store, tracking__model_name=name)
    assert refused.status == 2
    assert refused.stderr.startswith("error: the model name ")
    assert "--tracking.model_name" in refused.stderr
    assert not (tmp_path / "run").exists()
