"""File names of a data set: which files are images, and which split a file or folder belongs to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from bim.orchestrator.data.errors import DataError, system_reason

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

_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"

# `train.parquet`, `train-00000-of-00004.parquet`, with the hash that the Hugging Face hub may add
_SHARD = re.compile(r"([a-z]+)(-\d+-of-\d+(-[0-9a-f]+)?|[-_.]?\d+)?", re.IGNORECASE)


def split_of_folder(name: str) -> str | None:
    """ "train", "val" or "test" if a folder of that name (`train`, `split=train`) holds a split, else None."""
    return SPLIT_NAMES.get(name.lower().removeprefix("split="))


def hive_values(name: str) -> dict[str, str | None]:
    """`split=train/label=a%20cat/0.png` -> {"split": "train", "label": "a cat"}; Hive's mark of a missing value is None."""
    pairs = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
    return {key: None if value == _HIVE_NULL else unquote(value) for key, _, value in pairs if key}


def split_of_shard(path: Path) -> str | None:
    """Split of a shard by its file name (`test-00000-of-00001.parquet`), else by its folder (`test/0000.parquet`)."""
    match = _SHARD.fullmatch(path.stem)
    by_name = SPLIT_NAMES.get(match.group(1).lower()) if match else None
    hive = [part for part in path.parent.parts if part.lower().startswith("split=")]
    return by_name or split_of_folder(hive[-1] if hive else path.parent.name)


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))


def walk(root: Path, extensions: Sequence[str]) -> Iterator[str]:
    """Yield files below `root` with one of `extensions`, as sorted relative names with forward slashes.

    Hidden files and folders (a leading dot, `__MACOSX`) are left out, and so is what is no file (a pipe, a device).
    Linked folders are followed, a folder that contains itself through a link only once; a link to nothing counts as a
    file, which cannot be read. Raises DataError for a folder that cannot be listed.
    """
    suffixes = tuple("." + e for e in extensions)
    visited: set[tuple[int, int]] = set()  # (device, inode)

    def walk_folder(folder: str, prefix: str) -> Iterator[str]:
        try:
            status = os.stat(folder)
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"the folder {folder} cannot be listed ({system_reason(error)}); or remove it from data.source"
            ) from error
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_dir():
                yield from walk_folder(entry.path, prefix + entry.name + "/")
            elif entry.name.lower().endswith(suffixes) and _is_file(entry):
                yield prefix + entry.name

    yield from walk_folder(str(root), "")
