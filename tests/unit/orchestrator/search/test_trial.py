"""A trial without Ray: its budget, its room, and its training in this process with scores on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import settings_to_mapping
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.phases import PhaseSpec, phases_on
from bim.orchestrator.data.source import Source, dataset_object, given
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.placement import ClusterResources, PlacementError, StageLayout
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.runs.prepare import ResolvedRun, resolve_run
from bim.orchestrator.search.objective import score_checkpoint
from bim.orchestrator.search.spec import TrialSpec
from bim.orchestrator.search.trial import (
    DRIVER_CPUS,
    InfeasibleSettings,
    Scorer,
    completed_epochs,
    run_trial,
    trial_epochs,
    trial_placement,
    trial_settings,
)
from bim.orchestrator.training.checkpoint import CheckpointStore
from tests.own_parts import Stripes

TINY = """--backbone.model_args {img_size:\\ 16,patch_size:\\ 4,embed_dim:\\ 32,depth:\\ 4,num_heads:\\ 2} --decoder.dim 32
--decoder.num_heads 1 --data.workers 0 --data.batch_size 64 --data.val_fraction 0.1
--data.test_fraction 0.8 --schedule.warmup_epochs 0 --search.trials 0"""


def settings(*argv: str) -> Settings:
    import shlex

    return load_settings([*shlex.split(TINY), *argv])


def test_a_trial_has_a_whole_schedule_of_its_own_in_fewer_epochs() -> None:
    recipe = settings(
        *["--schedule.epochs", "80", "--schedule.warmup_epochs", "8", "--search.trial_epochs", "20"],
        *["--schedule.resolution", "[[0, 8], [40, 16, 128]]"],
    )
    made = trial_settings(recipe, {"mask.ratio": 0.6})
    assert (made.schedule.epochs, made.schedule.warmup_epochs) == (20, 2.0)
    assert made.schedule.resolution == ((0, 8), (10, 16, 128))
    assert made.mask.ratio == 0.6
    shares = trial_settings(recipe, {"schedule.resolution": [[0, 8], [0.5, 16]]})
    assert shares.schedule.resolution == ((0, 8), (0.5, 16))
    with pytest.raises(SettingsError, match=r"schedule\.resolution"):
        trial_settings(recipe, {"schedule.resolution": [[0, 8], [1, 16]]})  # both are epoch 0 of the trial


def test_a_trial_is_never_longer_than_the_run() -> None:
    assert trial_epochs(settings("--schedule.epochs", "6", "--search.trial_epochs", "12")) == 6
    assert trial_epochs(settings("--schedule.epochs", "60", "--search.trial_epochs", "12")) == 12
    assert trial_epochs(settings("--schedule.epochs", "60", "--search.trial_epochs", "null")) == 60


@pytest.mark.parametrize(
    ("cluster", "argv", "places", "beside"),
    [
        (ClusterResources(2, 0), "--search.trial_stages 1", 1, 2),
        (ClusterResources(2, 0), "--search.trial_stages null", 4, 1),
        (ClusterResources(2, 0), "--search.trial_stages 1 --search.concurrent 1", 1, 1),
        (ClusterResources(16, 0), "--search.trial_stages 4", 4, 4),
        (ClusterResources(64, 0), "--search.trial_stages 1", 1, 8),  # as many as there are trials
        (ClusterResources(32, 4), "--search.trial_stages 1", 1, 4),
        (ClusterResources(32, 4), "--search.trial_stages null", 4, 1),
        (ClusterResources(32, 2), "--search.trial_stages 4 --placement.gpus_per_stage 0.25", 4, 2),
    ],
)
def test_as_many_trials_run_side_by_side_as_the_cluster_has_room_for(
    cluster: ClusterResources, argv: str, places: int, beside: int
) -> None:
    layout, found = trial_placement(settings(*argv.split(), "--search.trials", "8"), cluster)
    assert (len(layout.stage_blocks), found) == (places, beside)
    asked = sum(bundle["CPU"] for bundle in layout.bundles) + DRIVER_CPUS
    assert asked * beside <= cluster.cpus + 1e-6


def test_a_trial_that_does_not_fit_at_all_is_refused() -> None:
    argv = ["--search.trials", "8", "--search.trial_stages", "4", "--placement.gpus_per_stage", "1"]
    with pytest.raises(PlacementError, match="4 stages of 1 GPU each"):
        trial_placement(settings(*argv), ClusterResources(8, 1))


def test_steps_inside_an_epoch_end_none() -> None:
    phases = phases_on([PhaseSpec(0, (16, 16), 8), PhaseSpec(2, (16, 16), 4)], 16)  # 2 steps an epoch, then 4
    assert [completed_epochs(phases, step) for step in range(1, 9)] == [None, 1, None, 2, None, None, None, 3]


class Recorder:
    """Takes a trial's reports; stops it with an error at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.reports: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def __call__(self, report: dict[str, Any]) -> None:
        self.reports.append(report)
        if report["epoch"] == self.stop_at:
            raise KeyboardInterrupt


