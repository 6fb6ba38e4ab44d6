"""Runs, models and metrics in a real MLflow store (SQLite), and what happens when it goes away."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from safetensors.torch import save_file

from bim.orchestrator.runs.provenance import DataRecord, collect
from bim.orchestrator.tracking.records import DepthRecord
from bim.orchestrator.tracking.tracker import Tracker, TrackingError

pytestmark = pytest.mark.usefixtures("home")

ARGS = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "num_heads": 2,
    "num_classes": 0,
    "global_pool": "avg",
}


def open_tracker(
    out: Path, name: str = "a run", resume: str | None = None, model_name: str | None = None
) -> Tracker:
    out.mkdir(exist_ok=True)
    return Tracker.open(None, "bim", name, out, resume, model_name, interval=0.05)


def export(folder: Path, depth: int, seed: int = 0) -> Path:
    """A timm folder, as the exporter writes it."""
    torch.manual_seed(seed)
    args = {**ARGS, "depth": depth, "fc_norm": False}
    model = timm.create_model("vit_tiny_patch16_224", **args)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {
        "input_size": [3, 32, 32],
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": args,
        "pretrained_cfg": cfg,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("card\n")
    return folder


def record(folder: Path, depth: int = 2) -> DepthRecord:
    return DepthRecord(
        depth=depth,
        folder=folder,
        metrics={
            "knn_top1": 0.9,
            "knn_top1_se": 0.01,
            "linear_top1": 0.8,
            "latency_b1_ms": 3.5,
            "params": 1e5,
        },
        params={"depth": depth, "mask_ratio": 0.75},
        curves={"loss": [(step, 1 / (1 + step)) for step in range(2000)]},
        step=2000,
    )


def steps(client: MlflowClient, run_id: str, name: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def test_a_run_holds_its_settings_metrics_provenance_and_files(tmp_path: Path, client: MlflowClient) -> None:
    with open_tracker(tmp_path / "out", "digits") as tracker:
        tracker.log_settings({"mask.ratio": 0.75, "blocks": [2, 2]}, "mask:\n  ratio: 0.75\n")
        tracker.log_provenance(collect(DataRecord("digits", "a1b2c3", 1797, 1258, 180, 359, 10)))
        tracker.log_metrics(1, {"block0/loss": 0.5, "data/wait_s": 0.0, "odd name!": 1.0})
        tracker.log_metrics(2, {"block0/loss": float("nan")})
        tracker.log_event("skipped one image")
        tracker.log_table([{"depth": 2, "knn": 0.9}, {"depth": 4, "knn": 0.95}], "results")
        tracker.describe("# read me", ["a"])
        (tmp_path / "a.png").write_bytes(b"png")
        tracker.log_picture(tmp_path / "a.png", "a")
        assert tracker.ui_hint().startswith("mlflow ui   then open http://127.0.0.1:5000/#/experiments/")
    run = client.get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    assert run.data.params == {"mask.ratio": "0.75", "blocks": "[2, 2]"}
    assert run.data.metrics["data/wait_s"] == 0.0
    assert run.data.metrics["odd name_"] == 1.0
    assert steps(client, tracker.run_id, "block0/loss") == [1, 2]
    assert run.data.tags["mlflow.note.content"].startswith("# read me\n\n")
    assert (
        f"get-artifact?path=pictures/a.png&run_uuid={tracker.run_id}" in run.data.tags["mlflow.note.content"]
    )
    assert run.data.tags["torch"]
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    files = {file.path for file in client.list_artifacts(tracker.run_id)}
    assert files == {"settings.yaml", "provenance.json", "events.log", "results.csv", "pictures"}


def test_a_store_elsewhere_gets_the_models_and_leaves_nothing_in_the_working_directory(
    tmp_path: Path, home: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "out").mkdir()
    with Tracker.open(client.tracking_uri, "bim", "run", tmp_path / "out", interval=0.05) as tracker:
        uri = tracker.log_depth(record(export(tmp_path / "depth02", 2)), "elsewhere")
    assert uri == "models:/elsewhere@depth2"
    assert client.get_model_version_by_alias("elsewhere", "depth2").source.startswith("models:/m-")
    assert list((tmp_path / "work").iterdir()) == []


def test_the_default_store_lies_where_a_bare_mlflow_ui_looks(
    tmp_path: Path, home: Path, client: MlflowClient
) -> None:
    with open_tracker(tmp_path / "out") as tracker:
        pass
    assert (home / "mlflow.db").exists()
    assert client.get_run(tracker.run_id).info.artifact_uri.startswith(f"{home}/mlruns/")


def test_a_registered_variant_opens_without_this_package(
    tmp_path: Path, home: Path, client: MlflowClient
) -> None:
    with open_tracker(tmp_path / "out", model_name="digits_vit") as tracker:
        for depth in (2, 3):
            folder = export(tmp_path / f"depth{depth}", depth)
            assert tracker.log_depth(record(folder, depth)) == f"models:/digits_vit@depth{depth}"
    program = (
        "import sys, mlflow, timm, torch\n"
        "sys.modules['orchestrator'] = sys.modules['models'] = None\n"
        'm = timm.create_model("local-dir:" + mlflow.artifacts.download_artifacts("models:/digits_vit@depth3"), '
        "pretrained=True)\n"
        "print(len(m.blocks), float(m.eval()(torch.ones(1, 3, 32, 32)).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    layers, total = done.stdout.split()
    torch.manual_seed(0)
    original = timm.create_model("vit_tiny_patch16_224", **ARGS, depth=3, fc_norm=False).eval()
    assert int(layers) == 3
    assert float(total) == pytest.approx(float(original(torch.ones(1, 3, 32, 32)).sum().detach()), rel=1e-4)


def test_models_sort_by_their_metrics(tmp_path: Path, client: MlflowClient) -> None:
    with open_tracker(tmp_path / "out", model_name="sorted_vit") as tracker:
        for depth, accuracy in ((2, 0.7), (3, 0.9), (4, 0.8)):
            variant = record(export(tmp_path / f"depth{depth}", depth), depth)
            tracker.log_depth(
                DepthRecord(
                    depth, variant.folder, {"knn_top1": accuracy, "knn_top1_se": 0.01, "params": float(depth)}
                )
            )
    order = [{"field_name": "metrics.knn_top1", "ascending": False}]
    models = client.search_logged_models([tracker.experiment_id], "name LIKE 'sorted_vit%'", order_by=order)
    assert [model.name for model in models] == ["sorted_vit-depth3", "sorted_vit-depth4", "sorted_vit-depth2"]
    assert {metric.key for metric in models[0].metrics} == {"knn_top1", "params"}
    assert models[0].tags["mlflow.modelVersions"] == '[{"name": "sorted_vit", "version": 2}]'


def test_a_depth_variant_is_a_child_run_with_its_curve(tmp_path: Path, client: MlflowClient) -> None:
    (tmp_path / "reconstruction.png").write_bytes(b"png")
    with open_tracker(tmp_path / "out", model_name="child_vit") as tracker:
        variant = record(export(tmp_path / "depth2", 2))
        variant = DepthRecord(**{**vars(variant), "pictures": [tmp_path / "reconstruction.png"]})
        tracker.log_depth(variant)
    (child,) = client.search_runs([tracker.experiment_id], f"tags.mlflow.parentRunId = '{tracker.run_id}'")
    assert (child.info.run_name, child.info.status) == ("depth 2 of a run", "FINISHED")
    assert child.data.params == {"depth": "2", "mask_ratio": "0.75"}
    curve = steps(client, child.info.run_id, "loss")
    assert (len(curve), curve[0], curve[-1]) == (500, 0, 1999)
    assert child.data.metrics["knn_top1"] == 0.9
    assert child.data.metrics["knn_top1_se"] == 0.01
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["reconstruction.png"]
    assert "0.900 ± 0.010" in child.data.tags["mlflow.note.content"]
    assert "models:/child_vit@depth2" in child.data.tags["mlflow.note.content"]
    assert "get-artifact?path=reconstruction.png" in child.data.tags["mlflow.note.content"]
    exported = download_artifacts(
        f"runs:/{child.info.run_id}/child_vit-depth2", tracking_uri=client.tracking_uri
    )
    assert {"model.safetensors", "config.json", "README.md"} <= set(os.listdir(exported))


def test_a_baselines_variant_is_recorded_but_not_registered(tmp_path: Path, client: MlflowClient) -> None:
    with open_tracker(tmp_path / "out", model_name="baseline_vit") as tracker:
        variant = DepthRecord(
            2, export(tmp_path / "mae2", 2), {"knn_top1": 0.123456, "params": 85798656.0}, series="mae"
        )
        assert str(tracker.log_depth(variant)).startswith("models:/m-")
    assert not client.search_registered_models("name = 'baseline_vit'")
    (model,) = client.search_logged_models([tracker.experiment_id], "name = 'baseline_vit-mae-depth2'")
    assert {metric.key: metric.value for metric in model.metrics} == {
        "knn_top1": 0.1235,
        "params": 85798656.0,
    }


def test_a_resumed_run_is_the_same_run_and_nothing_is_doubled(tmp_path: Path, client: MlflowClient) -> None:
    out = tmp_path / "out"
    folder = export(tmp_path / "depth2", 2)
    with open_tracker(out, model_name="resumed_vit") as first:
        first.log_settings({"a": 1, "resume": False}, "a: 1\n")
        for step in range(6):
            first.log_metrics(step, {"loss": float(step)})
        first.log_depth(record(folder))
    assert Tracker.recorded_run(out) == first.run_id
    with open_tracker(out, resume=Tracker.recorded_run(out), model_name="resumed_vit") as second:
        second.rewind(3)
        assert client.get_run(first.run_id).info.status == "RUNNING"
        second.log_settings({"a": 1, "resume": True}, "a: 1\n")
        for step in range(4, 8):
            second.log_metrics(step, {"loss": float(step)})
        assert second.history("loss") == [(step, float(step)) for step in range(8)]
        second.log_depth(record(folder))
    assert second.run_id == first.run_id
    assert steps(client, first.run_id, "loss") == list(range(8))
    assert "resume = True" in (out / "events.log").read_text()
    (child,) = client.search_runs([first.experiment_id], f"tags.mlflow.parentRunId = '{first.run_id}'")
    assert len(steps(client, child.info.run_id, "loss")) == 500
    assert len(steps(client, child.info.run_id, "knn_top1")) == 1
    assert len(client.search_logged_models([first.experiment_id], "name = 'resumed_vit-depth2'")) == 1
    assert len(client.search_model_versions("name = 'resumed_vit'")) == 1


def test_without_its_record_a_run_goes_on_as_a_new_one_with_all_its_metrics(
    tmp_path: Path, client: MlflowClient
) -> None:
    out = tmp_path / "out"
    with open_tracker(out) as first:
        first.log_metrics(1, {"loss": 1.0})
    (out / "tracking.json").unlink()
    with open_tracker(out, resume=Tracker.recorded_run(out)) as second:
        second.log_metrics(2, {"loss": 2.0})
    assert second.run_id != first.run_id
    assert steps(client, second.run_id, "loss") == [1, 2]


def test_other_weights_are_another_version_under_the_same_alias(tmp_path: Path, client: MlflowClient) -> None:
    with open_tracker(tmp_path / "out", model_name="changed_vit") as tracker:
        tracker.log_depth(record(export(tmp_path / "a", 2)))
        tracker.log_depth(record(export(tmp_path / "b", 2, seed=1)))
    assert int(client.get_model_version_by_alias("changed_vit", "depth2").version) == 2


def test_a_store_that_goes_away_costs_one_line_and_gets_everything_when_it_is_back(
    tmp_path: Path, home: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    away = home / "away.db"
    out = tmp_path / "out"
    with open_tracker(out, model_name="away_vit") as tracker:
        tracker.log_metrics(0, {"loss": 0.0})
        (home / "mlflow.db").rename(away)
        try:
            for step in range(1, 50):
                tracker.log_metrics(step, {"loss": float(step)})
            wait_for(lambda: any("does not take metrics" in message for message in caplog.messages))
            tracker.log_table([{"depth": 2}], "results")
            assert tracker.log_depth(record(export(tmp_path / "depth2", 2))) is None
        finally:
            (home / "mlflow.db").unlink(missing_ok=True)
            away.rename(home / "mlflow.db")
    assert steps(client, tracker.run_id, "loss") == list(range(50))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 50
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["results.csv"]
    assert int(client.get_model_version_by_alias("away_vit", "depth2").version) == 1
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert not any(message.count("\n") for message in caplog.messages)
    assert sum("does not take metrics" in message for message in caplog.messages) == 1


def test_a_store_that_never_comes_back_does_not_fail_the_run(
    tmp_path: Path, home: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    away = home / "away.db"
    out = tmp_path / "out"
    tracker = open_tracker(out)
    (home / "mlflow.db").rename(away)
    try:
        tracker.log_metrics(1, {"loss": 1.0})
        tracker.log_table([{"depth": 2}], "results")
        assert not tracker.finish()
    finally:
        (home / "mlflow.db").unlink(missing_ok=True)
        away.rename(home / "mlflow.db")
    assert "has not taken the last metrics" in caplog.messages[-1]
    assert str(out) in caplog.messages[-1]
    with open_tracker(out, resume=Tracker.recorded_run(out)) as again:
        pass
    assert steps(client, again.run_id, "loss") == [1]


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_ends_by_an_exception_says_so(
    tmp_path: Path, client: MlflowClient, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), open_tracker(tmp_path / "out") as tracker:
        raise error("stop")
    assert client.get_run(tracker.run_id).info.status == status


def test_nothing_of_the_process_is_left_changed(tmp_path: Path) -> None:
    before = dict(os.environ)
    with open_tracker(tmp_path / "out"):
        assert any(thread.name == "metrics-courier" for thread in threading.enumerate())
    assert dict(os.environ) == before
    assert not any(thread.name == "metrics-courier" for thread in threading.enumerate())


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("kind", ["http", "folder", "file", "nonsense"])
def test_a_store_that_cannot_be_used_is_one_sentence_at_the_start(tmp_path: Path, kind: str) -> None:
    (tmp_path / "notes.db").write_text("no database " * 1000)
    uri = {
        "http": f"http://127.0.0.1:{unused_port()}",
        "folder": f"file://{tmp_path}/mlruns",
        "file": f"sqlite:///{tmp_path}/notes.db",
        "nonsense": "nonsense://somewhere",
    }[kind]
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        Tracker.open(uri, "bim", "run", tmp_path)
    message = str(caught.value)
    assert uri in message
    assert "--tracking.uri" in message
    assert "\n" not in message
    assert time.monotonic() - start < 60  # MLflow's own patience is four minutes
    assert not (tmp_path / "tracking.json").exists()


def test_a_run_that_is_not_in_the_store_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"0123abcd .*is not in the MLflow store"):
        open_tracker(tmp_path / "out", resume="0123abcd")


def test_a_model_name_that_the_registry_would_refuse_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"'a/b' has a slash.*--tracking.model_name"):
        open_tracker(tmp_path / "out", model_name="a/b")


@pytest.mark.slow
def test_runs_started_at_once_in_a_new_folder_share_one_new_store(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from bim.orchestrator.tracking.tracker import Tracker
out = Path(sys.argv[1])
out.mkdir()
print("ready", flush=True)
sys.stdin.readline()
Tracker.open(None, "bim", out.name, out).finish()
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, name],
            cwd=tmp_path,
            env=os.environ.copy(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two", "three")
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
    ends = [(*run.communicate(timeout=120), run.returncode) for run in runs]
    assert [end[2] for end in ends] == [0, 0, 0], ends
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("bim")
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {
        "one",
        "two",
        "three",
    }


def test_a_deleted_experiment_says_how_to_bring_it_back(
    tmp_path: Path, home: Path, client: MlflowClient
) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        Tracker.open(None, "gone", "run", tmp_path)


def wait_for(condition: object, seconds: float = 10.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
