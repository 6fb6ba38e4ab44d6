from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from bim.orchestrator.data import dataset_source
from bim.orchestrator.data.dataset_source import DatasetSource, labels_of
from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.phases import PhaseSpec
from bim.orchestrator.data.source import SOURCES, dataset_object, given, given_source, open_source
from bim.orchestrator.data.spec import DataSpec


class Items(Dataset[Any]):
    """A data set of given items."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


GRAY = np.arange(12, dtype=np.uint8).reshape(3, 4)
COLOR = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
RGB = torch.from_numpy(COLOR).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(COLOR), RGB),
        (Image.fromarray(GRAY), torch.from_numpy(GRAY).expand(3, -1, -1)),
        (COLOR, RGB),
        (np.dstack([COLOR, np.full((3, 4), 255, np.uint8)]), RGB),
        (GRAY, torch.from_numpy(GRAY).expand(3, -1, -1)),
        (RGB, RGB),
        (torch.from_numpy(GRAY), torch.from_numpy(GRAY).expand(3, -1, -1)),
        (torch.from_numpy(GRAY)[None], torch.from_numpy(GRAY).expand(3, -1, -1)),
    ],
    ids=[
        "Pillow",
        "gray Pillow",
        "array",
        "RGBA array",
        "gray array",
        "tensor",
        "gray tensor",
        "one channel",
    ],
)
@pytest.mark.parametrize("wrap", [lambda image: image, lambda image: (image, 3), lambda image: [image, "x"]])
def test_every_kind_of_image_is_read_as_rgb(image: Any, expected: torch.Tensor, wrap: Any) -> None:
    source = DatasetSource("mine", Items([wrap(image)]))
    assert torch.equal(source.load(0), expected)
    assert source.load(0).dtype == torch.uint8


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (RGB.float() / 255, "float32, not uint8; give the images before ToTensor"),
        ((COLOR.astype(np.float64), 1), "float64, not uint8"),
        (torch.zeros(3, 4, 2, 3, dtype=torch.uint8), r"shape \(3, 4, 2, 3\)"),
        (torch.zeros(2, 4, 3, dtype=torch.uint8), r"shape \(2, 4, 3\); it must be \(3, H, W\)"),
        (np.zeros((3, 4, 2), np.uint8), r"it must be \(H, W\)"),
        ({"image": COLOR}, "an item is a dict; it must be a Pillow image"),
        ("a.png", "an item is a str"),
    ],
)
def test_what_is_no_image_is_refused_at_once(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        DatasetSource("mine", Items([item]))


def test_what_cannot_be_read_by_number_is_refused() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([COLOR])

    with pytest.raises(DataError, match="class Stream is no data set of images that can be read by number"):
        DatasetSource("mine", Stream())
    with pytest.raises(DataError, match="has no images"):
        DatasetSource("mine", Items([]))


def test_an_error_of_the_program_is_a_sentence() -> None:
    with pytest.raises(DataError, match="mine: reading image 0 fails: TypeError: two lines"):
        DatasetSource("mine", Items([TypeError("two\nlines")]))


def test_random_transforms_are_refused() -> None:
    class Noisy(Items):
        def __getitem__(self, index: int) -> Any:
            return torch.randint(256, (3, 4, 4), dtype=torch.uint8)

    with pytest.raises(DataError, match="another one each time it is read; leave random transforms out"):
        DatasetSource("mine", Noisy([0, 1]))


def test_an_image_that_cannot_be_read_is_counted_as_any_other() -> None:
    source = DatasetSource("mine", Items([COLOR, OSError("gone"), None]))
    with pytest.raises(ImageDecodeError, match="mine 1: gone"):
        source.load(1)
    with pytest.raises(ImageDecodeError, match="mine 2: an item is a NoneType"):
        source.load(2)
    first = DatasetSource("mine", Items([OSError("gone"), COLOR]))
    assert len(first) == 2


def test_a_limit_of_the_system_is_no_damaged_image() -> None:
    items = [COLOR, OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "Input/output error")]
    source = DatasetSource("scans", Items(items))
    with pytest.raises(DataError, match=r"scans 1 cannot be read: Too many open files; raise the limit"):
        source.load(1)
    with pytest.raises(ImageDecodeError, match="Input/output error"):
        source.load(2)


def test_labels_come_from_an_attribute_or_from_the_items() -> None:
    kept = DatasetSource("mine", Items([COLOR] * 3, targets=[2, 0, 1], classes=["a", "b", "c"]))
    assert kept.labels is not None
    assert kept.labels.tolist() == [2, 0, 1]
    assert kept.class_names == ("a", "b", "c")
    items = [(COLOR, 4), (COLOR, np.int64(0)), (COLOR, torch.tensor(2)), (COLOR, -1), (COLOR, None)]
    read = DatasetSource("mine", Items(items))
    assert read.labels is not None
    assert read.labels.tolist() == [4, 0, 2, -1, -1]
    assert DatasetSource("mine", Items([COLOR])).labels is None
    assert DatasetSource("mine", Items([(COLOR, "a.png")])).labels is None


def test_identifiers_are_numbered_and_labels_of_nothing_are_none() -> None:
    source = DatasetSource("mine", Items([COLOR] * 4, targets=[10**12, 7, -5, 10**12], classes=["a", "b"]))
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, -1, 1]
    assert source.class_names is None
    assert DatasetSource("mine", Items([COLOR] * 2, targets=[-1, -1])).labels is None
    assert DatasetSource("mine", Items([COLOR] * 2, targets=["a", "b"])).labels is None
    assert DatasetSource("mine", Items([COLOR] * 2, targets=[1])).labels is None


def test_many_items_are_not_read_for_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_source, "MAX_LABEL_READS", 2)
    source = DatasetSource("mine", Items([(COLOR, 1)] * 3))
    assert source.labels is None
    assert "give the data set an attribute `targets`" in source.notes[0]


def test_labels_of_parts_and_subsets_are_found() -> None:
    data = Items([COLOR] * 4, targets=[0, 1, 2, 3], classes=["a", "b", "c", "d"])
    subset = Subset(data, [3, 1])
    found = labels_of(subset)
    assert found is not None
    assert found.tolist() == [3, 1]
    assert DatasetSource("mine", subset).class_names == ("a", "b", "c", "d")
    both = labels_of(ConcatDataset([subset, data]))
    assert both is not None
    assert both.tolist() == [3, 1, 0, 1, 2, 3]
    assert labels_of(ConcatDataset([subset, Items([COLOR])])) is None


def test_equal_data_have_equal_fingerprints_and_others_do_not() -> None:
    def fingerprint(*items: Any) -> str:
        return DatasetSource("any", Items(list(items))).fingerprint()

    assert fingerprint(COLOR, GRAY) == fingerprint(COLOR.copy(), Image.fromarray(GRAY))
    others = {
        fingerprint(COLOR, GRAY),
        fingerprint(COLOR),
        fingerprint(GRAY, COLOR),
        fingerprint((COLOR, 1), GRAY),
    }
    assert len(others) == 4


def test_a_registered_name_opens_a_data_set_with_its_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "gray", lambda argument: Items([GRAY] * int(argument or 1)))
    assert len(open_source("gray:5")) == 5
    assert open_source("gray").name == "gray"
    with pytest.raises(DataError, match="'gray:x' cannot be opened: ValueError: invalid literal"):
        open_source("gray:x")
    with pytest.raises(DataError, match=r"'grey' does not exist; .* or 'gray'"):
        open_source("grey")


def test_an_object_is_a_source_while_it_is_given() -> None:
    source = dataset_object(Items([COLOR] * 10))
    assert source.name == "dataset:Items"
    with pytest.raises(DataError, match="given as an object in Python; give it again to"):
        open_source("dataset:Items")
    with given(source):
        assert open_source("dataset:Items") is source
        assert given_source("dataset:Items") is source
    assert given_source("dataset:Items") is None
    phases = (PhaseSpec(0, (8, 8), 4),)
    assert DataSpec("dataset:Items", phases, given=source).open()[0] is source


def test_data_workers_read_a_data_set_whose_class_they_cannot_import() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__", "np": np, "COLOR": COLOR}
    code = """
class Local:
    targets = [0] * 8
    def __len__(self): return 8
    def __getitem__(self, index): return np.full((8, 8, 3), index, np.uint8), 0
"""
    exec(code, namespace)
    source = DatasetSource("mine", namespace["Local"]())
    phases = (PhaseSpec(0, (8, 8), 4),)

    def images(workers: int) -> np.ndarray:
        batches = TrainBatches(
            source, np.arange(8), phases, (0.2, 1.0), (1.0, 1.0), flip=False, seed=0, workers=workers
        )
        try:
            return batches.batch(0).images
        finally:
            batches.close()

    assert np.array_equal(images(0), images(1))


def test_a_tensor_data_set_of_images_and_labels_is_read() -> None:
    images = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    source = DatasetSource("mine", TensorDataset(images, torch.arange(6)))
    assert torch.equal(source.load(5), images[5])
    assert source.labels is not None
    assert source.labels.tolist() == list(range(6))
