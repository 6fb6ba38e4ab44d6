"""Wrong input ends the command before an actor starts: one clear sentence, status 2, nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from tests.e2e.command import TINY, Finished, arguments, call, image_folder, shell, tree

ELSEWHERE = ["--placement.backend", "in_process", "--search.trials", "0"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(here: Path, *argv: str) -> str:
    """The one sentence with which a command in this process is refused; nothing else may be seen of it."""
    before = tree(here)
    done = call(argv)
    assert done.stdout == ""
    assert not ray.is_initialized()
    assert tree(here) == before
    return sentence(done)


def sentence(done: Finished) -> str:
    assert done.status == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stderr
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        pytest.param("--mask.ratoi 0.5", "unknown setting 'mask.ratoi'; did you mean 'mask.ratio'", id="key"),
        pytest.param("--colour red", "unknown setting 'colour'; --help lists all settings", id="key of nothing"),
        pytest.param(
            "--schedule.epochs ten", "schedule.epochs must be a whole number of at least 1, not 'ten'", id="type"
        ),
        pytest.param("--data.flip maybe", "data.flip must be true or false, not 'maybe'", id="type of a flag"),
        pytest.param("--mask.ratio 0", "mask.ratio must be a number above 0 and below 1 .*, not 0$", id="ratio 0"),
        pytest.param(
            "--mask.ratio 1.0", "mask.ratio must be a number above 0 and below 1 .*, not 1.0", id="ratio 1"
        ),
        pytest.param(
            "--mask.ratio [0.8,0.7,0.6,0.5]", "mask.ratio must not decrease from block to block", id="ratios"
        ),
        pytest.param(
            "--mask.ratio 0.999", "mask.ratio 0.999 leaves block 0 no visible unit out of .*; lower", id="none visible"
        ),
        pytest.param(
            "--mask.ratio 1e-17", "mask.ratio 1e-17 leaves block 0 no masked unit out of .*; raise", id="none masked"
        ),
        pytest.param(
            "--blocks [2,2,2,1]",
            r"blocks \[2, 2, 2, 1\] hold 7 layers together, but the backbone has 8; make them add up to 8",
            id="block sizes",
        ),
        pytest.param("--blocks 9", "blocks is 9, but .* has 8 layers .* after every layer; ask for 8 at most", id="blocks"),
        pytest.param(
            "--backbone.model_args.img_size 33",
            r"image size 33 x 33 is not divisible by the patch size \d+ .*; set backbone.model_args.img_size",
            id="image size",
        ),
        pytest.param(
            "--backbone.name vit_smal_patch16_224",
            "unknown backbone 'vit_smal_patch16_224'; the nearest timm names are 'vit_small_patch16_224', ",
            id="timm name",
        ),
        pytest.param(
            "--backbone.name efficientnet_b0",
            "backbone 'efficientnet_b0' is timm's EfficientNet, which cannot be cut into blocks: .*; choose a ViT such as",
            id="timm class",
        ),
        pytest.param(
            "--backbone.name vit_base_r50_s16_224",
            "backbone 'vit_base_r50_s16_224' cannot be cut into blocks: its patch embedding is a HybridEmbed",
            id="timm model of a class that can mostly be cut",
        ),
        pytest.param("--data.batch_size 5000", r"digits has \d+ images .*; with data.batch_size 32 an", id="batch"),
        pytest.param("--data.source nowhere", "data.source 'nowhere' does not exist; it is the path", id="no path"),
        pytest.param(
            "--init_from nowhere", "init_from 'nowhere' is neither a timm name nor a folder nor a file", id="init_from"
        ),
        pytest.param("--recipe digits_dem", "no recipe and no file is called 'digits_dem'.*'digits_demo'", id="recipe"),
        pytest.param("--resume", "resume needs out: the folder of the run to continue", id="resume of nothing"),
        pytest.param("--out gone --resume", "there is no run to resume in .*gone; leave --resume out", id="no run"),
        pytest.param(
            "--placement.stages 7", "placement.stages must be at most 4, the number of blocks, not 7", id="stages"
        ),
        pytest.param(
            "--placement.gpus_per_stage 1 --placement.backend in_process --search.trials 0",
            "placement.gpus_per_stage asks for a GPU, and this process sees none; set it to 0",
            id="GPU in process",
        ),
        pytest.param(
            "--tracking.uri http://127.0.0.1:9 --placement.backend in_process --search.trials 0 --out a/b",
            "the MLflow store http://127.0.0.1:9 cannot be used: Connection refused; start or repair it, or give",
            id="MLflow away",
        ),
        pytest.param(
            "--tracking.uri postgresqll://x --placement.backend in_process --search.trials 0",
            "'postgresqll' is no kind of store that MLflow knows",
            id="MLflow address",
        ),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_sentence(here: Path, argv: str, told: str) -> None:
    if "gpus_per_stage" in argv:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has the GPU that is asked for")
    assert re.search(told, refused(here, *argv.split()))


def test_all_that_is_wrong_is_told_at_once(here: Path) -> None:
    done = call(["--mask.ratoi", "0.5", "--schedule.epochs", "0", "--seed", "-1"])
    assert done.status == 2
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["unknown", "seed", "schedule.epochs"]


def test_a_wrong_key_in_a_recipe_is_told_with_the_file(here: Path) -> None:
    text = "name: mine\nbackbone: {name: vit_tiny_patch16_224}\nmask: {ratoi: 0.5}\n"
    text += "data: {source: digits, batch_size: 64}\nschedule: {epochs: 1}\n"
    (here / "mine.yaml").write_text(text)
    told = refused(here, "--recipe", "mine.yaml")
    assert told == "mine.yaml: unknown setting 'mask.ratoi'; did you mean 'mask.ratio'?"


def test_a_folder_without_images_says_what_counts_as_one(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "empty" / "notes.txt").write_text("no image")
    told = refused(here, "--data.source", "empty")
    assert re.search(r"the folder .*empty holds no images; files that end in .*png.* count", told)


def test_parquet_without_an_image_column_lists_the_columns(here: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"]}), here / "notes.parquet")
    told = refused(here, "--data.source", "notes.parquet")
    assert told.startswith("notes.parquet has no image column")
    assert "it has id: int64, text: string; set data.source" in told


def test_fewer_images_than_a_batch_says_both_numbers_and_the_way_out(here: Path) -> None:
    image_folder(here / "few", "{number}.png", 40)
    told = refused(here, "--recipe", "digits_demo", "--data.source", "few", "--data.batch_size", "64")
    assert "few has 28 images to train on, fewer than one step's data.batch_size=64" in told
    assert told.endswith("with data.batch_size 1 an epoch has 28 steps")


def test_weights_that_would_have_to_be_unpickled_are_refused(here: Path) -> None:
    (here / "weights.pth").write_bytes(b"cos\nsystem\n(S'touch trace'\ntR.")
    told = refused(here, "--init_from", "weights.pth")
    assert "weights.pth' cannot be read as weights" in told
    assert told.endswith("give a .safetensors file")


def test_an_output_directory_in_use_names_both_ways_out(here: Path) -> None:
    (here / "used").mkdir()
    (here / "used" / "precious.txt").write_text("keep me")
    told = refused(here, "--out", "used")
    assert re.match(
        r"the output directory .*used is in use; continue its run with --resume, or choose .* --out", told
    )


@pytest.mark.parametrize("out", ["file", "file/inside", "/proc/nowhere"])
def test_an_output_directory_that_cannot_be_made_is_refused(here: Path, out: str) -> None:
    (here / "file").write_text("keep me")
    assert "give --out" in (told := refused(here, "--out", out, *ELSEWHERE)) or "with --out" in told
    assert out in told


def test_a_resumed_run_refuses_other_settings_and_shows_both_values(here: Path, brief: Finished) -> None:
    before = tree(brief.out)
    told = refused(here, "--out", str(brief.out), "--resume", "--optim.blr", "1e-3", "--mask.ratio", "0.5")
    assert "cannot be resumed with other settings" in told
    assert re.search(
        r"mask.ratio is 0.5, was 0.75; optim.blr is 0.001, was \S+; give the same ones, or start", told
    )
    assert "seed" not in told
    assert tree(brief.out) == before


def test_a_resumed_run_refuses_other_images(here: Path, brief: Finished) -> None:
    before = tree(brief.out)
    image_folder(here / "others", "{number}.png", 60, first=100)
    told = refused(here, "--out", str(brief.out), "--resume", "--data.source", "others")
    assert "the images behind data.source have changed since the last checkpoint in" in told
    assert tree(brief.out) == before


@pytest.mark.slow
def test_more_gpus_than_the_cluster_has_is_told_before_any_actor_starts(tmp_path: Path) -> None:
    done = shell(["--placement.gpus_per_stage", "1", "--placement.stages", "64", "--blocks", "64",
                  "--backbone.model_args.depth", "64", "--out", "runs/a"], tmp_path)  # fmt: skip
    told = sentence(done)
    assert re.search(
        r"the settings ask for 64 stages of 1 GPU each, and the cluster has \d+ GPU; lower", told
    )
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("Ray on this machine: ")
    assert tree(tmp_path) == {}


def test_a_wrong_setting_in_a_shell_is_one_sentence_on_standard_error(tmp_path: Path) -> None:
    done = shell(["--mask.ratio", "1.5"], tmp_path)
    assert "mask.ratio must be a number above 0 and below 1" in sentence(done)
    assert done.stdout == ""
    assert tree(tmp_path) == {}


def test_a_ray_cluster_that_does_not_answer_is_told_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    told = sentence(call(arguments(TINY, {"placement.backend": "ray"})))
    assert "RAY_ADDRESS=127.0.0.1:9; start it, or unset RAY_ADDRESS" in told
    assert tree(tmp_path) == {}
