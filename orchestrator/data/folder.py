"""Images in a folder, flat or nested, with or without class directories and split directories.
Lists names once; opens no image before it is asked for. For users whose data is files on a disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from bim.orchestrator.data.decode import decode_rgb
from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.file_listing import IMAGE_EXTENSIONS, NameTable, split_of_folder, walk


class FolderSource:
    """Every image below `root`, in the order of their names.

    Splits: if every image lies below a directory named train, val(id)(ation) or test, and a train one is among them,
    these are `fixed_splits`. Labels: if every image lies in exactly one directory (below its split directory, if there
    are any) and these have two names or more, the directories are the classes, numbered by their sorted names. In any
    other layout the images have no labels.
    """

    chunks = None

    def __init__(self, root: Path, names: Sequence[str] | None = None) -> None:
        """names: files relative to `root`, if the caller has listed them. Raises DataError if there are none."""
        self.root = root.resolve()  # a worker may run in another directory
        self.name = str(root)
        names = list(walk(self.root, IMAGE_EXTENSIONS)) if names is None else names
        if not names:
            raise DataError(
                f"the folder {root} holds no images; files that end in {', '.join(IMAGE_EXTENSIONS)} count, "
                "in any sub-folder: set data.source to the folder that has them"
            )
        self._names = NameTable(names)
        self.fixed_splits = _splits(names)
        if self.fixed_splits is not None:
            names = [name.partition("/")[2] for name in names]  # a split is no class
        self.labels, self.class_names = _labels(names)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> Tensor:
        """-> (3, H, W) uint8. Raises ImageDecodeError, also for a file that has gone or may not be read."""
        name = self._names[index]
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            raise ImageDecodeError(name, f"the file cannot be read: {error.strerror}") from error
        return decode_rgb(data, name)

    def item_name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> str:
        """SHA-256 over the count, names and sizes of the files, first 32 hexadecimal digits; reads no image."""
        digest = hashlib.sha256(f"folder {len(self)}".encode())
        for name in self._names:
            path = self.root / name
            size = path.stat().st_size if path.exists() else -1
            digest.update(os.fsencode(name) + f" {size}\n".encode())
        return digest.hexdigest()[:32]


def _splits(names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Image numbers per split, None unless all images lie in split folders, one being train."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        folder, slash, _ = name.partition("/")
        split = split_of_folder(folder) if slash else None
        if split is None:
            return None
        found.setdefault(split, []).append(index)
    if "train" not in found:
        return None
    return {split: np.array(members, dtype=np.int64) for split, members in found.items()}


def _labels(names: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Class number per image and class names, None and None unless every name is CLASS/FILE with two classes or more."""
    if any(name.count("/") != 1 for name in names):
        return None, None
    folders = [name.partition("/")[0] for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2:
        return None, None
    number = {name: k for k, name in enumerate(classes)}
    return np.array([number[folder] for folder in folders], dtype=np.int64), tuple(classes)
