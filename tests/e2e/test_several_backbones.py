"""Several backbones in one launch: side by side, one table; one that is killed or wrong leaves the others alone."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import timm
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.e2e.command import (
    Finished,
    arguments,
    call,
    differing,
    image_folder,
    read_until,
    shell,
    started,
    tree,
)

pytestmark = pytest.mark.slow

VIT = {
    "name": "vit_tiny_patch16_224",
    "alias": "vit",
    "model_args": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "alias": "swin",
    "model_args": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [1, 2],
    },
}
SMALL = {
    "recipe": "digits_demo",
    "blocks": "2",
    "decoder.dim": "32",
    "decoder.num_heads": "1",
    "data.workers": "0",
    "data.batch_size": "8",
    "schedule.epochs": "2",
    "schedule.warmup_epochs": "0",
    "placement.stages": "1",
    "placement.threads_per_stage": "1",
    "evaluation.latency": "false",
}
HERE = {"placement.backend": "in_process"}
LONG = {"schedule.epochs": "60", "checkpoint.every_epochs": "5"}


def both(*changes: dict[str, object]) -> dict[str, str]:
    """The two backbones, each with what is changed of it."""
    entries = [entry | change for entry, change in zip((VIT, SWIN), changes or ({}, {}), strict=True)]
    return {"backbones": json.dumps(entries)}


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 scanned digits in class directories: 56 to train on, 7 steps of 8 an epoch."""
    return image_folder(tmp_path_factory.mktemp("labeled"), "{label}/{number}.png", 80)


