"""What file names tell: which files are images, which split a file or folder belongs to; and a compact table that
keeps a million names cheap to pickle. For the folder and Parquet sources; knows nothing of pixels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bim.orchestrator.data.errors import DataError

IMAGE_EXTENSIONS = ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

# `train.parquet`, `train-00000-of-00004.parquet`, with the hash that the Hugging Face hub may add
_SHARD = re.compile(r"([a-z]+)(-\d+-of-\d+(-[0-9a-f]+)?|[-_.]?\d+)?", re.IGNORECASE)


def split_of_folder(name: str) -> str | None:
    """ "train", "val" or "test" if a folder of that name holds a split, else None."""
    return SPLIT_NAMES.get(name.lower())


def split_of_shard(path: Path) -> str | None:
    """Split of a shard by its file name (`test-00000-of-00001.parquet`), else by its folder (`test/0000.parquet`)."""
    match = _SHARD.fullmatch(path.stem)
    by_name = SPLIT_NAMES.get(match.group(1).lower()) if match else None
    return by_name or split_of_folder(path.parent.name)


def walk(root: Path, extensions: Sequence[str]) -> Iterator[str]:
    """Yield files below `root` that bear one of `extensions`, as relative names with forward slashes, in a fixed order.

    Hidden files and folders (a leading dot, `__MACOSX`) are left out. Linked folders are followed, a folder that
    contains itself through a link only once. Raises DataError for a folder that may not be listed.
    """
    endings = tuple("." + e for e in extensions)
    seen: set[tuple[int, int]] = set()

    def inside(folder: str, prefix: str) -> Iterator[str]:
        try:
            status = os.stat(folder)
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"the folder {folder} cannot be listed ({error.strerror}); make it readable or take it out of data.source"
            ) from error
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_dir():
                yield from inside(entry.path, prefix + entry.name + "/")
            elif entry.name.lower().endswith(endings):
                yield prefix + entry.name

    yield from inside(str(root), "")


class NameTable(Sequence[str]):
    """Immutable list of names held as one byte string and offsets: 1.28 million names pickle in milliseconds."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(name) for name in encoded], out=self._offsets[1:])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # Sequence's overloads: int -> str, slice -> list
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        return os.fsdecode(self._bytes[self._offsets[index] : self._offsets[index + 1]])
