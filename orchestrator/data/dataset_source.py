"""A `torch.utils.data.Dataset` of single images as a source: one of the user's own, or of any library."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bim.orchestrator.data.decode import DECODER_ERRORS, decode_error, decoder_message, image_to_rgb
from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.fingerprint import computed_once

MAX_LABEL_READS = 10_000
"""Images of a data set that keeps its labels in its items alone, up to which all items are read for them."""

SAMPLED_IMAGES = 8
"""Images whose pixels are part of the fingerprint."""

LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")

log = logging.getLogger(__name__)


class DatasetSource:
    """Images of a map-style data set, whose items are an image or a tuple (image, label, ...).

    An image is a Pillow image, a uint8 tensor (3 or 1, H, W) or (H, W), or a uint8 array (H, W), (H, W, 3) or (H, W, 4). A
    label is a whole number, -1 for none. Labels come from an attribute of the data set (`targets`, as torchvision's), or
    from its items if there are at most `MAX_LABEL_READS`. Worker processes get copies of the data set.

    An item must be the same whenever it is read: random transforms are the run's own.
    """

    chunks = None
    fixed_splits: dict[str, np.ndarray] | None = None

    def __init__(self, name: str, dataset: Any) -> None:
        """Raises DataError for what is no such data set, in a sentence."""
        self.name = name
        self._dataset = dataset
        if not is_dataset(dataset):
            raise DataError(
                f"data.source {name}: an object of class {type(dataset).__name__} is no data set of images that can be "
                "read by number; it needs __len__ and __getitem__"
            )
        self._num_images = len(dataset)
        if not self._num_images:
            raise DataError(f"data.source {name}: the data set has no images")
        first = self._check_first_item()
        self.notes: tuple[str, ...] = ()
        labels = labels_of(dataset)
        if labels is None and _label(first) is not None:
            labels = self._labels_of_items()
        self.labels = None if labels is None else _class_numbers(labels)
        self.class_names: tuple[str, ...] | None = None
        names = _class_names(dataset)
        if labels is not None and self.labels is not None and names is not None and labels.max() < len(names):
            self.class_names = names

    def __len__(self) -> int:
        return self._num_images

    def load(self, index: int) -> Tensor:
        """-> (3, H, W) uint8, not to be written to. Raises ImageDecodeError."""
        try:
            return _rgb(_image(self._dataset[index]))
        except DECODER_ERRORS as error:
            raise decode_error(self.sample_id(index), error) from error

    def sample_id(self, index: int) -> str:
        return f"{self.name} {index}"

    @computed_once
    def fingerprint(self) -> str:
        """SHA-256 over the number of images, the labels and the pixels of a few images, first 32 hexadecimal digits."""
        digest = hashlib.sha256(str(len(self)).encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        for index in np.unique(np.linspace(0, len(self) - 1, SAMPLED_IMAGES).astype(int)).tolist():
            try:
                pixels = self.load(index)
                digest.update(f"{index} {tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
            except ImageDecodeError as error:
                digest.update(f"{index} {error.reason}".encode())
        return digest.hexdigest()[:32]

    def _check_first_item(self) -> Any:
        """The first item, None if it cannot be read. Raises DataError if it is no image, or if it changes."""
        try:
            item = self._dataset[0]
        except DECODER_ERRORS:  # a damaged image; whether others can be read is found later
            return None
        except Exception as error:
            raise DataError(
                f"data.source {self.name}: reading image 0 fails: {type(error).__name__}: {decoder_message(error)}"
            ) from error
        try:
            pixels, again = _rgb(_image(item)), _rgb(_image(self._dataset[0]))
        except _NoImage as error:
            raise DataError(f"data.source {self.name}: {error}") from error
        except DECODER_ERRORS:
            return item
        if pixels.shape != again.shape or not torch.equal(pixels, again):
            raise DataError(
                f"data.source {self.name}: image 0 is another one each time it is read; leave random transforms out of the "
                "data set: the run crops and flips by itself (data.crop_scale, data.flip)"
            )
        return item

    def _labels_of_items(self) -> np.ndarray | None:
        if len(self) > MAX_LABEL_READS:
            self.notes = (
                f"{self.name} tells its labels in its items alone, and reading {len(self):,} images for them takes too "
                "long, so the images have none; give the data set an attribute `targets`, a list of all labels",
            )
            return None
        if len(self) > 1000:
            log.info(
                "%s: reading %s images for their labels; an attribute `targets` saves it",
                self.name,
                f"{len(self):,}",
            )
        labels = np.full(len(self), -1, dtype=np.int64)
        for index in range(len(self)):
            try:
                label = _label(self._dataset[index])
            except DECODER_ERRORS:
                continue
            labels[index] = -1 if label is None else max(label, -1)
        return labels


class _NoImage(ValueError):
    """An item is no image that a run can use."""


def is_dataset(value: object) -> bool:
    """Whether a value can be read by number as a `torch.utils.data.Dataset`."""
    return (
        hasattr(value, "__getitem__")
        and hasattr(value, "__len__")
        and not isinstance(value, str | bytes | dict)
    )


def labels_of(dataset: Any) -> np.ndarray | None:
    """(n,) int64 class numbers, -1 for none; None if the data set keeps none beside its images.

    Read are the attributes of torchvision's data sets, of what a `Subset` is of, and of the parts of a `ConcatDataset`.
    """
    inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is not None and indices is not None:
        labels = labels_of(inner)
        return None if labels is None else labels[np.asarray(indices, dtype=np.int64)]
    parts = getattr(dataset, "datasets", None)
    if isinstance(parts, list) and parts and sum(len(part) for part in parts) == len(dataset):
        of_parts = [labels_of(part) for part in parts]
        known = [labels for labels in of_parts if labels is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    candidates = [getattr(dataset, name, None) for name in LABEL_ATTRIBUTES]
    samples = getattr(dataset, "samples", getattr(dataset, "_samples", None))
    if isinstance(samples, list) and all(isinstance(s, tuple) and len(s) == 2 for s in samples):
        candidates.append([label for _, label in samples])
    for values in candidates:
        if values is None:
            continue
        try:
            labels = np.asarray(values)
        except ValueError:  # lists of unequal lengths
            continue
        if labels.shape == (len(dataset),) and labels.dtype.kind in "iu":
            return np.maximum(labels.astype(np.int64), -1)
    return None


def _class_numbers(labels: np.ndarray) -> np.ndarray | None:
    """The labels, renumbered where they are identifiers rather than class numbers; None if no image has one."""
    has_label = labels >= 0
    if not has_label.any():
        return None
    if labels.max() >= len(labels):
        labels = labels.copy()
        labels[has_label] = np.unique(labels[has_label], return_inverse=True)[1]
    return labels


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, Sequence) and not isinstance(classes, str):
        return tuple(str(name) for name in classes)
    inner = getattr(dataset, "dataset", None)
    return None if inner is None else _class_names(inner)


def _image(item: Any) -> Any:
    return item[0] if isinstance(item, tuple | list) and item else item


def _label(item: Any) -> int | None:
    """The label of an item, None if it has none."""
    if not isinstance(item, tuple | list) or len(item) < 2:
        return None
    label = item[1]
    if isinstance(label, Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    return int(label) if isinstance(label, int | np.integer) and not isinstance(label, bool) else None


def _rgb(image: Any) -> Tensor:
    """(3, H, W) uint8. Raises _NoImage, or one of DECODER_ERRORS."""
    if isinstance(image, Image.Image):
        return image_to_rgb(image)
    if not isinstance(image, Tensor | np.ndarray):
        raise _NoImage(
            f"an item is a {type(image).__name__}; it must be a Pillow image, a uint8 tensor or a uint8 array, or a tuple "
            "that begins with one"
        )
    shape, dtype = tuple(image.shape), str(image.dtype).removeprefix("torch.")
    if dtype != "uint8":
        raise _NoImage(
            f"an image is of {dtype}, not uint8; give the images before ToTensor and Normalize, which the run does itself"
        )
    if isinstance(image, np.ndarray):
        if len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4)):
            return image_to_rgb(Image.fromarray(image))
        raise _NoImage(f"an array has the shape {shape}; it must be (H, W), (H, W, 3) or (H, W, 4)")
    if len(shape) == 2:
        image = image[None]
    if len(shape) not in (2, 3) or image.shape[0] not in (1, 3):
        raise _NoImage(f"a tensor has the shape {shape}; it must be (3, H, W), (1, H, W) or (H, W)")
    return image.expand(3, -1, -1)