def rows(out: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((out / "summary.json").read_text())
    return found


def trained_depths(out: Path) -> list[tuple[object, object]]:
    return [(row["backbone"], row["depth"]) for row in rows(out) if row["weights"] == "trained"]


# -- both go through ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, labeled: Path) -> Finished:
    """The command on Ray, both backbones to their end, with the search that the default recipe asks for."""
    here = tmp_path_factory.mktemp("finished")
    timed = {"evaluation.latency": "true", "data.source": str(labeled), "out": "runs/a"}
    return shell(arguments(SMALL, both(), timed), here, here / "runs" / "a")


def test_both_families_finish_on_two_cores_and_are_in_one_table(finished: Finished) -> None:
    assert finished.status == 0, finished.stderr
    assert finished.stderr == ""
    text = finished.stdout
    for name in ("vit ", "swin"):
        assert re.findall(rf"^{name}  epoch (\d)/2  loss by block", text, re.MULTILINE) == ["1", "2"]
        assert re.search(rf"^{name}  kNN top-1 by depth \d", text, re.MULTILINE)
    assert len(re.findall(r"^ +depth +params", text, re.MULTILINE)) == 1
    assert re.search(
        r"^swin, swin_tiny_patch4_window7_224, 32 x 32 px\n[* ] +1 .*±.*\n[* ] +2 .*±", text, re.MULTILINE
    )
    assert "no search: every backbone is trained with the settings as they are" in text
    assert [line for line in text.splitlines() if "http" not in line and len(line) > 125] == []
    depths = [("vit", 2), ("vit", 4), ("swin", 1), ("swin", 2)]
    assert trained_depths(finished.out) == depths
    assert all(
        float(str(row["latency_b1_ms"])) > 0 for row in rows(finished.out) if row["weights"] == "trained"
    )


def test_every_family_leaves_what_a_run_of_its_own_leaves_and_the_comparison_stands_above(
    finished: Finished,
) -> None:
    out = finished.out
    for name, depth in (("vit", 4), ("swin", 2)):
        folder = out / name / "variants" / f"depth{depth:02d}"
        size = 16 if name == "vit" else 32
        assert (
            timm.create_model(f"local-dir:{folder}", pretrained=True)(torch.rand(2, 3, size, size))
            .isfinite()
            .all()
        )
        assert " ms" in (folder / "README.md").read_text() or "latency" in (folder / "README.md").read_text()
        assert (out / name / "summary.csv").exists()
        assert (out / name / "settings.yaml").exists()
    assert (out / "pictures" / "backbones.png").stat().st_size > 5000
    assert (out / "summary.txt").read_text().strip() in finished.stdout
    with (out / "summary.csv").open() as file:
        assert {row["backbone"] for row in csv.DictReader(file)} == {"vit", "swin"}


def test_mlflow_has_both_families_below_one_run_that_compares_them(finished: Finished) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{finished.out.parents[1]}/mlflow.db")

    def run_of(folder: Path) -> str:
        return str(json.loads((folder / "tracking.json").read_text())["run_id"])

    top = client.get_run(run_of(finished.out))
    assert top.info.status == "FINISHED"
    assert {path.path for path in client.list_artifacts(top.info.run_id)} >= {
        "summary.csv",
        "pictures",
        "settings.yaml",
    }
    note = top.data.tags["mlflow.note.content"]
    assert "swin, swin_tiny_patch4_window7_224, 32 x 32 px" in note
    assert "pictures/backbones.png" in note
    for name, depths in (("vit", (2, 4)), ("swin", (1, 2))):
        run = client.get_run(run_of(finished.out / name))
        assert run.data.tags["mlflow.parentRunId"] == top.info.run_id
        assert run.info.run_name == f"a/{name}"
        assert run.info.status == "FINISHED"
        assert run.info.run_id in note
        for depth in depths:
            version = client.get_model_version(f"digits_demo-{name}-depth{depth:02d}", "1")
            assert version.tags["depth"] == str(depth)


# -- one goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_fails_one_and_the_other_finishes(
    tmp_path: Path, labeled: Path, store: str
) -> None:
    wild = both({}, {"settings": {"optim.blr": 1e6}})
    where = {"data.source": str(labeled), "out": str(tmp_path / "run"), "tracking.uri": store}
    done = call(arguments(SMALL, HERE, wild, where), tmp_path / "run")
    assert done.status == 1
    (told,) = done.stderr.splitlines()
    assert re.match(
        r"error: swin failed: the (loss|gradient norm) of block \d is not finite at step \d+", told
    )
    assert re.search(r"^swin  FAILED: the .* is not finite", done.stdout, re.MULTILINE)
    assert re.search(
        r"^retry failed backbones: python .* --resume\n  .*, first remove its folder .*/BACKBONE$",
        done.stdout,
        re.MULTILINE,
    )
    assert trained_depths(done.out) == [("vit", 2), ("vit", 4)]
    (failed,) = [row for row in rows(done.out) if row["status"] == "failed"]
    assert failed["backbone"] == "swin"
    assert "is not finite" in str(failed["cause"])
    client = MlflowClient(tracking_uri=store)
    for folder, status in (("", "FAILED"), ("vit", "FINISHED"), ("swin", "FAILED")):
        run = client.get_run(json.loads((done.out / folder / "tracking.json").read_text())["run_id"])
        assert run.info.status == status
        assert ("is not finite" in run.data.tags.get("failed", "")) == (folder == "swin")


@pytest.fixture(scope="module")
def interrupted(
    tmp_path_factory: pytest.TempPathFactory, labeled: Path
) -> tuple[Finished, Finished, Finished]:
    """Ctrl-C while both train; resumed, and every stage killed -9, which one may not survive; resumed again."""
    here = tmp_path_factory.mktemp("interrupted")
    out = here / "runs" / "a"
    # The one that is killed may not go back to its checkpoint: its first loss is its end.
    mortal = both({}, {"settings": {"failures.max_restarts": 0}})
    given = arguments(SMALL, LONG, mortal, {"data.source": str(labeled), "out": "runs/a"})
    with started(given, here) as process:
        before = wait_for_both(process, r"epoch +2/60")
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate()
    first = Finished(process.returncode, before + stdout, stderr, out)
    with started(["--out", "runs/a", "--resume"], here) as process:
        before = wait_for_both(process, r"epoch +\d+/60")
        for child in psutil.Process(process.pid).children(recursive=True):
            if "StageActor" in child.name():
                child.kill()
        stdout, stderr = process.communicate()
    second = Finished(process.returncode, before + stdout, stderr, out)
    store = f"sqlite:///{here}/mlflow.db"
    (out / "swin" / "failure.txt").write_text("as an error leaves it that is none of ours")
    third = call(["--out", str(out), "--resume", *arguments(HERE, {"tracking.uri": store})], out)
    return first, second, third


