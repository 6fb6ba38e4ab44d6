"""Own images without a recipe: settings are chosen and said, kept on resume, and a dry run leaves nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bim.orchestrator.config.recipes import read_recipe
from bim.pipelines import bim_pipeline
from tests.e2e.command import Finished, arguments, call, image_folder

QUICK = {
    "placement.backend": "in_process",
    "placement.threads_per_stage": "1",
    "schedule.epochs": "1",
    "backbone.model_args.embed_dim": "24",
    "backbone.model_args.depth": "4",
    "decoder.num_heads": "1",
    "evaluation.latency": "false",
}


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("labeled"), "{label}/{number}.png", 300)


def dry_run(source: Path | str, *argv: str) -> Finished:
    return call([*arguments(QUICK), "--data.source", str(source), "--dry-run", *argv])


def test_a_dry_run_says_what_it_would_do_and_cost_and_leaves_nothing(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = dry_run(labeled, "--estimate.price_per_gpu_hour", "2")
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("settings chosen for 300 images, labeled, short side about 16 px:\n")
    assert "  batch 4: 37 steps an epoch of 150 training images\n" in done.stdout
    assert "block  layers" in done.stdout
    assert "4 separate MAE runs" in done.stdout
    assert "GPU hours" not in done.stdout
    assert re.search(
        r"^about \d+ images/s: .* an epoch, .* of training, .* of measuring$", done.stdout, re.MULTILINE
    )
    assert done.stdout.endswith("a dry run: nothing was trained and nothing written\n")
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_was_chosen_is_in_the_settings_and_is_not_chosen_again(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    done = call([*arguments(QUICK), "--data.source", str(labeled), "--out", "run"])
    assert done.status == 0, done.stderr
    saved = read_recipe("run/settings.yaml")
    assert saved["data"]["batch_size"] == 4
    assert saved["backbone"]["model_args"]["img_size"] == 32
    assert saved["search"]["trials"] == 0

    def refuse(*_: object) -> None:
        raise AssertionError("probed again")

    monkeypatch.setattr("bim.orchestrator.jobs.automatic.automatic_settings", refuse)
    monkeypatch.setattr("bim.orchestrator.jobs.cost.probe_steps", refuse)
    monkeypatch.setattr("bim.orchestrator.runs.step_times._known", {})  # as in a new process
    resumed = call(["--out", "run", "--resume"])
    assert resumed.status == 0, resumed.stderr
    again = call(["--recipe", "run/settings.yaml", "--out", "again", "--dry-run"])
    assert again.status == 0, again.stderr
    assert "settings chosen" not in again.stdout
    monkeypatch.setattr("bim.orchestrator.runs.step_times._known", {})
    resumed = call(["--out", "run", "--resume", "--dry-run"])
    assert resumed.status == 0, resumed.stderr


def test_the_estimate_of_images_that_are_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = dry_run("synthetic:5000x60x40", "--time_budget", "10s")
    assert done.status == 0, done.stderr
    assert "5000 images, without labels, short side about 40 px" in done.stdout
    assert "image size 32 px in patches of 4" in done.stdout


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--data.source images --time_budget soon", "time_budget: 'soon' is no duration"),
        (
            "--recipe digits_demo --time_budget 1h",
            "--time_budget is for settings that are chosen from the images",
        ),
        ("--time_budget 1h", "--time_budget is for settings that are chosen from the images"),
        (
            "--data.source few",
            "few has 3 images to split and train on, too few to choose settings for (at least 20)",
        ),
        ("--data.source damaged", "none of 25 images of the train split of damaged can be read; the first: "),
        (
            "--data.source images --data.batch_size 5000",
            "images has 150 images to train on, fewer than one step's",
        ),
        ("--data.source images --mask.ratio 0.999", "mask.ratio 0.999 leaves block 0 no visible unit"),
        ("--data.source nowhere", "data.source 'nowhere' does not exist"),
        ("--data.source images --mask.ratoi 1", "unknown setting 'mask.ratoi'"),
        ("--data.source images --schedule.epochs ten", "schedule.epochs must be a whole number"),
    ],
)
def test_wrong_input_is_a_sentence_before_anything_is_chosen(
    argv: str, told: str, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(labeled)
    image_folder(tmp_path / "few", "{number}.png", 3)
    for file in image_folder(tmp_path / "damaged", "{number}.png", 25).iterdir():
        file.write_bytes(file.read_bytes()[:60])
    done = call(argv.split())
    assert done.status == 2
    assert done.stdout == ""
    assert f"error: {told}" in done.stderr


def test_the_largest_batch_of_a_recipe_is_printed_as_a_recipe(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = "img_size: 16, patch_size: 4, embed_dim: 24, depth: 4, num_heads: 2"
    (tmp_path / "mine.yaml").write_text(
        f"name: mine\nbackbone: {{name: vit_tiny_patch16_224, model_args: {{{sizes}}}}}\n"
        f"data: {{source: '{labeled}', batch_size: auto}}\nschedule: {{epochs: 1}}\ndecoder: {{num_heads: 1}}\n"
        "placement: {backend: in_process, threads_per_stage: 1}\n"
    )
    with pytest.raises(SystemExit) as left:
        bim_pipeline.main(["--recipe", "mine.yaml", "--print-config"])
    assert left.value.code == 0
    printed = capsys.readouterr()
    (tmp_path / "printed.yaml").write_text(printed.out)
    assert read_recipe("printed.yaml")["data"]["batch_size"] == 8
    assert printed.err == "the largest batch, computed and tried: 8, for 20 steps an epoch\n"


def test_several_backbones_share_the_time(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = "img_size: 16, patch_size: 4, depth: 4, num_heads: 2"
    entries = [
        f"{{name: vit_tiny_patch16_224, alias: w{w}, model_args: {{{sizes}, embed_dim: {w}}}}}"
        for w in (24, 32)
    ]
    done = call(
        [
            *("--backbones", f"[{', '.join(entries)}]", "--data.source", str(labeled)),
            *(
                "--placement.backend",
                "in_process",
                "--decoder.num_heads",
                "1",
                "--time_budget",
                "1m",
                "--dry-run",
            ),
        ]
    )
    assert done.status == 0, done.stderr
    assert "settings chosen for 300 images" in done.stdout
    assert re.search(r"^  \d+ epochs: ", done.stdout, re.MULTILINE)
    assert "image size" not in done.stdout
    assert done.stdout.count("of training, ") == 2


@pytest.mark.parametrize(
    "recipe",
    [[], ["--recipe", "digits_demo", "--schedule.warmup_epochs", "0", "--search.trials", "0"]],
    ids=["automatic", "recipe"],
)
def test_the_largest_batch_that_fits_keeps_enough_steps(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    size = [] if recipe else ["--backbone.model_args.img_size", "16"]
    done = dry_run(labeled, *recipe, *size, "--data.batch_size", "auto")
    assert done.status == 0, done.stderr
    (batch,) = re.findall(
        r"^the largest batch, computed and tried: (\d+), for 20 steps an epoch$", done.stdout, re.MULTILINE
    )
    assert batch in ("4", "8")
