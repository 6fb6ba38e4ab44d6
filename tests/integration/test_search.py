"""A search with real Tune, real actors and tiny trials: one fails, one is infeasible, one is stopped early."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import settings_to_mapping, with_changes
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.runs.prepare import resolve_run
from bim.orchestrator.search.objective import metric_of
from bim.orchestrator.search.record import BEST, FOLDER, load_result
from bim.orchestrator.search.results import SearchResult, TrialRow
from bim.orchestrator.search.space import baseline_values, space_of
from bim.orchestrator.search.spec import SearchSpec, TrialSpec
from bim.orchestrator.search.trial import trial_placement
from bim.orchestrator.search.tuner import search
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ARGS = "{img_size: 16, patch_size: 4, embed_dim: 32, depth: 4, num_heads: 2}"
EPOCHS = 4


def recipe(out: Path, space: str, **changes: object) -> Settings:
    tiny = f"""--decoder.dim 32 --decoder.num_heads 1 --data.workers 0 --data.batch_size 128 --schedule.epochs 8
    --schedule.warmup_epochs 0 --search.trials 4 --search.trial_epochs {EPOCHS} --search.grace_epochs 2
    --search.every_epochs 1 --search.trial_stages 1 --out {out}"""
    settings = load_settings(
        [*tiny.split(), "--backbone.model_args", ARGS, "--search.space", space],
    )
    return with_changes(settings, {key.replace("__", "."): value for key, value in changes.items()})


@dataclass
class Callback:
    """Keeps what happened; asks for the end of the search at the n-th score of a trial."""

    stop: StopRequest = field(default_factory=StopRequest)
    stop_at: tuple[int, int] | None = None
    happened: list[str] = field(default_factory=list)

    def on_begin(self, result: SearchResult, row: TrialRow) -> None:
        self.happened.append(f"{row.number} begins after {row.epoch}")

    def on_score(self, result: SearchResult, row: TrialRow) -> None:
        self.happened.append(f"{row.number} scored at {row.epoch}")
        if (row.number, row.epoch) == self.stop_at:
            self.stop.reason = "SIGINT"

    def on_retry(self, result: SearchResult, row: TrialRow) -> None:
        self.happened.append(f"{row.number} is tried again after {row.epoch}: {row.status_reason}")

    def on_end(self, result: SearchResult, row: TrialRow) -> None:
        self.happened.append(f"{row.number} {row.status}")


def run(settings: Settings, out: Path, listener: Callback) -> SearchResult:
    """The search as the main job starts it."""
    family, source, splits = resolve_run(settings, out)
    space = space_of(settings, family.backbone)
    layout, beside = trial_placement(settings, ClusterResources(2, 0))
    folder = str(out / FOLDER / "trials")
    plan = TrialSpec(
        settings_to_mapping(settings), layout, "fp32", folder, EvalConfig(knn_k=5), family.fingerprint,
        max_concurrent_trials=beside,
    )  # fmt: skip
    empty = SearchResult(metric_of(source, splits), len(splits.val), EPOCHS, baseline_values(settings, space))
    return search(SearchSpec(settings, space, plan, load_result(out) or empty), out, listener, listener.stop)


def nothing_runs() -> bool:
    """Whether all placement groups are given back, and all actors of trials and their stages are gone."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        groups = {group["state"] for group in placement_group_table().values()}
        with contextlib.suppress(psutil.NoSuchProcess):
            names = {child.name() for child in psutil.Process().children(recursive=True)}
            if groups <= {"REMOVED"} and not any("Actor" in name or "Implicit" in name for name in names):
                return True
        time.sleep(0.2)
    return False


@dataclass(frozen=True)
class Searched:
    out: Path
    settings: Settings
    result: SearchResult
    before: SearchResult
    happened: list[str]
    cleared: bool