def wait_for_both(process: object, pattern: str) -> str:
    """The output up to where both backbones have said it."""
    missing = {"vit", "swin"}

    def last(line: str) -> bool:
        if found := re.match(rf"(vit|swin) +{pattern}", line):
            missing.discard(found[1])
        return not missing

    return "".join(read_until(process, last))  # type: ignore[arg-type]


def test_ctrl_c_stops_both_with_a_checkpoint(interrupted: tuple[Finished, Finished, Finished]) -> None:
    first, _, _ = interrupted
    assert first.status == 128 + signal.SIGINT, first.stdout + first.stderr
    assert first.stderr == ""
    assert first.stdout.count("SIGINT: saving a checkpoint (at most 15 s); once more stops at once") == 1
    assert (
        len(
            re.findall(r"^(?:vit |swin)  checkpoint saved after step \d+ of 420$", first.stdout, re.MULTILINE)
        )
        == 2
    )
    assert first.stdout.splitlines()[-1].endswith("--out runs/a --resume")


def test_of_two_whose_stages_are_killed_the_one_that_may_restart_finishes(
    interrupted: tuple[Finished, Finished, Finished],
) -> None:
    _, second, _ = interrupted
    assert second.status == 1, second.stdout + second.stderr
    assert (
        len(re.findall(r"^(?:vit |swin)  continuing after step \d+ of 420$", second.stdout, re.MULTILINE))
        == 3
    )
    assert re.search(
        r"^vit   stage 0 .* died .*; rewinding all stages \(restart 1 of 3\)$", second.stdout, re.MULTILINE
    )
    assert re.search(r"^vit   epoch 60/60 ", second.stdout, re.MULTILINE)
    (told,) = second.stderr.splitlines()
    assert re.match(r"error: swin failed: stage 0 .* died at step \d+.*, after 0 restarts", told)
    assert re.search(r"^swin  FAILED: stage 0 ", second.stdout, re.MULTILINE)
    assert re.search(r"^vit, vit_tiny_patch16_224, 16 x 16 px\n[* ] +2 .*±", second.stdout, re.MULTILINE)


def test_resuming_goes_on_with_the_one_that_failed_and_compares_both(
    interrupted: tuple[Finished, Finished, Finished],
) -> None:
    _, _, third = interrupted
    assert third.status == 0, third.stderr
    assert "vit: already finished, skipped" in third.stdout
    assert not re.search(r"^vit .*epoch", third.stdout, re.MULTILINE)
    assert re.search(r"^swin  continuing after step \d+ of 420$", third.stdout, re.MULTILINE)
    assert "FAILED" not in third.stdout
    assert trained_depths(third.out) == [("vit", 2), ("vit", 4), ("swin", 1), ("swin", 2)]
    assert all(row["status"] == "finished" for row in rows(third.out))


def test_nothing_says_any_more_that_a_backbone_failed_which_was_resumed_to_its_end(
    interrupted: tuple[Finished, Finished, Finished],
) -> None:
    _, _, third = interrupted
    assert not (third.out / "swin" / "failure.txt").exists()
    client = MlflowClient(tracking_uri=f"sqlite:///{third.out.parents[1]}/mlflow.db")

    def run_of(folder: Path) -> Run:
        return client.get_run(json.loads((folder / "tracking.json").read_text())["run_id"])

    swin, comparison = run_of(third.out / "swin"), run_of(third.out)
    assert swin.info.status == comparison.info.status == "FINISHED"
    assert "failed" not in swin.data.tags
    assert comparison.data.tags["backbone.swin"] == "finished"


