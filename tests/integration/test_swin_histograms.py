"""A Swin on visible tokens with HOG of a level's own cell: LocalMIM's ladder of targets (arXiv 2303.05251)."""

from __future__ import annotations

from bim.orchestrator.training.messages import StepRequest
from bim.orchestrator.training.stage_group import InProcessStages
from tests.integration.tiny import shifted


def test_every_level_learns_its_own_histograms() -> None:
    spec, images = shifted()
    group = InProcessStages(spec, images.train_batches, ((0, 1, 2, 3),), threads=1)
    group.restore(None, 0, lambda: False)
    losses = []
    for step in range(8):
        report = group.wait(group.submit(StepRequest(step, 1e-3)), 0)
        losses.append([stage.blocks[k]["loss"] for stage in report.stages for k in stage.blocks])
    assert len(losses[0]) == 4
    assert all(last < 0.9 * first for first, last in zip(losses[0], losses[-1], strict=True))
