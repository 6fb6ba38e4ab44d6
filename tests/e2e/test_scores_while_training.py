"""Depths that are scored while they train: what is told and kept, and that the weights are the same as without."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bim.orchestrator.runs.depth_scores import read_scores
from tests.e2e.command import (
    DEPTHS,
    LONG,
    TINY,
    Finished,
    arguments,
    differing,
    image_folder,
    main_job,
    shell,
)

SCORED = {"schedule__epochs": "6", "evaluation__every_epochs": "2"}
BRIEF = {"schedule__epochs": "2", "evaluation__every_epochs": "1"}


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 scanned digits in class directories."""
    return image_folder(tmp_path_factory.mktemp("labeled"), "{label}/{number}.png", 120)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, labeled: Path, store: str) -> Finished:
    """Six epochs, scored after the second and the fourth."""
    done = main_job(tmp_path_factory.mktemp("scored") / "run", labeled, store, **SCORED)
    assert done.status == 0, done.stderr
    return done


def score_lines(output: str) -> list[str]:
    return re.findall(
        r"^epoch +(\d+)/\d+  kNN top-1 by depth .* of \d+ validation images  \(.* s\)", output, re.M
    )


def test_scores_are_told_and_kept_with_a_picture(scored: Finished) -> None:
    assert score_lines(scored.stdout) == ["2", "4"]
    scores = read_scores(scored.out)
    assert [(score.epoch, score.metric, tuple(score.by_depth)) for score in scores] == [
        (2, "knn_top1", DEPTHS),
        (4, "knn_top1", DEPTHS),
    ]
    pictures = {path.name for path in (scored.out / "pictures").glob("reconstructions_epoch*.png")}
    assert pictures == {"reconstructions_epoch002.png", "reconstructions_epoch004.png"}


def test_mlflow_has_them_as_curves_of_every_depth(scored: Finished, store: str) -> None:
    client = MlflowClient(tracking_uri=store)
    parent = client.get_run(json.loads((scored.out / "tracking.json").read_text())["run_id"])
    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    steps = [score.step for score in read_scores(scored.out)]
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "val_knn_top1")
        assert [point.step for point in history] == steps, run.info.run_name
    assert len(runs) == len(DEPTHS)
    mean = client.get_metric_history(parent.info.run_id, "mean_val_knn_top1")
    assert [point.step for point in mean] == steps


@pytest.mark.slow
def test_scoring_changes_no_weight(scored: Finished, tmp_path: Path, labeled: Path, store: str) -> None:
    plain = main_job(tmp_path / "run", labeled, store, **SCORED | {"evaluation__every_epochs": "0"})
    assert plain.status == 0, plain.stderr
    assert score_lines(plain.stdout) == []
    assert differing(scored.out, plain.out) == []


@pytest.mark.slow
def test_a_training_that_brings_nothing_more_ends_early_with_its_best_checkpoint(
    tmp_path: Path, labeled: Path, store: str
) -> None:
    changes = SCORED | {"evaluation__every_epochs": "1", "evaluation__patience": "2", "optim__blr": "1e-12"}
    out = tmp_path / "run"
    done = main_job(out, labeled, store, **changes, checkpoint__keep="1")
    assert done.status == 0, done.stderr
    assert score_lines(done.stdout) == ["1", "2", "3"]
    told = "no better scores in 2 evaluations: the training ends early, and its result is the checkpoint of epoch 1"
    assert told in done.stdout
    kept = {int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")}
    assert min(kept) == read_scores(out)[0].step
    assert (out / "variants" / "depth04" / "model.safetensors").exists()
    again = main_job(out, labeled, store, **changes, checkpoint__keep="1", resume="true")
    assert again.status == 0, again.stderr
    assert "epoch 4/6" not in again.stdout
    assert told in again.stdout

    # Scores of checkpoints that are gone end nothing.
    shutil.rmtree(out / "checkpoints")
    fresh = main_job(out, labeled, store, **changes, checkpoint__keep="1", resume="true", from_scratch="true")
    assert fresh.status == 0, fresh.stderr
    assert score_lines(fresh.stdout) == ["1", "2", "3"]


def test_without_labels_they_are_ranked(tmp_path: Path, unlabeled: Path, store: str) -> None:
    done = main_job(tmp_path / "run", unlabeled, store, **BRIEF)
    assert done.status == 0, done.stderr
    assert re.search(r"^epoch 1/2  RankMe by depth .* of \d+ training images  \(", done.stdout, re.M)


def test_a_score_that_fails_costs_a_line(
    tmp_path: Path, unlabeled: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(task: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("bim.orchestrator.jobs.training_scores.score_depths", broken)
    done = main_job(tmp_path / "run", unlabeled, store, **BRIEF)
    assert done.status == 0, done.stderr
    assert "epoch 1 cannot be scored: RuntimeError: out of luck; the training goes on" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["2", "1"], ids=["between the steps", "in free resources"])
def test_scores_on_ray_are_those_of_one_process(
    tmp_path: Path, scored: Finished, labeled: Path, stages: str
) -> None:
    on_ray = {"placement.backend": "ray", "placement.stages": stages, "placement.cpus_per_stage": "1"}
    changes = {key.replace("__", "."): value for key, value in SCORED.items()}
    where = {"out": "runs/a", "data.source": str(labeled)}
    done = shell(arguments(TINY, LONG, on_ray, changes, where), tmp_path, tmp_path / "runs" / "a")
    assert done.status == 0, done.stderr
    assert differing(scored.out, done.out) == []
    on_ray_scores, in_process = read_scores(done.out), read_scores(scored.out)
    assert [score.by_depth for score in on_ray_scores] == [score.by_depth for score in in_process]