def test_a_backbone_among_others_gets_the_weights_of_a_run_of_its_own(
    tmp_path: Path, interrupted: tuple[Finished, Finished, Finished], store: str
) -> None:
    for name in ("vit", "swin"):
        settings = interrupted[2].out / name / "settings.yaml"
        alone = {"out": str(tmp_path / name), "tracking.uri": store, "tracking.model_name": f"alone-{name}"}
        done = call(["--recipe", str(settings), *arguments(HERE, alone)])
        assert done.status == 0, done.stderr
        assert differing(tmp_path / name, interrupted[2].out / name) == []


# -- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (({}, {"blocks": 9}), r"^swin: blocks is 9, but .* ask for 2 at most, or give a list of sizes"),
        (({"name": "vit_tiny_patch61"}, {}), r"^vit: unknown backbone 'vit_tiny_patch61'"),
        (
            ({}, {"settings": {"mask.ratio": 0.999}}),
            r"^swin: mask.ratio 0.999 leaves block 0 no visible unit",
        ),
        (
            ({}, {"settings": {"data.batch_size": 5000}}),
            r"^swin: .* fewer than one step's data.batch_size=5000",
        ),
    ],
)
def test_what_is_wrong_with_one_backbone_stops_all_before_anything_starts(
    tmp_path: Path, labeled: Path, changes: tuple[dict[str, object], ...], told: str
) -> None:
    done = call(arguments(SMALL, both(*changes), {"data.source": str(labeled), "out": str(tmp_path / "run")}))
    assert done.status == 2
    (line,) = done.stderr.splitlines()
    assert re.search(told, line.removeprefix("error: "))
    assert done.stdout == ""
    assert tree(tmp_path) == {}


def test_what_is_wrong_with_both_is_told_by_name_and_what_is_shared_is_told_once(tmp_path: Path) -> None:
    out = {"out": str(tmp_path / "run")}
    done = call(arguments(SMALL, both({"blocks": 9}, {"blocks": 8}), out))
    assert done.status == 2
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["vit:", "swin:"]
    done = call(arguments(SMALL, both(), out, {"data.source": "nowhere"}))
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: data.source 'nowhere' does not exist")
    assert tree(tmp_path) == {}


def test_other_backbones_than_before_are_refused_when_a_run_is_resumed(finished: Finished) -> None:
    before = tree(finished.out)
    done = call(["--out", str(finished.out), "--resume", "--backbones", "vit_tiny_patch16_224"])
    assert done.status == 2
    assert re.search(
        r"has backbones that --backbones does not name: vit, swin; name them too, remove", done.stderr
    )
    tamed = both({}, {"settings": {"optim.blr": 1e-3}})
    done = call(["--out", str(finished.out), "--resume", *arguments(tamed)])
    assert done.status == 2
    assert re.search(
        r"swin: .* cannot be resumed with other settings .*: optim.blr is 0.001, was .*; give the same ones, or "
        r"remove the folder .*swin to train this backbone again from the beginning",
        done.stderr,
    )
    assert tree(finished.out) == before


def test_a_backbone_that_failed_for_its_settings_is_trained_with_others_beside_the_finished_one(
    tmp_path: Path, labeled: Path, store: str
) -> None:
    out = tmp_path / "run"
    where = {"data.source": str(labeled), "out": str(out), "tracking.uri": store}
    wild = both({}, {"settings": {"optim.blr": 1e6}})
    assert call(arguments(SMALL, HERE, wild, where), out).status == 1
    weights = (out / "vit" / "variants" / "depth04" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "swin")
    done = call(["--resume", *arguments(SMALL, HERE, both(), where)], out)
    assert done.status == 0, done.stderr
    assert trained_depths(out) == [("vit", 2), ("vit", 4), ("swin", 1), ("swin", 2)]
    assert "vit: already finished, skipped" in done.stdout
    assert (out / "vit" / "variants" / "depth04" / "model.safetensors").read_bytes() == weights
