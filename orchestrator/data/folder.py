"""Images in a folder, flat or nested, with or without class directories and split directories.
Names are listed once; an image is opened when it is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from bim.orchestrator.data.decode import decode_rgb
from bim.orchestrator.data.errors import DataError, ImageDecodeError, is_exhausted, system_reason
from bim.orchestrator.data.file_listing import IMAGE_EXTENSIONS, walk
from bim.orchestrator.data.fingerprint import computed_once
from bim.orchestrator.data.folder_layout import read_layout


class FolderSource:
    """Every image below `root`, in the order of their names.

    Splits and labels are those that the directories tell, see `folder_layout.read_layout`; classes are numbered by their
    sorted names.
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
        layout = read_layout(names)
        self.fixed_splits, self.notes = layout.fixed_splits, layout.notes
        self.labels, self.class_names = layout.labels, layout.class_names
        self._is_plain = layout.is_plain

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> Tensor:
        """-> (3, H, W) uint8. Raises ImageDecodeError, also for a file that is missing or not readable."""
        name = self.sample_id(index)
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            if is_exhausted(error):
                raise DataError(f"{self.root / name} cannot be read: {system_reason(error)}") from error
            raise ImageDecodeError(name, f"the file cannot be read: {system_reason(error)}") from error
        return decode_rgb(data, name)

    def sample_id(self, index: int) -> str:
        return os.fsdecode(self._names[index].as_py())

    @computed_once
    def fingerprint(self) -> str:
        """SHA-256 over the count, names and sizes of the files, first 32 hexadecimal digits; reads no image.

        Files that were rewritten with as many bytes go unnoticed.
        """
        digest = hashlib.sha256(f"folder {len(self)}".encode())
        for name in self._names.to_pylist():
            try:
                size = os.stat(self.root / os.fsdecode(name)).st_size
            except OSError:
                size = -1
            digest.update(name + f" {size}\n".encode())
        if not self._is_plain:  # an earlier version read splits and labels of such names in another way
            digest.update(b"" if self.labels is None else self.labels.tobytes())
            for split, numbers in (self.fixed_splits or {}).items():
                digest.update(split.encode() + numbers.tobytes())
        return digest.hexdigest()[:32]
