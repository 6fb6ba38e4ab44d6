"""What is wrong with a search is found before anything starts."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import SettingsError
from bim.orchestrator.jobs.prepare import prepare
from bim.orchestrator.jobs.search_job import search_due
from bim.orchestrator.runs.output_dir import OutputError
from bim.orchestrator.search.record import FOLDER, RECORD, load_result, save_result
from bim.orchestrator.search.results import SearchResult, TrialRow, TrialScore


def problem(*argv: str) -> str:
    with pytest.raises((SettingsError, OutputError)) as caught:
        prepare(load_settings(argv))
    return str(caught.value)


def begun(out: Path, finished: bool = False, **asked: object) -> SearchResult:
    """What the default command leaves of its search, cut off or not."""
    (prepared,) = prepare(load_settings(["--out", str(out)])).backbones
    settings = prepared.run.settings
    rows = (
        TrialRow(0, {"mask.ratio": 0.75}, "finished", "", (TrialScore(12, 0.5, {2: 0.5}),), 1.0),
        TrialRow(1, {"mask.ratio": 0.6}, "finished", "", (TrialScore(12, 0.6, {2: 0.6}),), 1.0),
    )
    result = SearchResult(
        "knn_top1", 180, 12, {"mask.ratio": 0.75}, settings.search.model_dump(mode="json") | asked,
        prepared.run.fingerprint, rows, finished,
    )  # fmt: skip
    out.mkdir()
    from bim.orchestrator.config.transforms import settings_to_yaml

    (out / "settings.yaml").write_text(settings_to_yaml(settings))
    save_result(out, result)
    return result


def test_a_search_needs_ray(tmp_path: Path) -> None:
    said = problem("--placement.backend", "in_process", "--out", str(tmp_path / "a"))
    assert (
        said == "a search needs placement.backend ray; to train in this process alone set search.trials to 0"
    )
    prepare(load_settings(["--placement.backend", "in_process", "--search.trials", "0"]))


def test_optuna_is_asked_for_only_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--search.searcher", "optuna", "--out", str(tmp_path / "a")]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "optuna" else find(name))
    prepare(load_settings(argv))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    assert "needs the package optuna: pip install '.[optuna]'; or set it to random" in problem(*argv)


def test_trial_0_must_be_possible_in_its_shorter_time(tmp_path: Path) -> None:
    said = problem(
        "--schedule.resolution",
        "[[0, 24], [1, 32]]",
        "--search.trial_epochs",
        "6",
        "--out",
        str(tmp_path / "a"),
    )
    assert said.startswith(
        "the baseline config, trial 0 of the search, cannot be trained for search.trial_epochs: "
    )


def test_a_wrong_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    assert "seed cannot be searched" in problem("--search.space", "{seed: [1]}", "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_search_that_was_cut_off_is_due_and_a_finished_one_is_not(tmp_path: Path) -> None:
    begun(tmp_path / "cut")
    begun(tmp_path / "done", finished=True)
    for flag in ("--resume", "--search.resume"):
        cut = prepare(load_settings(["--out", str(tmp_path / "cut"), flag])).backbones[0].run
        done = prepare(load_settings(["--out", str(tmp_path / "done"), flag])).backbones[0].run
        assert search_due(cut.settings, cut.out)
        assert cut.settings.mask.ratio == 0.75
        assert not search_due(done.settings, done.out)
        # That of the search's best trial, though settings.yaml does not hold it yet.
        assert done.settings.mask.ratio == 0.6


def test_a_search_is_continued_as_it_was_begun_or_not_at_all(tmp_path: Path) -> None:
    begun(tmp_path / "a")
    argv = ["--out", str(tmp_path / "a"), "--resume"]
    assert "search.trials is 9, was 4" in problem(*argv, "--search.trials", "9")
    assert "optim.blr is 0.1, was 0.008" in problem(*argv, "--optim.blr", "0.1")
    assert "search.concurrent is 1, was None" in problem(*argv, "--search.concurrent", "1")
    prepare(load_settings([*argv, "--search.trial_stages", "2"]))
    prepare(load_settings([*argv, "--search.trials", "0"]))  # leaves it, and trains the recipe


def test_a_search_of_other_images_is_not_continued(tmp_path: Path) -> None:
    result = begun(tmp_path / "a")
    other = asdict(result) | {"fingerprint": "other", "rows": result.rows}
    save_result(tmp_path / "a", SearchResult(**other))
    assert "the images behind data.source have changed" in problem("--out", str(tmp_path / "a"), "--resume")


def test_there_must_be_a_search_to_continue(tmp_path: Path) -> None:
    begun(tmp_path / "a")
    (tmp_path / "a" / FOLDER / RECORD).unlink()
    assert load_result(tmp_path / "a") is None
    assert "there is no search to continue in" in problem("--out", str(tmp_path / "a"), "--search.resume")
