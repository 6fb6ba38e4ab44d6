from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from bim.orchestrator.config.auto_rules import auto_rules
from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.data.phases import MIN_STEPS
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.jobs.prepare import prepare
from bim.orchestrator.reporting.startup import opening_lines
from bim.orchestrator.runs.train import resolve_layout
from tests.snapshots import assert_snapshot


def opening(*argv: str, out: Path) -> list[str]:
    settings = load_settings(
        [*argv, "--placement.backend", "in_process", "--search.trials", "0", "--out", str(out)]
    )
    (prepared,) = prepare(settings).backbones
    return opening_lines(prepared.run, prepared, resolve_layout(settings, ClusterResources(1, 0)))


def notes_of(lines: list[str]) -> list[str]:
    """The notes among them, each as one line again."""
    notes = [line for line in lines if line.startswith(("note: ", "    "))]
    assert max((len(line) for line in notes), default=0) <= 100
    return [part for part in "\n".join(lines).replace("\n    ", " ").split("\n") if part.startswith("note: ")]


def test_the_opening_reads_like_its_snapshot(tmp_path: Path) -> None:
    lines = opening("--schedule.resolution", "[[0, 24], [0.5, 32, 32]]", out=tmp_path)
    assert not notes_of(lines)
    threads = torch.get_num_threads()
    text = "\n".join(lines).replace(str(tmp_path), "OUT").replace(f"{threads} CPU thread", "N CPU thread")
    assert_snapshot("startup", text.replace("threads", "thread"))


def test_settings_without_effect_and_padded_windows_get_notes(tmp_path: Path) -> None:
    args = "{img_size: 64, patch_size: 2, window_size: 5, embed_dim: 24, depths: [2, 2], num_heads: [2, 4]}"
    swin = ["--backbone.name", "swin_tiny_patch4_window7_224", "--backbone.model_args", args, "--blocks", "2"]
    lines = opening(*swin, "--target.bins", "8", out=tmp_path)
    notes = notes_of(lines)
    assert notes[0] == "note: target.bins has no effect: no block's target is hog"
    assert notes[1].startswith("note: at 64 x 64 px the windows of level 1, 2 do not divide the grid")


def test_decoders_that_cost_more_than_the_encoders_get_a_note(tmp_path: Path) -> None:
    args = "{img_size: 128, window_size: 4, embed_dim: 24, depths: [2, 2], num_heads: [1, 2]}"
    swin = ["--backbone.name", "swin_tiny_patch4_window7_224", "--backbone.model_args", args, "--blocks", "2"]
    own = ["--name", "mine"]  # not the demo, of whose images there is another note
    (note,) = notes_of(opening(*swin, *own, "--decoder.dim", "64", out=tmp_path))
    assert note.startswith("note: the decoders cost ")
    assert "times the encoders, most of it in block 0, on 32 x 32 tokens; lower decoder.dim" in note
    light = ["--decoder.dim", "[8, 16]", "--decoder.num_heads", "1", "--decoder.throw_ratio", "[0.65, 0.5]"]
    assert not notes_of(opening(*swin, *own, *light, out=tmp_path))


def test_few_distinct_masks_get_a_note(tmp_path: Path) -> None:
    args = "{img_size: 64, window_size: 4, embed_dim: 24, depths: [2, 2, 2, 2], num_heads: [1, 2, 2, 2]}"
    swin = ["--backbone.name", "swin_tiny_patch4_window7_224", "--backbone.model_args", args]
    light = ["--decoder.dim", "8", "--decoder.num_heads", "1"]
    (note,) = notes_of(opening(*swin, *light, "--name", "mine", out=tmp_path))
    assert note.startswith(
        "note: at 64 x 64 px there are 4 mask units, of which 1 stay visible: 4 different masks"
    )


def test_decoders_that_throw_nothing_get_a_note_with_other_remedies(tmp_path: Path) -> None:
    resnet = ["--backbone.name", "resnet18", "--backbone.model_args", "{}", "--mask.ratio", "[0.6, 0.75]"]
    wide = ["--decoder.dim", "256", "--decoder.num_heads", "8"]
    (note,) = notes_of(opening(*resnet, *wide, "--name", "mine", out=tmp_path))
    assert "lower decoder.dim there, or take fewer blocks" in note


def test_the_demos_settings_get_a_note_with_other_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(120):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number:03d}.png")
    source = ["--data.source", str(folder)]
    (note,) = notes_of(opening(*source, "--data.batch_size", "4", out=tmp_path / "run"))
    assert "those of the recipe digits_demo, which is meant for scans of 32 px" in note
    assert not notes_of(opening(*source, "--data.batch_size", "4", "--name", "mine", out=tmp_path / "run"))


def test_the_demos_images_get_a_note_if_they_are_much_enlarged(tmp_path: Path) -> None:
    vit = ["--backbone.name", "vit_tiny_patch16_224", "--backbone.model_args", "{depth: 4}"]
    note, *_ = notes_of(opening(*vit, out=tmp_path))
    assert note == (
        "note: the images are the demo's digits, scans of 8 x 8 pixels, enlarged to 224 px; --data.source gives others"
    )


@pytest.mark.parametrize(
    ("argv", "note"),
    [
        ("--evaluation.every_epochs 0", "evaluation.every_epochs is 0"),
        ("--evaluation.every_epochs 15", "it needs 4 scores, and there are 3 in 60 epochs"),
        ("--evaluation.every_epochs 14", None),
        ("--evaluation.every_epochs null", None),
    ],
)
def test_a_patience_that_cannot_end_the_training_gets_a_note(
    argv: str, note: str | None, tmp_path: Path
) -> None:
    epochs = ["--schedule.epochs", "60", "--evaluation.patience", "3"]
    notes = notes_of(opening(*epochs, *argv.split(), out=tmp_path))
    assert notes == ([] if note is None else [f"note: evaluation.patience has no effect: {note}"])


def test_epochs_of_few_steps_get_a_note_with_sizes_that_have_enough(tmp_path: Path) -> None:
    source = ["--name", "mine", "--data.source", "synthetic:4500x32x32", "--data.val_fraction", "0.02"]
    large = [*source, "--data.test_fraction", "0.02", "--data.batch_size", "512", "--data.accumulate", "8"]
    lines = opening(*large, out=tmp_path)
    assert any(" epochs of 1 step of 4096 images" in line for line in lines)
    assert notes_of(lines) == [
        "note: an epoch has 1 step of 4096 images, and should have 20 or more; with data.accumulate 1 and data.batch_size "
        "128 an epoch has 33 steps"
    ]
    fitting = ["--data.batch_size", "128", "--data.accumulate", "1"]
    assert not notes_of(opening(*large, *fitting, out=tmp_path))


def test_the_steps_of_an_epoch_are_those_of_the_rules_of_automatic_settings() -> None:
    assert auto_rules().steps.min_per_epoch == MIN_STEPS
