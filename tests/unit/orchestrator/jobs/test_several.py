"""What a backbone among others costs when something goes wrong after its training: never its results."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.distributed.placement import StageLayout, consecutive
from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.export.model_card import CardFacts
from bim.orchestrator.jobs import concurrent_runs as courses
from bim.orchestrator.jobs import several
from bim.orchestrator.jobs.concurrent_runs import BackboneRun, record_failure
from bim.orchestrator.jobs.evaluate_checkpoint import EvaluationTask
from bim.orchestrator.jobs.job import evaluation_task
from bim.orchestrator.jobs.several import prepare_several
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.training.errors import TrainingError

VIT = {
    "name": "vit_tiny_patch16_224",
    "called": "vit",
    "model_args": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
    "blocks": 2,
}


@dataclass
class Recorder:
    """A tracker that keeps what a run is known by: its tags, its events, its end."""

    tags: dict[str, object] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    depths: list[tuple[str, int]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    status: str = "RUNNING"
    uri_to_set: None = None

    def set_tags(self, tags: dict[str, object]) -> None:
        self.tags |= tags

    def remove_tag(self, key: str) -> None:
        self.tags.pop(key, None)

    def log_event(self, text: str) -> None:
        self.events.append(text)

    def log_depth(self, record: Any, name: str) -> None:
        self.depths.append((record.series, record.depth))

    def finish(self, status: str) -> None:
        self.status = status

    def history(self, name: str) -> list[tuple[int, float]]:
        return []

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.metrics |= values

    def log_file(self, path: Path) -> None: ...

    def log_picture(self, figure: object, name: str) -> None:
        self.pictures.append(name)

    def describe(self, markdown: str, pictures: list[str]) -> None: ...


def trained(out: Path, gpus: float = 0.0, backend: str = "ray", baseline: str = "none") -> BackboneRun:
    """A backbone that was trained and assessed, and not timed."""
    small = f"""--placement.backend {backend} --baseline {baseline} --decoder.dim 32 --decoder.num_heads 1
    --out {out}"""
    settings = load_settings([*small.split(), "--backbones", json.dumps([VIT])])
    (member,) = prepare_several(settings).members
    prepared = member.prepared
    families = [family for family in (prepared.family, prepared.baseline) if family is not None]
    prepared.family.out.mkdir(parents=True)
    plans, jobs, found = [], [], []
    for family in families:
        layout = StageLayout(consecutive(family.settings.num_blocks, 1), gpus, 1.0, 0.0, threads=1)
        plans.append((family, layout))
        jobs.append(evaluation_task(family, layout, CardFacts("a", 0), (2, 4), references=False))
        reports = tuple(DepthReport(depth, 1000 * depth, 0.1 * depth) for depth in (2, 4))
        folders = {depth: str(family.out / "variants" / f"depth{depth:02d}") for depth in (2, 4)}
        found.append(EvaluationResult(reports, (), {}, folders, {}))
    said: list[str] = []
    tracker: Any = Recorder()
    course = BackboneRun(member.name, prepared, plans, "fp32", collect(), tracker, said.append, jobs, found)
    assert course.measured
    assert course.latency_pending
    return course


def with_latencies(job: EvaluationTask, found: EvaluationResult) -> EvaluationResult:
    reports = [replace(r, latency_ms_b1=1.0, latency_ms_b64=2.0, device="a device") for r in found.reports]
    return replace(found, reports=tuple(reports))


def latencies(course: BackboneRun) -> list[object]:
    rows = json.loads((course.prepared.family.out / "summary.json").read_text())
    return [row["latency_b1_ms"] for row in rows if row["weights"] == "trained"]


@pytest.mark.parametrize(("backend", "gpus"), [("ray", 0.0), ("in_process", 1.0)])
def test_without_a_gpu_of_ray_the_main_thread_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, gpus: float
) -> None:
    where: list[object] = []

    def timed(job: EvaluationTask, found: EvaluationResult) -> EvaluationResult:
        where.append((os.getpid(), threading.current_thread()))
        return with_latencies(job, found)

    monkeypatch.setattr(several, "add_latency", timed)
    course = trained(tmp_path / "run", gpus, backend)
    assert several._record(course).failed is None
    assert where == [(os.getpid(), threading.main_thread())]
    assert latencies(course) == [1.0, 1.0]


def test_what_shared_a_gpu_is_timed_where_its_stages_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float, str]] = []

    def beside(
        function: Any, layout: StageLayout, job: EvaluationTask, found: EvaluationResult
    ) -> EvaluationResult:
        asked.append((function.__name__, layout.gpus, job.device))
        return with_latencies(job, found)

    monkeypatch.setattr(several, "run_on_worker", beside)
    course = trained(tmp_path / "run", gpus=0.25)
    assert several._record(course).failed is None
    assert asked == [("timed", 0.25, "cuda")]
    assert latencies(course) == [1.0, 1.0]


def test_what_cannot_be_timed_is_finished_without_latencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(job: EvaluationTask, found: EvaluationResult) -> EvaluationResult:
        if "baseline" in job.out:
            raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check that you have one.")
        return with_latencies(job, found)

    monkeypatch.setattr(several, "add_latency", timed)
    course = trained(tmp_path / "run", baseline="mae")
    result = several._record(course)
    tracker: Any = course.tracker
    assert result.failed is course.failed is None
    assert tracker.status == "FINISHED"
    assert tracker.tags == {}
    assert tracker.events == [
        "no latencies of the baseline: RuntimeError: Found no NVIDIA driver on your system."
    ]
    assert tracker.depths == [("", 2), ("", 4), ("mae", 2), ("mae", 4)]
    assert [row["depth"] for row in result.trained] == [2, 4]
    assert latencies(course) == [1.0, 1.0]


def test_without_labels_ranks_are_told_averaged_and_pictured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "add_latency", with_latencies)
    course = trained(tmp_path / "run")
    unranked = course.found[0].reports
    assert courses._scores(unranked) == "measured and exported 2 depths"
    reports = tuple(replace(report, rankme=10.0 * report.depth, n_ranked=42) for report in unranked)
    assert courses._scores(reports) == "RankMe by depth 20.0, 40.0"
    course.found[0] = replace(course.found[0], reports=reports)
    result = several._record(course)
    tracker: Any = course.tracker
    assert tracker.metrics == {"mean_rankme": 30.0}
    assert tracker.pictures == ["rankme_against_latency", "loss_by_block"]
    assert [row["rankme"] for row in result.trained] == [20.0, 40.0]
    assert "of 42 training images" in (course.prepared.family.out / "summary.txt").read_text()


def test_a_failure_leaves_its_traceback_and_its_tag_until_the_backbone_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "add_latency", with_latencies)
    course = trained(tmp_path / "run")
    tracker: Any = course.tracker
    kept = course.prepared.family.out / "failure.txt"
    record_failure(course, ZeroDivisionError("by nothing"))
    assert "ZeroDivisionError: by nothing" in kept.read_text()
    assert several._record(course).failed == "ZeroDivisionError: by nothing"
    assert tracker.tags == {"failed": "ZeroDivisionError: by nothing"}
    assert tracker.status == "FAILED"
    course.failed = None
    assert several._record(course).failed is None
    assert not kept.exists()
    assert tracker.tags == {}
    assert tracker.status == "FINISHED"


def test_a_traceback_belongs_to_the_last_failure(tmp_path: Path) -> None:
    course = trained(tmp_path / "run")
    record_failure(course, ZeroDivisionError("by nothing"))
    record_failure(course, TrainingError("the loss is not finite"))
    assert course.failed == "the loss is not finite"
    assert not (course.prepared.family.out / "failure.txt").exists()
