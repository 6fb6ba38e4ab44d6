"""Depth variants in a real MLflow store: child runs, logged models and versions of registered models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from bim.orchestrator.tracking.records import DepthRecord
from bim.orchestrator.tracking.tracker import Tracker
from tests.integration.tracking import ARGS, export, open_tracker, record, steps

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.slow
def test_a_registered_variant_opens_without_this_package(
    tmp_path: Path, home: Path, client: MlflowClient
) -> None:
    with open_tracker(tmp_path / "out", model_name="digits_vit") as tracker:
        for depth in (2, 3):
            folder = export(tmp_path / f"depth{depth}", depth)
            tracker.log_depth(record(folder, depth))
    program = (
        "import sys, mlflow, timm, torch\n"
        "sys.modules['bim'] = None\n"
        'm = timm.create_model("local-dir:" + mlflow.artifacts.download_artifacts("models:/digits_vit-depth03/1"), '
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
    assert [model.name for model in models] == [
        "sorted_vit-depth03",
        "sorted_vit-depth04",
        "sorted_vit-depth02",
    ]
    assert {metric.key for metric in models[0].metrics} == {"knn_top1", "params"}
    assert models[0].tags["mlflow.modelVersions"] == '[{"name": "sorted_vit-depth03", "version": 1}]'


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
    assert "kNN top-1 90.0±1.0 %" in child.data.tags["mlflow.note.content"]
    assert "models:/child_vit-depth02/1" in child.data.tags["mlflow.note.content"]
    assert "get-artifact?path=reconstruction.png" in child.data.tags["mlflow.note.content"]
    exported = download_artifacts(
        f"runs:/{child.info.run_id}/child_vit-depth02", tracking_uri=client.tracking_uri
    )
    assert {"model.safetensors", "config.json", "README.md"} <= set(os.listdir(exported))


def test_a_baselines_variant_is_recorded_but_not_registered(tmp_path: Path, client: MlflowClient) -> None:
    with open_tracker(tmp_path / "out", model_name="baseline_vit") as tracker:
        variant = DepthRecord(
            2, export(tmp_path / "mae2", 2), {"knn_top1": 0.123456, "params": 85798656.0}, series="mae"
        )
        tracker.log_depth(variant)
    assert not client.search_registered_models("name LIKE 'baseline_vit%'")
    (model,) = client.search_logged_models([tracker.experiment_id], "name = 'baseline_vit-mae-depth02'")
    assert {metric.key: metric.value for metric in model.metrics} == {
        "knn_top1": 0.1235,
        "params": 85798656.0,
    }


def test_every_run_adds_a_version_and_moves_no_alias(tmp_path: Path, client: MlflowClient) -> None:
    for number, name in enumerate("ab", start=1):
        with open_tracker(tmp_path / name, name, model_name="family") as tracker:
            for depth in (2, 3):
                tracker.log_depth(record(export(tmp_path / f"{name}{depth}", depth), depth))
            tracker.describe("Open it:", depth=3)
        if number == 1:
            client.set_registered_model_alias("family-depth03", "champion", 1)
    for registered in ("family-depth02", "family-depth03"):
        versions = client.search_model_versions(f"name = '{registered}'")
        assert {int(version.version) for version in versions} == {1, 2}
        model = client.get_registered_model(registered)
        assert f"models:/{registered}/2" in model.description
        assert "newest is of b" in model.description
    assert int(client.get_model_version_by_alias("family-depth03", "champion").version) == 1
    note = client.get_run(tracker.run_id).data.tags["mlflow.note.content"]
    assert "models:/family-depth03/2" in note
    assert not client.search_registered_models("name = 'family'")


def test_a_variant_has_the_tags_of_its_record_and_a_curve_that_ends_with_its_score(
    tmp_path: Path, client: MlflowClient
) -> None:
    variant = record(export(tmp_path / "depth2", 2))
    with open_tracker(tmp_path / "out", model_name="begun_vit") as tracker:
        tracker.begin_depths({2: {"depth": 2}})
        tracker.log_depth_metrics(1000, {2: {"knn_top1": 0.5}})
        tracker.log_depth(DepthRecord(**{**vars(variant), "tags": {"level_with_best": "yes"}}))
    (child,) = client.search_runs([tracker.experiment_id], f"tags.mlflow.parentRunId = '{tracker.run_id}'")
    assert child.info.status == "FINISHED"
    assert child.data.tags["level_with_best"] == "yes"
    assert child.data.params == {"depth": "2", "mask_ratio": "0.75"}
    assert steps(client, child.info.run_id, "knn_top1") == [1000, 2000]
    assert child.data.metrics["knn_top1"] == 0.9
    assert steps(client, child.info.run_id, "linear_top1") == [0]
    (version,) = client.search_model_versions("name = 'begun_vit-depth02'")
    assert version.tags["level_with_best"] == "yes"


def test_other_weights_of_a_run_are_another_version(tmp_path: Path, client: MlflowClient) -> None:
    with open_tracker(tmp_path / "out", model_name="changed_vit") as tracker:
        tracker.log_depth(record(export(tmp_path / "a", 2)))
    with open_tracker(tmp_path / "out", resume=tracker.run_id, model_name="changed_vit") as tracker:
        tracker.log_depth(record(export(tmp_path / "b", 2, seed=1)))
    assert len(client.search_model_versions("name = 'changed_vit-depth02'")) == 2


def test_a_store_elsewhere_gets_the_models_and_leaves_nothing_in_the_working_directory(
    tmp_path: Path, home: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "out").mkdir()
    with Tracker.open(client.tracking_uri, "bim", "run", tmp_path / "out", interval=0.05) as tracker:
        tracker.log_depth(record(export(tmp_path / "depth02", 2)), "elsewhere")
    assert client.get_model_version("elsewhere-depth02", "1").source.startswith("models:/m-")
    assert list((tmp_path / "work").iterdir()) == []
