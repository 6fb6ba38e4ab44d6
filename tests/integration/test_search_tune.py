"""The search and Ray Tune: trials that do nothing but report, one of which dies; cut off and continued."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.search import tuner
from bim.orchestrator.search.record import FOLDER, load_result
from bim.orchestrator.search.results import SearchResult, TrialRow
from bim.orchestrator.search.space import Choice
from bim.orchestrator.search.spec import SearchSpec, TrialSpec
from bim.orchestrator.training.callbacks import StopRequest

pytestmark = pytest.mark.usefixtures("ray_cluster")

BASELINE = {"mask.ratio": 0.75}


def reporting_trials(spec: TrialSpec) -> Callable[[dict[str, Any]], None]:
    """In place of `make_trainable`: four epochs with scores, the better the lower the number; trial 1 dies once."""

    def trial(config: dict[str, Any]) -> None:
        number, died = config["number"], Path(spec.folder).parent / "died"
        for epoch in (1, 2, 3, 4):
            if number == 1 and epoch == 2 and not died.exists():
                died.touch()
                os._exit(1)
            score = 1 - number / 10
            tune.report({"epoch": epoch, "score": score, "depths": {"2": score}, "gflops": 1.0})

    return trial


class Callback:
    """Keeps the events, and asks for the end of the search at one of them."""

    def __init__(self, stop_at: str = "") -> None:
        self.stop, self.events, self._stop_at = StopRequest(), list[str](), stop_at
        self.cannot_be_pickled = (number for number in range(3))  # as the contexts of a job

    def _keep(self, event: str) -> None:
        self.events.append(event)
        if event == self._stop_at:
            self.stop.reason = "SIGTERM"

    def on_begin(self, result: SearchResult, row: TrialRow) -> None:
        self._keep(f"{row.number} begins")

    def on_score(self, result: SearchResult, row: TrialRow) -> None:
        self._keep(f"{row.number} scored at {row.epoch}")

    def on_retry(self, result: SearchResult, row: TrialRow) -> None:
        self._keep(f"{row.number} again: {row.status_reason}")

    def on_end(self, result: SearchResult, row: TrialRow) -> None:
        self._keep(f"{row.number} {row.status}")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def run(out: Path, callback: Callback, trials: int = 2) -> SearchResult:
    layout = StageLayout(((0,),), 0.0, 0.5, 0.4, 1)
    trial = TrialSpec({}, layout, "fp32", str(out / FOLDER / "trials"), EvalConfig(), "")
    changes = {"search.trials": trials, "search.grace_epochs": 2, "search.every_epochs": 1}
    empty = SearchResult("knn_top1", 100, 4, BASELINE)
    space = {"mask.ratio": Choice((0.75, 0.5, 0.6, 0.4)[:trials])}
    spec = SearchSpec(with_changes(load_settings([]), changes), space, trial, load_result(out) or empty)
    return tuner.search(spec, out, callback, callback.stop)


@pytest.mark.slow
def test_a_search_is_continued_from_its_own_record_and_nothing_in_its_folder_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "make_trainable", reporting_trials)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    first = Callback(stop_at="0 scored at 3")
    assert not run(tmp_path, first).finished
    assert "0 scored at 4" not in first.events
    assert [path.name for path in (tmp_path / FOLDER).iterdir() if path.name.startswith(".")] == []
    bomb = pickle.dumps(Bomb(str(tmp_path / "run by pickle")))
    for name in ("tune", ".tune-abc", ".tune-abc/trials"):
        (tmp_path / FOLDER / name).mkdir(parents=True)
        for file in ("tuner.pkl", "searcher-state.pkl", "search_gen_state.pkl", "experiment_state-1.json"):
            (tmp_path / FOLDER / name / file).write_bytes(bomb)
    second = Callback()
    result = run(tmp_path, second)
    assert result.finished
    assert [row.status for row in result.rows] == ["finished", "stopped early"]
    assert result.best.number == 0
    scores = [event for event in first.events + second.events if "scored" in event]
    assert sorted(set(scores)) == sorted(scores)  # none twice, though the trials began again
    assert second.events[0] == "0 begins"
    assert "1 again: its process died, possibly out of memory" in second.events
    assert not (tmp_path / "run by pickle").exists()
    assert not (tmp_path / FOLDER / ".tune-abc").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)] == handlers


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "Task was killed due to the node running low on memory.",
            "killed because its machine ran low on memory",
        ),
        ("The actor died because its node has died. Node Id: abc", "its machine was lost"),
        (
            "Worker unexpectedly exits with a connection error code 2.",
            "its process died, possibly out of memory",
        ),
        (None, "its process died, possibly out of memory"),
    ],
)
def test_the_cause_of_a_lost_trial_is_what_ray_says_of_it(
    tmp_path: Path, text: str | None, cause: str
) -> None:
    file = tmp_path / "error.txt"
    if text is not None:
        file.write_text(text)
    assert tuner._cause_of_death(SimpleNamespace(error_file=str(file))).endswith(cause)
    assert (
        tuner._cause_of_death(SimpleNamespace(error_file=None)) == "its process died, possibly out of memory"
    )
