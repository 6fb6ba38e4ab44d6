"""Images in a folder, flat or nested, with or without class directories and split directories.
Names are listed once; an image is opened when it is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from bim.orchestrator.data.decode import decode_rgb
from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.file_listing import IMAGE_EXTENSIONS, split_of_folder, walk


class FolderSource:
    """Every image below `root`, in the order of their names.

    Splits: if every image lies below a directory named train, val(id)(ation) or test, and a train one is among them,
    these are `fixed_splits`. Labels: if every image lies in exactly one directory (below its split directory, if there
    are any) and there are two names or more, the directories are the classes, numbered by their sorted names. In any
    other layout the images have no labels.
    """

    chunks = None

    def __init__(self, root: Path, names: Sequence[str] | None = None) -> None:
        """names: files relative to `root`, if the caller has listed them. Raises DataError if there are none."""
        self.root = root.resolve()  # a worker may have another working directory
        self.name = str(root)
        names = list(walk(self.root, IMAGE_EXTENSIONS)) if names is None else names
        if not names:
            raise DataError(
                f"the folder {root} holds no images; files that end in {', '.join(IMAGE_EXTENSIONS)} count, "
                "in any sub-folder: set data.source to the folder that has them"
            )
        # 1.28 million names pickle in milliseconds; a name on the disk may be no UTF-8
        self._names = pa.array([os.fsencode(name) for name in names], pa.large_binary())
        self.fixed_splits = _splits(names)
        if self.fixed_splits is not None:
            names = [name.partition("/")[2] for name in names]  # a split is not a class
        self.labels, self.class_names = _labels(names)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> Tensor:
        """-> (3, H, W) uint8. Raises ImageDecodeError, also for a file that is missing or not readable."""
        name = self.sample_id(index)
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            raise ImageDecodeError(name, f"the file cannot be read: {error.strerror}") from error
        return decode_rgb(data, name)

    def sample_id(self, index: int) -> str:
        return os.fsdecode(self._names[index].as_py())

    def fingerprint(self) -> str:
        """SHA-256 over the count, names and sizes of the files, first 32 hexadecimal digits; reads no image."""
        digest = hashlib.sha256(f"folder {len(self)}".encode())
        for name in self._names.to_pylist():
            path = self.root / os.fsdecode(name)
            size = path.stat().st_size if path.exists() else -1
            digest.update(name + f" {size}\n".encode())
        return digest.hexdigest()[:32]


def _splits(names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Image numbers per split, None unless all images lie in split folders, one being train."""
    splits: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        folder, slash, _ = name.partition("/")
        split = split_of_folder(folder) if slash else None
        if split is None:
            return None
        splits.setdefault(split, []).append(index)
    if "train" not in splits:
        return None
    return {split: np.array(members, dtype=np.int64) for split, members in splits.items()}


def _labels(names: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Class number per image and class names, None and None unless every name is CLASS/FILE with two classes or more."""
    if any(name.count("/") != 1 for name in names):
        return None, None
    folders = [name.partition("/")[0] for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2:
        return None, None
    class_index = {name: k for k, name in enumerate(classes)}
    return np.array([class_index[folder] for folder in folders], dtype=np.int64), tuple(classes)
