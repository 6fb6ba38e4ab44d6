"""What is timed later keeps the weights that were measured; a ResNet, whose batch norms are gathered again before that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.jobs.evaluate_checkpoint import add_latency, evaluate_checkpoint
from bim.orchestrator.jobs.evaluation_task import evaluation_task
from bim.orchestrator.runs.prepare import resolve_run
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.runs.train import resolve_layout, train
from bim.orchestrator.training.callbacks import NullCallback, StopRequest

RESNET = {"img_size": 64, "layers": [1, 1, 1, 1], "channels": [4, 8, 12, 16]}


@pytest.mark.slow
def test_timing_adds_latencies_to_the_cards_and_leaves_the_weights(tmp_path: Path) -> None:
    changes = {
        "backbone": {"name": "resnet50", "model_args": RESNET},
        "mask.encode": "all",
        "decoder.dim": 16,
        "decoder.num_heads": 1,
        "data.test_fraction": 0.7,
        "schedule.epochs": 1,
        "schedule.warmup_epochs": 0,
        "search.trials": 0,
        "placement.backend": "in_process",
    }
    settings = with_changes(load_settings([]), changes)
    run, _, _ = resolve_run(settings, tmp_path)
    layout = resolve_layout(settings, ClusterResources(2.0, 0.0))
    train(run, layout, "fp32", NullCallback(), StopRequest())
    task = evaluation_task(run, layout, collect(), run.depths, run.total_steps, with_baselines=False)
    untimed = evaluate_checkpoint(replace(task, evaluation=replace(task.evaluation, latency=False)))
    before = {
        depth: load_file(Path(folder) / "model.safetensors") for depth, folder in untimed.folders.items()
    }
    timed = add_latency(task, untimed)
    assert all(report.latency_b1_ms for report in timed.reports)
    for depth, folder in timed.folders.items():
        after = load_file(Path(folder) / "model.safetensors")
        assert all(after[name].equal(value) for name, value in before[depth].items())
        assert "CPU" in (Path(folder) / "README.md").read_text()