@pytest.fixture(scope="module")
def searched(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """One search, ended by a signal at the second score of trial 0, and continued."""
    out = tmp_path_factory.mktemp("search")
    settings = recipe(out, "{optim.blr: [1.0, 1.0e6], decoder.throw_ratio: [0.9]}", seed=SEED)
    first = Callback(stop_at=(0, 2))
    before = run(settings, out, first)
    cleared = nothing_runs()
    second = Callback()
    result = run(settings, out, second)
    happened = [*first.happened, "-", *second.happened]
    return Searched(out, settings, result, before, happened, cleared)


SEED = 9
"""With it the four draws are the recipe's own, one that throws too much, one that learns nothing, and one that diverges."""


def row(searched: Searched, **changes: object) -> TrialRow:
    wanted = {key.replace("__", "."): value for key, value in changes.items()}
    return next(r for r in searched.result.rows if wanted.items() <= r.changes.items())


def test_trial_0_is_the_recipes_own_setting_and_is_never_stopped_early(searched: Searched) -> None:
    own = searched.result.rows[0]
    assert own.number == 0
    assert own.changes == searched.result.baseline_values == {"optim.blr": 0.008, "decoder.throw_ratio": 0.0}
    assert own.status == "finished"
    assert [point.epoch for point in own.curve] == [1, 2, 3, 4]
    assert set(own.curve[-1].by_depth) == {1, 2, 3, 4}
    assert own.gflops
    assert own.images_per_s


def test_an_infeasible_combination_counts_as_such_and_names_the_setting(searched: Searched) -> None:
    infeasible = row(searched, decoder__throw_ratio=0.9)
    assert infeasible.status == "infeasible"
    assert infeasible.status_reason.startswith("decoder.throw_ratio 0.9 of 16 tokens leaves the decoder")
    assert infeasible.curve == ()


def test_a_trial_that_fails_is_told_with_its_cause_and_does_not_end_the_search(searched: Searched) -> None:
    failed = row(searched, optim__blr=1e6)
    assert failed.status == "failed"
    assert "is not finite at step" in failed.status_reason
    again = [line for line in searched.happened if line.startswith(f"{failed.number} is tried again")]
    assert again == [f"{failed.number} is tried again after 0: {failed.status_reason}"]  # once


def test_a_weak_trial_is_stopped_early(searched: Searched) -> None:
    weak = row(searched, optim__blr=1.0)
    assert weak.status == "stopped early"
    assert weak.epoch == 2
    assert weak.status_reason == "by ASHA: below the median at rung 2"


def test_a_search_that_was_cut_off_goes_on_without_doing_anything_twice(searched: Searched) -> None:
    assert not searched.before.finished
    assert searched.before.rows[0].status == "running"
    where = searched.happened.index("-")
    before, after = searched.happened[:where], searched.happened[where + 1 :]
    scores = [line for line in before + after if "scored" in line]
    assert len(set(scores)) == len(scores)
    assert "0 begins after 0" in before
    assert {"0 begins after 2", "0 begins after 3"} & set(after)
    assert [line for line in before + after if line.startswith("0 scored")] == [
        f"0 scored at {n}" for n in (1, 2, 3, 4)
    ]
    assert after[-1].split()[1] != "begins"


def test_actors_and_placement_groups_are_gone_after_an_early_end_and_after_the_search(
    searched: Searched,
) -> None:
    assert searched.cleared
    assert nothing_runs()


def test_the_best_setting_is_a_recipe_and_nothing_else_is_left_of_the_trials(searched: Searched) -> None:
    result, folder = searched.result, searched.out / FOLDER
    assert result.finished
    assert result.best.number == 0
    again = load_settings(["--recipe", str(folder / BEST)])
    assert again == with_changes(searched.settings, {"out": None, "search.trials": 0})
    assert load_result(searched.out) == result
    assert {path.name for path in folder.iterdir()} == {BEST, "trials.json", "trials.csv"}


def test_a_recipe_that_cannot_be_trained_ends_the_search_with_the_cause(
    tmp_path: Path, ray_cluster: None
) -> None:
    settings = recipe(tmp_path, "{mask.ratio: [0.5]}", optim__blr=1e6, search__trials=1)
    with pytest.raises(
        TrainingError,
        match=r"no trial .* was trained to its end; trial 0, the baseline config: failed, the (loss|gradient norm) of",
    ):
        run(settings, tmp_path, Callback())
    assert nothing_runs()


def test_optuna_draws_settings_and_goes_on_with_what_it_has_learned(
    ray_cluster: None, tmp_path: Path
) -> None:
    space = "{optim.blr: {low: 0.001, high: 0.1, log: true}, decoder.throw_ratio: [0.0, 0.25, 0.5]}"
    changes = {"search__searcher": "optuna", "search__trials": 3, "search__grace_epochs": 1}
    settings = recipe(tmp_path, space, **changes)
    before = run(settings, tmp_path, Callback(stop_at=(1, 1)))
    assert [r.number for r in before.rows] == [0, 1]
    result = run(settings, tmp_path, Callback())
    own, *drawn = result.rows
    assert own.changes == result.baseline_values == {"optim.blr": 0.008, "decoder.throw_ratio": 0.0}
    assert len(drawn) == 2
    assert all(0.001 <= r.changes["optim.blr"] <= 0.1 for r in drawn)
    assert all(r.status in ("finished", "stopped early") and r.curve for r in drawn)
    assert len({r.changes["optim.blr"] for r in result.rows}) == 3


def test_optuna_goes_on_after_infeasible_and_failed_trials(ray_cluster: None, tmp_path: Path) -> None:
    space = "{decoder.throw_ratio: [0.9], optim.blr: [1.0e6]}"
    changes = {"search__searcher": "optuna", "search__trials": 4, "search__grace_epochs": 1}
    result = run(recipe(tmp_path, space, **changes), tmp_path, Callback())
    assert result.finished
    assert result.best.number == 0
    assert {"infeasible", "failed"} & {r.status for r in result.rows}
    assert all(r.status in ("finished", "infeasible", "failed", "stopped early") for r in result.rows)


def test_ray_is_still_there(ray_cluster: None) -> None:
    assert ray.is_initialized()
