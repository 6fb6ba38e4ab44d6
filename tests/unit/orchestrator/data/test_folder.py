from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.folder import FolderSource

Make = Callable[..., Path]
Shows = Callable[[Tensor, int], bool]


def test_flat_folder_has_no_labels_and_keeps_pixels(image_folder: Make, shows: Shows):
    source = FolderSource(image_folder("b.png", "a.png"))
    assert len(source) == 2
    assert source.sample_id(0) == "a.png"
    assert shows(source.load(0), 1)
    assert source.labels is source.class_names is source.fixed_splits is source.chunks is None


def test_one_level_of_directories_is_the_classes(image_folder: Make):
    source = FolderSource(image_folder("dog/1.png", "cat/1.png", "dog/2.png"))
    assert source.class_names == ("cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "names",
    [
        ("dog/1.png", "cat/1.png", "3.png"),  # one lies outside
        ("dog/old/1.png", "cat/1.png"),  # two levels
        ("images/1.png", "images/2.png"),  # one directory is no choice
    ],
)
def test_other_layouts_have_no_labels(image_folder: Make, names: tuple[str, ...]):
    assert FolderSource(image_folder(*names)).labels is None


def test_split_directories_are_not_classes(image_folder: Make):
    source = FolderSource(image_folder("train/1.png", "train/2.png", "validation/1.png", "test/1.png"))
    assert source.labels is None
    assert source.fixed_splits is not None
    assert {k: v.tolist() for k, v in source.fixed_splits.items()} == {
        "test": [0],
        "train": [1, 2],
        "val": [3],
    }


def test_classes_below_split_directories_are_shared_by_the_splits(image_folder: Make):
    source = FolderSource(image_folder("train/a/1.png", "train/b/2.png", "test/b/3.png"))
    assert source.class_names == ("a", "b")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 1]  # test/b/3, train/a/1, train/b/2
    assert source.fixed_splits is not None
    assert sorted(source.fixed_splits) == ["test", "train"]


def test_a_directory_beside_the_split_directories_makes_all_of_them_classes(image_folder: Make):
    source = FolderSource(image_folder("train/1.png", "tracks/2.png"))
    assert source.fixed_splits is None
    assert source.class_names == ("tracks", "train")


def test_folder_without_images_says_which_files_count(image_folder: Make):
    folder = image_folder()
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds no images; files that end in bmp, .*png.* count"):
        FolderSource(folder)


def test_damaged_and_vanished_files_are_bad_images(image_folder: Make):
    folder = image_folder("a.png", "b.png", "c.png", damaged=("a.png",))
    (folder / "c.png").write_bytes(b"")
    source = FolderSource(folder)
    (folder / "b.png").unlink()
    for index, reason in enumerate(("truncated", "cannot be read: No such file", "empty")):
        with pytest.raises(ImageDecodeError, match=reason) as caught:
            source.load(index)
        assert caught.value.sample_id == "abc"[index] + ".png"


def test_a_copy_in_another_process_opens_the_same_files(
    image_folder: Make, monkeypatch: pytest.MonkeyPatch, shows: Shows
):
    folder = image_folder("a.png", "b.png")
    monkeypatch.chdir(folder.parent)
    state = pickle.dumps(FolderSource(Path(folder.name)))
    monkeypatch.chdir("/")
    copy = pickle.loads(state)
    assert shows(copy.load(1), 1)


def test_fingerprint_follows_names_and_sizes_but_not_the_place(image_folder: Make):
    first = FolderSource(image_folder("a.png", "b.png", root="one")).fingerprint()
    again = image_folder("a.png", "b.png", root="two")
    assert FolderSource(again).fingerprint() == first
    (again / "b.png").write_bytes(b"other")
    assert FolderSource(again).fingerprint() != first
    (again / "b.png").unlink()
    assert FolderSource(again).fingerprint() != first


def test_any_name_survives_pickling():
    names = ["a.png", "ä/ü.png", "caf\udce9.png"]  # the last is no UTF-8 on the disk
    copy = pickle.loads(pickle.dumps(FolderSource(Path("/images"), names)))
    assert [copy.sample_id(index) for index in range(len(copy))] == names


def test_a_hundred_thousand_names_pickle_to_their_own_size():
    names = [f"n{k:08d}-{k:08d}.jpeg" for k in range(100_000)]
    assert len(pickle.dumps(FolderSource(Path("/images"), names))) < sum(map(len, names)) + 900_000