def scorer(family: ResolvedRun, images: tuple[Source, Splits]) -> Scorer:
    return lambda spec, checkpoint: score_checkpoint(spec, images, EvalConfig(), checkpoint)


def plan(folder: Path, *argv: str) -> TrialSpec:
    made = settings(
        "--placement.backend", "in_process", "--schedule.epochs", "5", "--search.every_epochs", "1", *argv
    )
    layout = StageLayout(((0, 1, 2, 3),), gpus=0.0, cpus=1.0, loader_cpus=0.0, threads=1)
    fingerprint = resolve_run(made, folder)[0].fingerprint
    return TrialSpec(settings_to_mapping(made), layout, "fp32", str(folder), EvalConfig(), fingerprint)


def test_a_trial_reports_its_score_every_so_many_epochs_and_at_its_end(tmp_path: Path) -> None:
    heard = Recorder()
    run_trial(plan(tmp_path, "--search.every_epochs", "2"), {"mask.ratio": 0.5}, "a", scorer, heard)
    assert [report["epoch"] for report in heard.reports] == [2, 4, 5]
    last = heard.reports[-1]
    assert last["score"] == pytest.approx(sum(last["depths"].values()) / 4)
    assert set(last["depths"]) == {"1", "2", "3", "4"}
    assert last["gflops"] > 0
    assert last["images_per_s"] > 0


def test_a_trial_that_was_cut_off_goes_on_from_its_last_checkpoint_with_the_same_scores(
    tmp_path: Path,
) -> None:
    whole, first, second = Recorder(), Recorder(stop_at=3), Recorder()
    run_trial(plan(tmp_path), {"mask.ratio": 0.5}, "whole", scorer, whole)
    with pytest.raises(KeyboardInterrupt):
        run_trial(plan(tmp_path), {"mask.ratio": 0.5}, "cut", scorer, first)
    run_trial(plan(tmp_path), {"mask.ratio": 0.5}, "cut", scorer, second)
    # The last report of the first process comes once more: it may not have arrived.
    assert [report["epoch"] for report in second.reports] == [3, 4, 5]
    assert [r["score"] for r in whole.reports[2:]] == [r["score"] for r in second.reports]


def test_a_folder_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    run_trial(plan(tmp_path), {"mask.ratio": 0.5}, "a", scorer, Recorder())
    heard = Recorder()
    run_trial(plan(tmp_path), {"mask.ratio": 0.6}, "a", scorer, heard)
    assert [report["epoch"] for report in heard.reports] == [1, 2, 3, 4, 5]


def test_checkpoints_of_a_trial_have_the_id_of_its_run_and_those_of_another_are_not_gone_on_with(
    tmp_path: Path,
) -> None:
    made = replace(plan(tmp_path), run_id="0123456789abcdef")
    with pytest.raises(KeyboardInterrupt):
        run_trial(made, {"mask.ratio": 0.5}, "a", scorer, Recorder(stop_at=2))
    latest = CheckpointStore(tmp_path / "a").latest()
    assert latest is not None
    assert latest.run_id == "0123456789abcdef"
    heard = Recorder(stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        run_trial(replace(made, run_id="another"), {"mask.ratio": 0.5}, "a", scorer, heard)
    assert [report["epoch"] for report in heard.reports] == [1]


def test_a_combination_that_the_settings_refuse_is_infeasible_and_no_failure(tmp_path: Path) -> None:
    with pytest.raises(
        InfeasibleSettings, match=r"decoder\.throw_ratio 0\.5 of 16 tokens leaves the decoder 8"
    ):
        run_trial(plan(tmp_path), {"mask.ratio": 0.5, "decoder.throw_ratio": 0.5}, "a", scorer, Recorder())
    assert not (tmp_path / "a").exists()


def test_images_that_cannot_be_read_are_a_failure_and_no_infeasible_setting(tmp_path: Path) -> None:
    made = plan(tmp_path)
    made.settings["data"]["source"] = str(tmp_path / "gone")
    with pytest.raises(DataError, match="gone"):
        run_trial(made, {"mask.ratio": 0.5}, "a", scorer, Recorder())


def test_a_trial_takes_images_that_are_an_object_of_the_driver(tmp_path: Path) -> None:
    source = dataset_object(Stripes("300"))
    with given(source):  # as in the driver, and not in the process of the trial
        made = replace(plan(tmp_path, "--data.source", source.name, "--data.batch_size", "16"), given=source)
    heard = Recorder(stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        run_trial(made, {"mask.ratio": 0.5}, "a", scorer, heard)
    assert len(heard.reports) == 1


def test_a_batch_larger_than_the_images_is_infeasible(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleSettings, match="fewer than one step"):
        run_trial(plan(tmp_path), {"data.batch_size": 100_000}, "a", scorer, Recorder())
