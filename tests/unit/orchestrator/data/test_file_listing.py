from __future__ import annotations

from pathlib import Path

import pytest

from bim.orchestrator.data.file_listing import split_of_folder, split_of_shard, walk


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("test-00000-of-00001-0a1b2c.parquet", "test"),
        ("validation.parquet", "val"),
        ("valid_03.parquet", "val"),
        ("data/train/0000.parquet", "train"),
        ("shard-00000.parquet", None),
        ("training_notes.parquet", None),
    ],
)
def test_split_of_a_shard_is_in_its_name_or_folder(name: str, split: str | None):
    assert split_of_shard(Path(name)) == split


def test_split_folders_are_known_in_any_case():
    assert [split_of_folder(n) for n in ("Train", "VAL", "validation", "testing", "tests")] == [
        "train",
        "val",
        "val",
        "test",
        None,
    ]


def test_walk_gives_sorted_names_without_hidden_ones_and_loops(tmp_path: Path):
    for name in ("b.PNG", "a/c.png", ".hidden.png", ".thumbs/d.png", "__MACOSX/e.png", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert list(walk(tmp_path, ("png",))) == ["a/c.png", "b.PNG"]
