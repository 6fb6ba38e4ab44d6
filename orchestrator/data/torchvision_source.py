"""A data set of `torchvision.datasets` (CIFAR10, MNIST, STL10, ...) that is on the disk, as a source.
Nothing is downloaded and no transform applied."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from bim.orchestrator.data.dataset_source import labels_of
from bim.orchestrator.data.decode import DECODER_ERRORS, decode_error, image_to_rgb
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.fingerprint import computed_once

DEFAULT_ROOT = "data"

NAMES = (
    "CIFAR10", "CIFAR100", "CLEVRClassification", "Caltech101", "Caltech256", "Country211", "DTD", "EMNIST", "EuroSAT",
    "FER2013", "FGVCAircraft", "FashionMNIST", "Flowers102", "Food101", "GTSRB", "INaturalist", "ImageNet", "Imagenette",
    "KMNIST", "LFWPeople", "MNIST", "Omniglot", "OxfordIIITPet", "PCAM", "Places365", "QMNIST", "RenderedSST2", "SEMEION",
    "STL10", "SUN397", "SVHN", "StanfordCars", "USPS",
)  # fmt: skip
"""Sets of single images of classes. Others hold videos, pairs or boxes, need further arguments, or unpickle a cache that
nothing verifies (LSUN)."""


class TorchvisionSource:
    """`torchvision.datasets.NAME` below ROOT: its training split followed by its test split, if it has both.

    Labels are the integers that it keeps beside its images, in each part by itself; a note says where it keeps none.
    Workers open the data set themselves.
    """

    chunks = None
    notes: tuple[str, ...] = ()

    def __init__(self, dataset: str, root: Path) -> None:
        """Raises DataError for an unknown name, or for a data set that is not below `root`."""
        self.name = f"torchvision:{dataset}:{root}"
        self._dataset = dataset
        self._root = root.expanduser().resolve()
        self._open: list[Any] | None = None
        parts = self._parts()
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.fixed_splits: dict[str, np.ndarray] | None = None
        if len(parts) == 2:
            self.fixed_splits = {
                "train": np.arange(self._starts[1], dtype=np.int64),
                "test": np.arange(self._starts[1], self._starts[2], dtype=np.int64),
            }
        labels = [labels_of(part) for part in parts]
        self.labels: np.ndarray | None = None
        if any(values is not None and (values >= 0).any() for values in labels):
            self.labels = np.concatenate(
                [
                    np.full(len(part), -1, dtype=np.int64) if values is None else values
                    for part, values in zip(parts, labels, strict=True)
                ]
            )
        else:
            self.notes = (
                f"torchvision's {dataset} does not tell its labels without decoding every image; the images have none",
            )
        classes = getattr(parts[0], "classes", None)
        self.class_names: tuple[str, ...] | None = None
        if isinstance(classes, list | tuple) and self.labels is not None:
            self.class_names = tuple(str(name) for name in classes)

    @classmethod
    def parse(cls, text: str) -> TorchvisionSource:
        """text: NAME or NAME:ROOT (default root "data")."""
        dataset, _, root = text.partition(":")
        return cls(dataset, Path(root or DEFAULT_ROOT))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def load(self, index: int) -> Tensor:
        """-> (3, H, W) uint8. Raises ImageDecodeError."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            image = self._parts()[part][index - int(self._starts[part])][0]
            if not isinstance(image, Image.Image):
                raise ValueError(f"it is a {type(image).__name__}, not an image")
            return image_to_rgb(image)
        except DECODER_ERRORS as error:
            raise decode_error(self.sample_id(index), error) from error

    def sample_id(self, index: int) -> str:
        return f"{self._dataset} {index}"

    @computed_once
    def fingerprint(self) -> str:
        """SHA-256 over name, part sizes and labels, first 32 hexadecimal digits."""
        digest = hashlib.sha256(f"{self._dataset} {self._starts.tolist()}".encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()[:32]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def _parts(self) -> list[Any]:
        if self._open is None:
            self._open = _open_parts(self._dataset, self._root)
        return self._open


def _open_parts(name: str, root: Path) -> list[Any]:
    from torchvision import datasets  # slow: imports all of its data sets

    if name not in NAMES or name not in datasets.__all__:
        near = difflib.get_close_matches(name[:100], NAMES, n=1)
        hint = (
            f"; did you mean 'torchvision:{near[0]}'?"
            if near
            else f": {', '.join(NAMES[:3])}, ..., {NAMES[-1]}"
        )
        problem = "is no set of images of classes" if name in datasets.__all__ else "does not exist"
        raise DataError(
            f"torchvision's data set {name[:100]!r} {problem}; data.source takes torchvision:NAME[:ROOT]{hint}"
        )
    dataset_class = getattr(datasets, name)
    parameters = inspect.signature(dataset_class).parameters
    choices: list[dict[str, Any]] = [{}]
    if "train" in parameters:
        choices = [{"train": True}, {"train": False}]
    elif "split" in parameters:
        choices = [{"split": "train"}, {"split": "test"}]
    try:
        return [dataset_class(root=str(root), **choice) for choice in choices]
    except (RuntimeError, OSError, ValueError, TypeError, LookupError, ImportError) as error:
        raise DataError(
            f"torchvision's {name} cannot be opened below {root} ({' '.join(str(error).split())}); download it there "
            f"first, or give its folder: 'torchvision:{name}:ROOT'"
        ) from error
