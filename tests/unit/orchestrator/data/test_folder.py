from __future__ import annotations

import errno
import hashlib
import os
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


def classes_by_name(source: FolderSource) -> dict[str, str | None]:
    """Name -> class of each image."""
    assert source.labels is not None
    assert source.class_names is not None
    classes = [None if label < 0 else source.class_names[label] for label in source.labels.tolist()]
    return dict(zip(map(source.sample_id, range(len(source))), classes, strict=True))


@pytest.mark.parametrize(
    ("names", "classes", "note"),
    [
        (("cat/1.png", "dog/1.png", "3.png"), "cat dog -", "1 of 3 images lie in no class folder (such as 3.png)"),
        (("cat/1.png", "dog/old/1.png"), "cat dog", ""),
        (("cat/images/1.png", "dog/images/2.png"), "cat dog", ""),
        (("label=cat/a/1.png", "label=dog/b/2.png"), "cat dog", ""),
        (("train/a/1.png", "train/b/2.png", "val/a/3.png", "test/4.png"), "a b a -", ""),
        (("train/a/1.png", "train/b/2.png", "val/3.png"), "a b -", ""),
        (("train/a/x/1.png", "train/b/x/2.png", "val/x/3.png"), "a b -", "no folder of val (such as 'x')"),
        (("train/a/1.png", "train/b/2.png", "9.png"), "a b -", "1 image beside the split folders (such as 9.png)"),
        (("train/a/1.png", "train/b/2.png", "val/a/3.png", "docs/4.png"), "a b a -", "not used (docs)"),
    ],
)  # fmt: skip
def test_labels_that_can_be_taken_are_taken(
    names: tuple[str, ...], classes: str, note: str, image_folder: Make
):
    source = FolderSource(image_folder(*names))
    expected = [None if name == "-" else name for name in classes.split()]
    assert classes_by_name(source) == dict(zip(names, expected, strict=True))
    assert len(source.notes) == (1 if note else 0)
    assert not note or note in source.notes[0]


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("a/abbey/1.png", "a/attic/2.png", "b/bar/3.png"), "nested in several levels (such as a/abbey)"),
        (("images/1.png", "images/2.png"), ""),  # one directory is no choice
        (("1.png", "2.png"), ""),
    ],
)
def test_layouts_without_a_class_per_image_have_no_labels(
    names: tuple[str, ...], note: str, image_folder: Make
):
    source = FolderSource(image_folder(*names))
    assert source.labels is None
    assert len(source.notes) == (1 if note else 0)
    assert not note or note in source.notes[0]


def test_a_labeled_layout_of_an_earlier_version_keeps_its_fingerprint(image_folder: Make):
    plain = FolderSource(image_folder("cat/1.png", "dog/1.png"))
    digest = hashlib.sha256(b"folder 2")
    for name in ("cat/1.png", "dog/1.png"):
        digest.update(f"{name} {(plain.root / name).stat().st_size}\n".encode())
    assert plain.fingerprint() == digest.hexdigest()[:32]
    nested = FolderSource(image_folder("cat/x/1.png", "dog/x/1.png", root="nested"))
    as_before = hashlib.sha256(b"folder 2")
    for name in ("cat/x/1.png", "dog/x/1.png"):
        as_before.update(f"{name} {(nested.root / name).stat().st_size}\n".encode())
    assert nested.fingerprint() != as_before.hexdigest()[:32]  # its labels are new, and with them its splits


def test_what_is_no_file_is_left_out_and_a_link_to_nothing_counts_as_unreadable(image_folder: Make):
    folder = image_folder("a.png")
    os.mkfifo(folder / "b.png")
    (folder / "c.png").symlink_to("nowhere")
    source = FolderSource(folder)
    assert [source.sample_id(index) for index in range(len(source))] == ["a.png", "c.png"]
    with pytest.raises(ImageDecodeError, match="cannot be read: No such file"):
        source.load(1)


def test_a_limit_of_the_system_is_no_damaged_image(image_folder: Make, monkeypatch: pytest.MonkeyPatch):
    source = FolderSource(image_folder("a.png"))

    def refused(number: int) -> None:
        def read_bytes(path: Path) -> bytes:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "read_bytes", read_bytes)

    refused(errno.EMFILE)
    with pytest.raises(
        DataError, match=r"a\.png cannot be read: Too many open files; raise the limit .*ulimit -n"
    ):
        source.load(0)
    refused(errno.EIO)
    with pytest.raises(ImageDecodeError, match=r"Input/output error; the disk or the network share fails"):
        source.load(0)


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
