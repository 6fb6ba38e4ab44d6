"""The protocol of a data source, which gives single images by number, and the function that opens `data.source`.
Nothing is downloaded."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from bim.orchestrator.data.dataset_source import DatasetSource
from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import DataError, system_reason
from bim.orchestrator.data.file_listing import IMAGE_EXTENSIONS, walk
from bim.orchestrator.data.folder import FolderSource
from bim.orchestrator.data.parquet import ParquetSource
from bim.orchestrator.data.sampler import Chunks
from bim.orchestrator.data.synthetic import SyntheticSource
from bim.orchestrator.data.torchvision_source import TorchvisionSource


class Source(Protocol):
    """Numbered images. Pickles small: a worker process gets a copy and opens files itself."""

    @property
    def name(self) -> str:
        """As the user gave it."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64: class number from 0, or -1 for an image without a label. None if no image has one."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What looks like labels or images and is not used, and why; a sentence each."""
        ...

    @property
    def fixed_splits(self) -> dict[str, np.ndarray] | None:
        """ "train" and perhaps "val" and "test": image numbers, sorted int64. None if the data names no splits."""
        ...

    @property
    def chunks(self) -> Chunks | None:
        """Images that are cheap to read together; None for random access at equal cost."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tensor:
        """Image number `index` -> (3, H, W) uint8 RGB, not to be written to. Raises ImageDecodeError."""
        ...

    def sample_id(self, index: int) -> str:
        """A name by which a person finds the image."""
        ...

    def fingerprint(self) -> str:
        """Short hash that identifies the data, equal for equal data on another machine; `computed_once` keeps it."""
        ...


def _open_digits(argument: str) -> Source:
    if argument:
        raise DataError(f"data.source 'digits' takes no argument, got {argument!r}; write 'digits'")
    return DigitsSource()


GIVEN_SCHEME = "dataset"

_given: dict[str, Source] = {}


def _refuse_missing(name: str) -> Source:
    raise DataError(
        f"data.source '{GIVEN_SCHEME}:{name}' is a data set that was given as an object in Python; give it again to "
        "bim.orchestrator.pretrain, or register it in a module of yours, by a name in "
        "bim.orchestrator.data.source.SOURCES, and set --plugins MODULE"
    )


SOURCES: dict[str, Callable[[str], Any]] = {
    "digits": _open_digits,
    "synthetic": SyntheticSource.parse,
    "torchvision": TorchvisionSource.parse,
    GIVEN_SCHEME: _refuse_missing,
}
"""Name -> what opens `data.source` "NAME" or "NAME:ARGUMENT". It takes the argument ("" if there is none) and returns a
`Source`, or a `torch.utils.data.Dataset` of images, see `DatasetSource`."""


BUILT_IN_SOURCES = frozenset(SOURCES)


@contextmanager
def given(source: Source | None) -> Iterator[None]:
    """Inside, this source can be named as `data.source` in this process; None: nothing is."""
    if source is None:
        yield
        return
    _given[source.name] = source
    try:
        yield
    finally:
        del _given[source.name]


def given_source(name: str) -> Source | None:
    """The source that `given` names in this process."""
    return _given.get(name)


def dataset_object(dataset: Any) -> Source:
    """A data set that is an object, as a source named after its class. Raises DataError."""
    return DatasetSource(f"{GIVEN_SCHEME}:{type(dataset).__name__}", dataset)


def open_source(source: str, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Open `data.source`; a data set that `given` names in this process is open already, and is returned.

    source: "digits"; "torchvision:NAME[:ROOT]"; "synthetic:COUNTxWIDTHxHEIGHT"; a folder of images; a Parquet file or a
    folder of them (a folder called "digits" is given as "./digits"); or what is registered in `SOURCES`. The columns apply
    to Parquet. Raises DataError for a path that does not exist, a folder without images, a Parquet file without an image
    column, ...
    """
    held = given_source(source)
    if held is not None:
        return held
    scheme, _, argument = source.partition(":")
    if scheme in SOURCES:
        opened = _open_registered(source, scheme, argument)
    else:
        path = Path(os.path.expanduser(source))
        kind = _kind(path, source)
        if kind == "nothing":
            raise DataError(
                f"data.source {_shown(source)} does not exist; it is the path of a folder of images or of Parquet files, "
                f"or 'digits', or 'torchvision:NAME:ROOT'{_registered_names()}"
            )
        if kind == "folder":
            shards, images = _list_files(path)
        elif path.suffix.lower() == ".parquet":
            shards, images = [path], []
        else:
            raise DataError(
                f"data.source {_shown(source)} is a file, but not .parquet; give a folder of images"
            )
        if shards:
            return ParquetSource(path, shards, image_column, label_column)
        opened = FolderSource(path, images)
    if image_column is not None or label_column is not None:
        raise DataError(
            f"data.image_column and data.label_column apply to Parquet, unlike data.source {source!r}; unset them"
        )
    return opened


def _open_registered(source: str, scheme: str, argument: str) -> Source:
    try:
        opened = SOURCES[scheme](argument)
    except Exception as error:
        if scheme in BUILT_IN_SOURCES or isinstance(error, DataError):
            raise
        raise DataError(
            f"data.source {_shown(source)} cannot be opened: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    is_source = all(hasattr(opened, name) for name in ("load", "sample_id", "fingerprint"))
    result: Source = opened if is_source else DatasetSource(source, opened)
    return result


def _registered_names() -> str:
    names = [name for name in SOURCES if name not in BUILT_IN_SOURCES]
    return "".join(f", or '{name}'" for name in names)


def _kind(path: Path, source: str) -> str:
    """ "folder", "file" or "nothing". Raises DataError for what is neither, and for the system's own folders."""
    try:
        mode = os.stat(path).st_mode if source else None
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:  # a name too long, a loop of links, no permission
        reason = system_reason(error) if isinstance(error, OSError) else str(error)
        raise DataError(f"data.source {_shown(source)} cannot be used: {reason}") from error
    if mode is None:
        return "nothing"
    if _is_system_path(path) or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise DataError(
            f"data.source {_shown(source)} is no folder or file of images, but a device, a pipe or a folder of the system; "
            "give a folder of images or of Parquet files"
        )
    return "folder" if stat.S_ISDIR(mode) else "file"


def _is_system_path(path: Path) -> bool:
    resolved = path.resolve()
    inside = (resolved, *resolved.parents)
    return (
        any(Path(folder) in inside for folder in ("/proc", "/sys", "/dev")) and Path("/dev/shm") not in inside
    )


def _shown(source: str) -> str:
    return repr(source if len(source) <= 100 else source[:97] + "...")


def _list_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Parquet shards and image names below `folder`; one of the two is empty."""
    names = list(walk(folder, (*IMAGE_EXTENSIONS, "parquet")))
    # metadata.parquet beside images describes them (Hugging Face's image folder)
    shards = [n for n in names if n.lower().endswith(".parquet") and Path(n).name != "metadata.parquet"]
    images = [n for n in names if not n.lower().endswith(".parquet")]
    if shards and images:
        raise DataError(
            f"the folder {folder} holds Parquet files ({shards[0]}) and images ({images[0]}); "
            "set data.source to a subfolder or file of one kind"
        )
    return [folder / n for n in shards], images
