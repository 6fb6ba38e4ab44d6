"""The command with a short search, and with two backbones, once each; what can go wrong in them is in the slow suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import TINY, arguments, call, image_folder

STORE = {"tracking.uri": "sqlite:///mlflow.db", "data.source": "images", "data.batch_size": "8"}


def trained(out: Path, *columns: str) -> list[tuple[object, ...]]:
    """These columns of the table of results, of the rows of trained weights."""
    rows = json.loads((out / "summary.json").read_text())
    return [tuple(row[column] for column in columns) for row in rows if row["weights"] == "trained"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_chooses_the_settings_of_the_run(home: Path) -> None:
    search = {
        "placement.backend": "ray",
        "search.trials": "2",
        "search.trial_epochs": "1",
        "search.grace_epochs": "1",
        "search.every_epochs": "1",
        "search.trial_stages": "1",
        "search.space": "{mask.ratio: [0.5]}",
        "placement.stages": "1",
        "out": "runs/searched",
    }
    image_folder(home / "images", "{label}/{number}.png", 80)
    finished = call(arguments(TINY, STORE, search))
    assert finished.status == 0, finished.stderr + finished.stdout
    assert "search: 2 finished" in finished.stdout
    out = home / "runs" / "searched"
    assert (out / "search" / "best.yaml").exists()
    assert trained(out, "depth") == [(1,), (2,), (3,), (4,)]


def test_two_backbones_are_compared_in_one_table(home: Path) -> None:
    vit = {
        "name": "vit_tiny_patch16_224",
        "alias": "vit",
        "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 1},
    }
    swin = {
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
    tiny = {key: value for key, value in TINY.items() if not key.startswith("backbone.")}
    both = {"backbones": json.dumps([vit, swin]), "blocks": "2", "out": "runs/both"}
    image_folder(home / "images", "{number}.png", 60)
    finished = call(arguments(tiny, STORE, both))
    assert finished.status == 0, finished.stderr + finished.stdout
    variants = [("vit", 1), ("vit", 2), ("swin", 1), ("swin", 2)]
    assert trained(home / "runs" / "both", "backbone", "depth") == variants
