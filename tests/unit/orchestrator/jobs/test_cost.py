"""What a job costs: probed once, where the device is; with search and baseline, and of several backbones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import SettingsError
from bim.orchestrator.distributed.placement import ClusterResources, StageLayout
from bim.orchestrator.jobs import cost
from bim.orchestrator.jobs.automatic import automatic_settings
from bim.orchestrator.jobs.cost import estimate_backbone, expected_precision, step_times
from bim.orchestrator.jobs.dry_run import dry_run_lines
from bim.orchestrator.jobs.layouts import single_layouts
from bim.orchestrator.jobs.prepare import prepare
from bim.orchestrator.reporting.estimate import sum_lines, summary_lines
from bim.orchestrator.runs.output_dir import OutputError
from bim.orchestrator.runs.step_probe import Probe, StepTimes
from tests.e2e.command import image_folder

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
TINY = ["--backbone.model_args", json.dumps(ARGS), "--decoder.dim", "24", "--decoder.num_heads", "1"]
CLUSTER = ClusterResources(8.0, 0.0)


def probes(monkeypatch: pytest.MonkeyPatch) -> list[Probe]:
    """The probes from here on, which take no time."""
    done: list[Probe] = []

    def probe(probe: Probe, images: object = None) -> StepTimes:
        done.append(probe)
        return StepTimes((0.1,) * len(probe.layout.stage_blocks), 0.01)

    monkeypatch.setattr(cost, "probe_steps", probe)
    monkeypatch.setattr("bim.orchestrator.runs.step_times._known", {})
    return done


def test_settings_are_chosen_and_their_cost_is_told_by_one_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = probes(monkeypatch)
    source = image_folder(tmp_path / "images", "{label}/{number}.png", 300)
    settings = load_settings(["--data.source", str(source)], automatic_settings)
    chosen = len(done)
    text = "\n".join(dry_run_lines(prepare(settings)))
    assert len(done) == chosen >= 1
    assert "of scores in between" in text


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--out", "used"], OutputError),
        (["--out", "new", "--resume"], OutputError),
        (["--tracking.model_name", "a/b"], SettingsError),
        (["--plugins", "no_such_module"], SettingsError),
    ],
    ids=str,
)
def test_what_is_wrong_beside_the_images_is_told_before_anything_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], error: type[Exception]
) -> None:
    done = probes(monkeypatch)
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", "{number}.png", 60)
    image_folder(tmp_path / "used", "{number}.png", 1)
    with pytest.raises(error):
        load_settings(["--data.source", "images", *argv], automatic_settings)
    assert done == []


def test_model_arguments_as_a_mapping_leave_the_others_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes(monkeypatch)
    source = image_folder(tmp_path / "images", "{number}.png", 60)
    argv = ["--data.source", str(source), "--backbone.model_args", "{img_size: 48}"]
    model_args = load_settings(argv, automatic_settings).backbone.model_args
    assert model_args == {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 8, "num_heads": 3}


def test_the_cost_of_a_search_is_told_where_it_could_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probes(monkeypatch)
    argv = ["--data.source", str(image_folder(tmp_path / "images", "{number}.png", 60))]
    with caplog.at_level("INFO", logger="bim"):
        load_settings([*argv, "--schedule.epochs", "80"], automatic_settings)
        assert (
            "  no search: --search.trials 8 --search.trial_epochs 5 would train for 32 to 40 epochs"
            in caplog.text
        )
        caplog.clear()
        load_settings([*argv, "--schedule.epochs", "80", "--search.grace_epochs", "20"], automatic_settings)
        assert "no search" not in caplog.text


def test_search_and_baseline_are_in_the_cost(tmp_path: Path) -> None:
    argv = [*TINY, "--baseline", "mae", "--search.trials", "4", "--out", str(tmp_path / "run")]
    (backbone,) = prepare(load_settings(argv)).backbones
    layouts, times = single_layouts(backbone, CLUSTER), StepTimes((0.1, 0.1, 0.1, 0.1), 0.02)
    estimate = estimate_backbone(backbone, layouts, "fp32", CLUSTER, 8, times)
    assert estimate.baseline is not None
    assert estimate.search is not None
    # One end-to-end run computes the blocks once and has one decoder in place of four.
    assert 0.2 < estimate.baseline.training_s / (4 * estimate.run.training_s) < 1
    assert estimate.search.epochs == 12
    assert 0 < estimate.search.expected_s < estimate.search.longest_s < estimate.run.training_s
    assert estimate.total_s == pytest.approx(
        estimate.run.total_s + estimate.baseline.total_s + estimate.search.expected_s
    )
    lines = summary_lines(estimate, None)
    text = "\n".join(lines)
    assert "search: 4 trials of 12 epochs before it, about " in text
    assert "baseline: one end-to-end MAE run after it, " in text
    assert "in all about " in text
    assert max(map(len, lines)) <= 100
    computed = estimate_backbone(backbone, layouts, "fp32", CLUSTER, 8, None)
    assert computed.search is not None
    assert computed.baseline is not None


def test_several_backbones_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes(monkeypatch)
    name = "vit_tiny_patch16_224"
    entries = json.dumps(
        [
            {"name": name, "alias": "narrow", "model_args": {**ARGS, "embed_dim": 12}},
            {"name": name, "alias": "wide", "model_args": ARGS},
        ]
    )
    job = prepare(
        load_settings(
            [*TINY[2:], "--search.trials", "0", "--backbones", entries, "--out", str(tmp_path / "run")]
        )
    )
    text = "\n".join(dry_run_lines(job))
    assert text.count("4 separate MAE runs") == 2
    assert "all 2 backbones, " in text
    estimates = [
        estimate_backbone(backbone, single_layouts(backbone, CLUSTER), "fp32", CLUSTER, 4, None)
        for backbone in job.backbones
    ]
    assert sum_lines(estimates, 1, None)[0].startswith("all 2 backbones, one after another: about ")
    assert sum_lines(estimates, 2, None)[0].startswith("all 2 backbones, 2 at a time: about ")


def test_a_driver_without_a_gpu_has_a_node_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    @contextmanager
    def cluster() -> Iterator[None]:
        calls.append("connected")
        yield

    def on_worker(function: Any, layout: StageLayout, *args: object, within_s: float | None = None) -> Any:
        calls.append(within_s)
        return function(*args)

    done = probes(monkeypatch)
    monkeypatch.setattr(cost, "ray_cluster", cluster)
    monkeypatch.setattr(cost, "run_on_worker", on_worker)
    monkeypatch.setattr(cost, "resolve_precision", lambda settings, layout: "bf16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (backbone,) = prepare(load_settings([*TINY, "--out", str(tmp_path / "run")])).backbones
    layout = StageLayout(tuple((k,) for k in range(4)), 1.0, 1.0, 1.0, 1)
    images = (backbone.source, backbone.splits)
    assert expected_precision(backbone.run.settings, layout) == "bf16"
    first = step_times(backbone.run, images, layout, "bf16")
    assert calls == ["connected", "connected", 120.0]
    assert step_times(backbone.run, images, layout, "bf16") == first
    assert len(done) == 1
