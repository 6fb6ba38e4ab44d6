"""The main job with a search before it: cut off in the search, continued to its end, and not searched twice."""

from __future__ import annotations

import json
import re
import signal
from datetime import datetime

import pytest
from mlflow import MlflowClient

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.transforms import with_changes
from tests.e2e.command import TINY, Finished, arguments, call, read_until, shell, started

pytestmark = pytest.mark.slow

SEARCH = {
    "placement.backend": "ray",
    "search.trials": "2",
    "search.trial_epochs": "2",
    "search.grace_epochs": "2",
    "search.every_epochs": "1",
    "search.trial_stages": "1",
    "search.space": "{mask.ratio: [0.5], optim.blr: [1.0e-2]}",
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Finished]:
    """The command, ended by SIGTERM in its search and continued as its last line says."""
    here = tmp_path_factory.mktemp("searched")
    with started([*arguments(TINY, SEARCH), "--out", "runs/a"], here) as process:
        before = read_until(process, lambda line: line.startswith("trial 0  epoch 1/2"))
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate()
    first = Finished(process.returncode, "".join(before) + stdout, stderr, here / "runs" / "a")
    again = re.search(r"go on with: python \S+ (.*)$", stdout, re.MULTILINE)
    assert again is not None, stdout + stderr
    return first, shell(again[1].split(), here, first.out)


def test_a_signal_ends_the_search_in_order_and_the_last_line_says_how_to_go_on(
    searched: tuple[Finished, Finished],
) -> None:
    first, _ = searched
    assert first.status == 128 + signal.SIGTERM
    assert first.stderr == ""
    told = "SIGTERM: ending the trials of the search, which can be continued (at most 15 s); once more stops at once"
    assert told in " ".join(first.stdout.split())
    assert first.stdout.splitlines()[-1].startswith("stopped by SIGTERM; go on with: ")
    assert first.stdout.splitlines()[-1].endswith("--out runs/a --resume")


def test_the_space_of_the_search_is_told_before_it(
    searched: tuple[Finished, Finished],
) -> None:
    text = " ".join(searched[0].stdout.split())
    assert "search: 2 trials of 2 epochs, 2 at a time, ranked by kNN top-1 of 180 validation images" in text
    assert "mask.ratio: 0.75 (baseline), 0.5" in text
    assert "--search.trials 0 trains without a search" in text


def test_the_search_is_continued_and_the_family_trained_with_its_best_setting(
    searched: tuple[Finished, Finished],
) -> None:
    first, second = searched
    assert second.status == 0, second.stderr
    assert second.stderr == ""
    scores = re.findall(r"^(trial \d  epoch \d)/2", first.stdout + second.stdout, re.MULTILINE)
    assert sorted(scores) == sorted(set(scores))  # nothing was tried twice
    assert len(scores) == 4
    assert re.search(r"^search: 2 finished, in ", second.stdout, re.MULTILINE)
    assert re.search(r"^best: trial [01], ", second.stdout, re.MULTILINE)
    assert "epoch 2/2  loss by block" in second.stdout
    best = load_settings(["--recipe", str(second.out / "search" / "best.yaml")])
    trained = load_settings(["--recipe", str(second.out / "settings.yaml")])
    assert with_changes(trained, {"search.trials": 0, "out": None}) == best
    manifest = next(second.out.glob("checkpoints/*/manifest.json"))
    assert json.loads(manifest.read_text())["settings"]["mask"]["ratio"] == best.mask.ratio


def test_mlflow_shows_every_trial_and_every_depth(searched: tuple[Finished, Finished]) -> None:
    out = searched[1].out
    client = MlflowClient(tracking_uri=f"sqlite:///{out.parents[1]}/mlflow.db")
    parent = client.get_run(json.loads((out / "tracking.json").read_text())["run_id"])
    mine = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], mine)
    trials = {run.data.tags["trial"]: run for run in children if "trial" in run.data.tags}
    assert set(trials) == {"0", "1"}
    assert sum("variant" in run.data.tags for run in children) == 4
    for run in trials.values():
        assert run.info.status == "FINISHED"
        assert set(run.data.params) == {"mask.ratio", "optim.blr"}
        history = client.get_metric_history(run.info.run_id, "search/score")
        assert [point.step for point in history] == [1, 2]
        assert {f"search/depth0{depth}" for depth in (1, 2, 3, 4)} < set(run.data.metrics)
    assert trials["0"].data.params == {"mask.ratio": "0.75", "optim.blr": "0.008"}
    best = load_settings(["--recipe", str(out / "search" / "best.yaml")])
    assert parent.data.params["mask.ratio"] == str(best.mask.ratio)
    assert parent.data.tags["search.trials"] == "2 finished"
    assert {entry.path for entry in client.list_artifacts(parent.info.run_id, "search")} == {
        "search/best.yaml",
        "search/trials.csv",
    }
    depths = [run.info.start_time for run in children if "variant" in run.data.tags]
    assert min(depths) > max(run.info.start_time for run in trials.values())  # above them in the list
    began = [datetime.fromisoformat(run.data.tags["started_at"]).timestamp() for run in trials.values()]
    assert max(depths) < 1000 * min(began)  # and there before them
    depth = next(run for run in children if run.data.tags.get("variant") == "depth1")
    assert depth.data.params["mask_ratio"] == str(best.mask.ratio)
    note = parent.data.tags["mlflow.note.content"]
    assert note.index("pictures/accuracy_against_latency.png") < note.index(
        "pictures/search_score_against_cost.png"
    )
    assert "The search: 2 finished; best: trial" in note
    assert "pictures/search_score_against_cost.png" in note
    assert (out / "pictures" / "search_score_against_cost.png").stat().st_size > 5000


def test_a_finished_search_is_not_repeated(searched: tuple[Finished, Finished]) -> None:
    out = searched[1].out
    store = f"sqlite:///{out.parents[1]}/mlflow.db"
    for flag in ("--resume", "--search.resume"):
        again = call(["--out", str(out), flag, "--placement.backend", "in_process", "--tracking.uri", store])
        assert again.status == 0, again.stderr
        assert "trial" not in again.stdout
        assert re.search(r"already at the last step \(\d+\); nothing to train", again.stdout)
