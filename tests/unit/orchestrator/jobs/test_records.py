from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.jobs.backbone_run import BackboneRun
from bim.orchestrator.jobs.open_backbone import describe_beginning, undecided_settings
from bim.orchestrator.jobs.prepare import prepare
from bim.orchestrator.jobs.record_variants import (
    NAMED_BAD_IMAGES,
    SECTIONS,
    begin_variants,
    report_bad_images,
)
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.search.space import NOT_SEARCHABLE


def evaluation(count: int) -> EvaluationResult:
    bad = {f"{number}.png": "it is empty (0 bytes)" for number in range(count)}
    return EvaluationResult((), (), {}, {}, {}, bad)


@pytest.mark.parametrize("count", [0, 1, NAMED_BAD_IMAGES + 3])
def test_unreadable_images_of_an_evaluation_are_counted_and_named_in_one_line(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    report_bad_images(evaluation(count))
    assert len(caplog.messages) == (count > 0)
    if count:
        assert f"left out {count} unreadable image" in caplog.text
        assert "0.png (it is empty (0 bytes))" in caplog.text
        assert ("and 3 more" in caplog.text) == (count > NAMED_BAD_IMAGES)


class Beginnings:
    """A tracker that keeps what the runs of the depths begin with, and the text of the page."""

    def __init__(self) -> None:
        self.params: dict[int, dict[str, object]] = {}
        self.note = ""

    def begin_depths(self, params: dict[int, dict[str, object]], series: str) -> None:
        self.params = params

    def describe(self, markdown: str) -> None:
        self.note = markdown

    def run_links(self, losses: Sequence[str]) -> str:
        return "links"


SEARCH = [
    *["--placement.backend", "ray", "--search.trials", "4"],
    *["--search.space", "{mask.ratio: [0.5], optim.blr: [1.0e-2]}"],
]


def test_depths_begin_without_what_the_search_chooses(tmp_path: Path) -> None:
    (prepared,) = prepare(load_settings([*SEARCH, "--out", str(tmp_path / "run")])).backbones
    run = prepared.run
    undecided = undecided_settings(run)
    assert set(undecided) == {"mask.ratio", "optim.blr"}
    tracker: Any = Beginnings()
    begin_variants(tracker, run, run.depths, undecided=undecided)
    names = {"depth", "backbone", "block", "decoder", "epochs", "seed"}
    assert [set(params) for params in tracker.params.values()] == [names] * len(run.depths)
    begin_variants(tracker, run, run.depths)
    assert [set(params) - names for params in tracker.params.values()] == [{"mask_ratio"}] * len(run.depths)


def test_no_setting_that_a_search_may_change_is_a_parameter_that_depths_begin_with(tmp_path: Path) -> None:
    """Each parameter is of a section that waits for the search, or comes from settings that are not searched."""
    (prepared,) = prepare(load_settings([*SEARCH, "--out", str(tmp_path / "run")])).backbones
    tracker: Any = Beginnings()
    begin_variants(tracker, prepared.run, prepared.run.depths)
    (first, *_) = tracker.params.values()
    fixed = {"depth": "blocks", "backbone": "backbone.", "block": "blocks", "epochs": "schedule.epochs"}
    assert set(first) == {*fixed, "seed", *SECTIONS}
    assert {*fixed.values(), "seed"} <= set(NOT_SEARCHABLE)


def test_the_page_of_a_run_tells_its_search_from_the_first_minute(tmp_path: Path) -> None:
    (prepared,) = prepare(load_settings([*SEARCH, "--out", str(tmp_path / "run")])).backbones
    tracker: Any = Beginnings()
    describe_beginning(BackboneRun(prepared, [], "fp32", collect(), tracker), ["about 3 s an epoch"])
    assert "epochs of 1,258 images of digits. links." in tracker.note
    assert "a search of up to 4 trials over mask.ratio, optim.blr" in tracker.note
    assert "about 3 s an epoch" in tracker.note
