"""What a backbone among others costs when something goes wrong after its training: never its results."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from matplotlib.figure import Figure

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.distributed.placement import StageLayout, consecutive
from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.jobs import comparison
from bim.orchestrator.jobs.backbone_run import BackboneRun, record_failure, scores_line
from bim.orchestrator.jobs.comparison import (
    describe_comparison,
    measure_pending_latencies,
    record_comparison,
)
from bim.orchestrator.jobs.evaluation_task import EvaluationTask, evaluation_task
from bim.orchestrator.jobs.prepare import PreparedJob, prepare
from bim.orchestrator.jobs.records import record_progress
from bim.orchestrator.runs.lease import LeaseLostError
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.training.errors import TrainingError

VIT = {
    "name": "vit_tiny_patch16_224",
    "alias": "vit",
    "model_args": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
    "blocks": 2,
}


@dataclass
class Recorder:
    """A tracker that keeps what a run is known by: its tags, its variants, its end."""

    tags: dict[str, object] = field(default_factory=dict)
    depths: list[tuple[str, int]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""
    status: str = "RUNNING"
    uri_to_set: None = None

    def set_tags(self, tags: dict[str, object]) -> None:
        self.tags |= tags

    def remove_tag(self, key: str) -> None:
        self.tags.pop(key, None)

    def log_depth(self, record: Any, name: str) -> None:
        self.depths.append((record.series, record.depth))

    def finish(self, status: str) -> None:
        self.status = status

    def abandon(self) -> None:
        self.status = "ABANDONED"

    def history(self, name: str) -> list[tuple[int, float]]:
        return []

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.metrics |= values

    def log_file(self, path: Path) -> None: ...

    def log_picture(self, figure: Figure, name: str) -> None:
        self.pictures.append(name)
        self.texts[name] = [text.get_text() for text in figure.texts]

    def describe(
        self, markdown: str, pictures: list[str], depth: int | None = None, model_name: str | None = None
    ) -> None:
        self.note = markdown

    def run_links(self, losses: Sequence[str]) -> str:
        return ""


def evaluated(
    out: Path, gpus: float = 0.0, backend: str = "ray", baseline: str = "none", pending: bool = True
) -> BackboneRun:
    """A backbone that was trained and evaluated, whose latencies are pending."""
    small = f"""--placement.backend {backend} --baseline {baseline} --decoder.dim 32 --decoder.num_heads 1
    --out {out}"""
    settings = load_settings([*small.split(), "--backbones", json.dumps([VIT])])
    (prepared,) = prepare(settings).backbones
    prepared.run.out.mkdir(parents=True)
    layouts, tasks, evaluations = [], [], []
    for run in prepared.runs:
        layout = StageLayout(consecutive(run.settings.num_blocks, 1), gpus, 1.0, 0.0, threads=1)
        layouts.append(layout)
        tasks.append(evaluation_task(run, layout, collect(), (2, 4), run.total_steps, with_baselines=False))
        reports = tuple(DepthReport(depth, 1000 * depth, 0.1 * depth) for depth in (2, 4))
        folders = {depth: str(run.out / "variants" / f"depth{depth:02d}") for depth in (2, 4)}
        evaluations.append(EvaluationResult(reports, (), {}, folders, {}))
    tracker: Any = Recorder()
    backbone = BackboneRun(
        prepared, layouts, "fp32", collect(), tracker, "vit", tasks, evaluations, latency_pending=pending
    )
    assert backbone.evaluated
    return backbone


def with_latencies(task: EvaluationTask, result: EvaluationResult) -> EvaluationResult:
    reports = [replace(r, latency_b1_ms=1.0, latency_b64_ms=2.0, device="a device") for r in result.reports]
    return replace(result, reports=tuple(reports))


def trained_rows(backbone: BackboneRun) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((backbone.out / "summary.json").read_text())
    return [row for row in rows if row["weights"] == "trained"]


def latencies(backbone: BackboneRun) -> list[object]:
    return [row["latency_b1_ms"] for row in trained_rows(backbone)]


@pytest.mark.parametrize(("backend", "gpus"), [("ray", 0.0), ("in_process", 1.0)])
def test_without_a_gpu_of_ray_the_main_thread_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, gpus: float
) -> None:
    where: list[object] = []

    def timed(task: EvaluationTask, result: EvaluationResult) -> EvaluationResult:
        where.append((os.getpid(), threading.current_thread()))
        return with_latencies(task, result)

    monkeypatch.setattr(comparison, "add_latency", timed)
    backbone = evaluated(tmp_path / "run", gpus, backend)
    measure_pending_latencies([backbone])
    assert backbone.failed is None
    assert where == [(os.getpid(), threading.main_thread())]
    assert latencies(backbone) == [1.0, 1.0]


def test_what_shared_a_gpu_is_timed_where_its_stages_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[str, float, str]] = []

    def on_worker(
        function: Any, layout: StageLayout, task: EvaluationTask, result: EvaluationResult
    ) -> EvaluationResult:
        requests.append((function.__name__, layout.gpus, task.device))
        return with_latencies(task, result)

    monkeypatch.setattr(comparison, "run_on_worker", on_worker)
    backbone = evaluated(tmp_path / "run", gpus=0.25)
    measure_pending_latencies([backbone])
    assert backbone.failed is None
    assert requests == [("add_latency", 0.25, "cuda")]
    assert latencies(backbone) == [1.0, 1.0]


def test_what_cannot_be_timed_is_finished_without_latencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def timed(task: EvaluationTask, result: EvaluationResult) -> EvaluationResult:
        if "baseline" in task.out:
            raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check that you have one.")
        return with_latencies(task, result)

    monkeypatch.setattr(comparison, "add_latency", timed)
    backbone = evaluated(tmp_path / "run", baseline="mae")
    with caplog.at_level(logging.INFO, "bim"):
        measure_pending_latencies([backbone])
    tracker: Any = backbone.tracker
    assert backbone.failed is None
    assert tracker.status == "FINISHED"
    assert tracker.tags == {}
    assert caplog.messages == [
        "measuring latency",
        "no latencies of the baseline: RuntimeError: Found no NVIDIA driver on your system.",
    ]
    assert tracker.depths == [("", 2), ("", 4), ("mae", 2), ("mae", 4)]
    assert [row["depth"] for row in trained_rows(backbone)] == [2, 4]
    assert latencies(backbone) == [1.0, 1.0]


def test_without_labels_ranks_are_told_averaged_and_pictured(tmp_path: Path) -> None:
    backbone = evaluated(tmp_path / "run", pending=False)
    unranked = backbone.evaluations[0].reports
    assert scores_line(unranked) == "measured and exported 2 depths"
    reports = tuple(
        replace(report, rankme=10.0 * report.depth, n_ranked=42, latency_b1_ms=1.0, latency_b64_ms=2.0)
        for report in unranked
    )
    assert scores_line(reports) == "RankMe by depth 20.0, 40.0"
    backbone.evaluations[0] = replace(backbone.evaluations[0], reports=reports)
    record_progress(backbone)
    tracker: Any = backbone.tracker
    assert tracker.metrics == {"mean_rankme": 30.0}
    assert tracker.pictures == ["rankme_against_latency", "loss_by_block"]
    assert [row["rankme"] for row in trained_rows(backbone)] == [20.0, 40.0]
    assert "of 42 training images" in (backbone.out / "summary.txt").read_text()


def test_variants_are_recorded_once_and_before_the_baseline_is_trained(tmp_path: Path) -> None:
    backbone = evaluated(tmp_path / "run", baseline="mae", pending=False)
    tracker: Any = backbone.tracker
    baseline = backbone.evaluations.pop()
    record_progress(backbone)
    assert tracker.depths == [("", 2), ("", 4)]
    assert not backbone.closed
    backbone.evaluations.append(baseline)
    record_progress(backbone)
    record_progress(backbone)
    assert tracker.depths == [("", 2), ("", 4), ("mae", 2), ("mae", 4)]
    assert backbone.closed


def scored(backbone: BackboneRun, **scores: float) -> BackboneRun:
    """With these values of every depth, recorded."""
    reports = tuple(replace(r, latency_b1_ms=1.0, **scores) for r in backbone.evaluations[0].reports)  # type: ignore[arg-type]
    backbone.evaluations[0] = replace(backbone.evaluations[0], reports=reports)
    record_progress(backbone)
    return backbone


@pytest.mark.parametrize(
    ("scores", "counted"),
    [
        ({"knn_top1": 0.5, "linear_top1": 0.5, "n_test": 359}, "359 test images"),
        ({"rankme": 20.0, "n_ranked": 42}, "42 training images"),
    ],
)
def test_the_picture_of_all_backbones_has_a_title_with_run_data_and_number_of_images(
    tmp_path: Path, scores: dict[str, float], counted: str
) -> None:
    backbone = scored(evaluated(tmp_path / "run", pending=False), **scores)
    tracker: Any = Recorder()
    record_comparison(comparison_job(backbone), [backbone], tracker)
    assert tracker.pictures == ["backbones"]
    name = backbone.prepared.run.settings.name
    assert f"{name}, digits, n = {counted}" in tracker.texts["backbones"]


def test_the_page_above_several_backbones_says_what_they_train_from_its_first_minute(tmp_path: Path) -> None:
    tracker: Any = Recorder()
    backbone = evaluated(tmp_path / "run")
    describe_comparison(comparison_job(backbone), tracker)
    epochs = backbone.prepared.run.settings.schedule.epochs
    assert f"1 backbone side by side, {epochs} epochs of 1,258 images of digits" in tracker.note


def comparison_job(backbone: BackboneRun) -> PreparedJob:
    settings = backbone.prepared.run.settings
    job = SimpleNamespace(out=backbone.out.parent, settings=settings, backbones=[backbone.prepared])
    return cast(PreparedJob, job)


def test_what_waits_for_its_latencies_is_not_recorded(tmp_path: Path) -> None:
    backbone = evaluated(tmp_path / "run")
    tracker: Any = backbone.tracker
    record_progress(backbone)
    assert tracker.depths == []
    assert not backbone.closed


def test_a_failure_leaves_its_traceback_and_its_tag_until_the_backbone_is_finished(tmp_path: Path) -> None:
    backbone = evaluated(tmp_path / "run", pending=False)
    tracker: Any = backbone.tracker
    traceback = backbone.out / "failure.txt"
    record_failure(backbone, ZeroDivisionError("by nothing"))
    assert "ZeroDivisionError: by nothing" in traceback.read_text()
    record_progress(backbone)
    assert backbone.failed == "ZeroDivisionError: by nothing"
    assert tracker.tags == {"failed": "ZeroDivisionError: by nothing"}
    assert tracker.status == "FAILED"
    backbone.failed, backbone.closed = None, False  # as a resumed process finds it
    record_progress(backbone)
    assert backbone.failed is None
    assert not traceback.exists()
    assert tracker.tags == {}
    assert tracker.status == "FINISHED"


def test_a_failure_while_recording_is_that_of_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = evaluated(tmp_path / "run", pending=False)
    tracker: Any = backbone.tracker

    def refused(record: Any, name: str) -> None:
        raise TrainingError("no space left")

    monkeypatch.setattr(tracker, "log_depth", refused)
    record_progress(backbone)
    assert backbone.failed == "no space left"
    assert tracker.status == "FAILED"


def test_the_failure_of_a_single_backbone_is_raised(tmp_path: Path) -> None:
    backbone = evaluated(tmp_path / "run")
    backbone.prepared = replace(backbone.prepared, name="")
    with pytest.raises(ZeroDivisionError), backbone.isolated():
        raise ZeroDivisionError
    assert backbone.failed is None
    assert not (backbone.out / "failure.txt").exists()


def test_a_traceback_belongs_to_the_last_failure(tmp_path: Path) -> None:
    backbone = evaluated(tmp_path / "run")
    record_failure(backbone, ZeroDivisionError("by nothing"))
    record_failure(backbone, TrainingError("the loss is not finite"))
    assert backbone.failed == "the loss is not finite"
    assert not (backbone.out / "failure.txt").exists()


class LostLease:
    def check(self) -> None:
        raise LeaseLostError("the output directory was taken over by process 7")


def test_a_backbone_whose_directory_another_process_took_over_records_nothing_and_leaves_mlflow_to_it(
    tmp_path: Path,
) -> None:
    backbone = evaluated(tmp_path / "out", pending=False)
    backbone.lease = LostLease()  # type: ignore[assignment]
    before = sorted(backbone.out.rglob("*"))
    record_progress(backbone)
    record_progress(backbone)
    assert backbone.failed == "the output directory was taken over by process 7"
    assert sorted(backbone.out.rglob("*")) == before
    tracker: Any = backbone.tracker
    assert (tracker.status, tracker.tags, tracker.depths) == ("ABANDONED", {}, [])
