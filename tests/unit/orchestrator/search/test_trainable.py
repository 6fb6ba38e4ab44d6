"""What a trial makes of its configuration, and what it reports of its end; without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.search import trainable
from bim.orchestrator.search.spec import TrialSpec
from bim.orchestrator.search.trial import InfeasibleSettings
from bim.orchestrator.training.errors import TrainingError

CONFIG = {"number": 3, "changes": {"schedule.resolution": [[0, 24], [0.5, 32]], "mask.ratio": 0.6}}


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(trainable.ray.util, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(trainable.tune, "report", reports.append)
    return reports


def trial(folder: Path) -> Any:
    layout = StageLayout(((0,),), 0.0, 0.5, 0.4, 1)
    return trainable.make_trainable(TrialSpec({}, layout, "fp32", str(folder), EvalConfig(), ""))


def test_a_trial_has_its_own_changes_and_the_folder_of_its_number(
    tmp_path: Path, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(trainable, "run_trial", lambda *arguments: calls.append(arguments))
    trial(tmp_path)(CONFIG)
    ((spec, changes, name, *_),) = calls
    assert (changes, name) == (CONFIG["changes"], "3")
    assert spec.folder == str(tmp_path)
    assert reports == []


@pytest.mark.parametrize(
    ("error", "report"),
    [
        (InfeasibleSettings("nothing is visible"), {"infeasible": "nothing is visible"}),
        (TrainingError("the loss is not finite\nat length"), {"failed": "the loss is not finite"}),
        (MemoryError(), {"failed": "MemoryError: "}),
    ],
    ids=repr,
)
def test_the_cause_of_its_end_is_reported(
    tmp_path: Path,
    reports: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    report: dict[str, str],
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(trainable, "run_trial", fail)
    if "failed" in report:
        with pytest.raises(type(error)):
            trial(tmp_path)(CONFIG)
    else:
        trial(tmp_path)(CONFIG)
    assert reports == [report]
