"""What a data set is to the rest of the package, and how a user's `data.source` becomes one.
A source gives single images by number; splits, order, crops and batches are others' business. Downloads nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.file_listing import IMAGE_EXTENSIONS, walk
from bim.orchestrator.data.folder import FolderSource
from bim.orchestrator.data.parquet import ParquetSource
from bim.orchestrator.data.sampler import Chunks
from bim.orchestrator.data.torchvision_source import TorchvisionSource

__all__ = ["SOURCES", "DataError", "ImageDecodeError", "Source", "open_source"]


class Source(Protocol):
    """Numbered images. Pickles small: a worker process gets a copy and opens files itself."""

    @property
    def name(self) -> str:
        """As the user named it."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64 from 0, or None if some image has none."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    @property
    def fixed_splits(self) -> dict[str, np.ndarray] | None:
        """ "train" and perhaps "val" and "test": image numbers, sorted int64. None if the data names no splits."""
        ...

    @property
    def chunks(self) -> Chunks | None:
        """Images that are cheap to read together; None if it makes no difference."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tensor:
        """Image number `index` -> (3, H, W) uint8 RGB, not to be written to. Raises ImageDecodeError."""
        ...

    def item_name(self, index: int) -> str:
        """What a person can find the image by."""
        ...

    def fingerprint(self) -> str:
        """Short hash of what the data is; cheap, equal for equal data on another machine."""
        ...


def _open_digits(rest: str) -> Source:
    if rest:
        raise DataError(f"data.source 'digits' takes nothing behind it, and {rest!r} is; write 'digits'")
    return DigitsSource()


SOURCES: dict[str, Callable[[str], Source]] = {"digits": _open_digits, "torchvision": TorchvisionSource.parse}


def open_source(source: str, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Open what `data.source` names.

    source: "digits"; "torchvision:NAME[:ROOT]"; a folder of images; a Parquet file or a folder of them (a folder that
    bears one of these names is meant by "./digits"). The columns apply to Parquet. Raises DataError for a path that
    does not exist, a folder without images, a Parquet file without an image column, ...
    """
    kind, _, rest = source.partition(":")
    if kind in SOURCES:
        opened = SOURCES[kind](rest)
    else:
        path = Path(source).expanduser()
        if not source or not path.exists():
            raise DataError(
                f"data.source {source!r} does not exist; it is the path of a folder of images or of Parquet files, "
                "or 'digits', or 'torchvision:NAME:ROOT'"
            )
        if path.is_dir():
            shards, images = _listed(path)
        elif path.suffix.lower() == ".parquet":
            shards, images = [path], []
        else:
            raise DataError(
                f"data.source {source!r} is a file, but no .parquet; name a folder of images instead"
            )
        if shards:
            return ParquetSource(path, shards, image_column, label_column)
        opened = FolderSource(path, images)
    if image_column is not None or label_column is not None:
        raise DataError(
            f"data.image_column and data.label_column apply to Parquet, and data.source {source!r} is none; unset them"
        )
    return opened


def _listed(folder: Path) -> tuple[list[Path], list[str]]:
    """Parquet shards and image names below `folder`; one of the two is empty."""
    found = list(walk(folder, (*IMAGE_EXTENSIONS, "parquet")))
    # metadata.parquet beside images describes them (Hugging Face's image folder); it holds none
    shards = [n for n in found if n.lower().endswith(".parquet") and Path(n).name != "metadata.parquet"]
    images = [n for n in found if not n.lower().endswith(".parquet")]
    if shards and images:
        raise DataError(
            f"the folder {folder} holds Parquet files ({shards[0]}) and images ({images[0]}); "
            "set data.source to a sub-folder or file with one kind"
        )
    return [folder / n for n in shards], images
