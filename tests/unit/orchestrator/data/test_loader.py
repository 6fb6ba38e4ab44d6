from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bim.orchestrator.data.crops import center_crop_resize
from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import DataError, TooManyCorruptImagesError
from bim.orchestrator.data.folder import FolderSource
from bim.orchestrator.data.loader import Batch, TrainBatches, check_readable, eval_images
from bim.orchestrator.data.parquet import ParquetSource
from bim.orchestrator.data.phases import PhaseSpec
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import make_splits

Make = Callable[..., Path]


def train_batches(
    source: Source,
    size: tuple[int, int] = (6, 10),
    batch_size: int = 4,
    grad_accum_steps: int = 1,
    later: tuple[PhaseSpec, ...] = (),
    **changes: Any,
) -> TrainBatches:
    settings: dict[str, Any] = {
        "indices": np.arange(len(source)),
        "phases": (PhaseSpec(0, size, batch_size, grad_accum_steps), *later),
        "crop_scale": (0.2, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "flip": True,
        "seed": 0,
        "workers": 0,
    }
    return TrainBatches(source, **settings | changes)


def same(first: Batch, second: Batch) -> bool:
    return np.array_equal(first.images, second.images) and first.bad == second.bad


def test_batches_have_the_asked_shape_and_belong_to_the_caller():
    batches = train_batches(DigitsSource())
    first = batches.batch(0)
    assert first.images.shape == (4, 3, 6, 10)
    assert first.images.dtype == np.uint8
    assert first.load_s > 0
    before = first.images.copy()
    first.images[:] = 0
    assert np.array_equal(batches.batch(0).images, before)


def test_an_epoch_visits_every_image_at_most_once(image_folder: Make):
    names = [f"{n:02d}.png" for n in range(11)]
    source = FolderSource(image_folder(*names))
    loaded: list[int] = []

    class RecordingSource(FolderSource):
        def load(self, index: int):  # type: ignore[no-untyped-def]
            loaded.append(index)
            return super().load(index)

    batches = train_batches(RecordingSource(source.root), batch_size=2, grad_accum_steps=2)
    assert batches.steps_per_epoch == 2  # 11 images, 4 per step
    for epoch in range(3):
        loaded.clear()
        for step in (0, 1):
            for micro_step in (0, 1):
                batches.batch(2 * epoch + step, micro_step)
        assert len(set(loaded)) == len(loaded) == 8


def test_content_is_a_function_of_seed_step_and_micro_step():
    batches, again = (train_batches(DigitsSource(), grad_accum_steps=2) for _ in range(2))
    other = train_batches(DigitsSource(), grad_accum_steps=2, seed=1)
    in_order = {(s, m): batches.batch(s, m) for s in range(3) for m in (0, 1)}
    far = batches.batch(1000, 1)  # epochs later
    for key in reversed(list(in_order)):
        assert same(again.batch(*key), in_order[key])
        assert not same(other.batch(*key), in_order[key])
    assert same(again.batch(1000, 1), far)


def whole(source: Source, **settings: Any) -> TrainBatches:
    """Batches of images as they are: the shape of the pictures, no crop, no flip."""
    return train_batches(
        source, size=(9, 12), crop_scale=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3), flip=False, **settings
    )


def test_order_and_crops_change_from_epoch_to_epoch(image_folder: Make):
    source = FolderSource(image_folder(*(f"{n}.png" for n in range(6))))
    epochs = [whole(source, batch_size=6).batch(step).images for step in range(4)]
    assert len({epoch.tobytes() for epoch in epochs}) > 1
    assert len({b"".join(sorted(image.tobytes() for image in epoch)) for epoch in epochs}) == 1
    one = train_batches(source, indices=np.array([3]), batch_size=1)
    assert len({one.batch(step).images.tobytes() for step in range(4)}) > 1


def test_one_bad_image_is_replaced_by_many_others_in_turn(image_folder: Make):
    source = FolderSource(image_folder(*(f"{n}.png" for n in range(6)), damaged=("0.png",)))
    batches = whole(source, batch_size=6)
    doubled = set()
    for step in range(12):
        images = [image.tobytes() for image in batches.batch(step).images]
        assert len(set(images)) == 5
        doubled |= {image for image in images if images.count(image) == 2}
    assert len(doubled) > 2


def test_the_split_may_be_listed_in_any_order():
    first = train_batches(DigitsSource(), indices=np.arange(50))
    second = train_batches(DigitsSource(), indices=np.arange(50)[::-1])
    assert same(first.batch(3), second.batch(3))


def test_only_the_given_images_are_used(image_folder: Make):
    folder = image_folder("a.png", "b.png", "c.png", "d.png", damaged=("b.png", "d.png"))
    batches = train_batches(FolderSource(folder), indices=np.array([0, 2]), batch_size=2)
    assert all(batches.batch(step).bad == () for step in range(10))


def test_a_bad_image_is_replaced_and_reported_each_time(image_folder: Make):
    folder = image_folder("a.png", "b.png", "c.png", damaged=("b.png",))
    batches = train_batches(
        FolderSource(folder), batch_size=3, crop_scale=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3)
    )
    for step in range(5):
        batch = batches.batch(step)
        assert {name for name, _ in batch.bad} == {"b.png"}
        assert all(image.any() for image in batch.images)
        assert same(batch, batches.batch(step))


def test_data_without_a_readable_image_ends_with_its_name(image_folder: Make):
    folder = image_folder("a.png", "b.png", damaged=("a.png", "b.png"))
    with pytest.raises(
        TooManyCorruptImagesError,
        match=r"32 images of .* in a row could not be read, the last being [ab]\.png",
    ):
        train_batches(FolderSource(folder), batch_size=2).batch(0)


def test_fewer_images_than_a_batch_are_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"has 7 images .* data\.batch_size=8; with data\.batch_size 1 an"):
        train_batches(DigitsSource(), indices=np.arange(7), batch_size=8)
    with pytest.raises(DataError, match=r"7 images .* data\.batch_size=4 x data\.accumulate=2; with data"):
        train_batches(DigitsSource(), indices=np.arange(7), batch_size=4, grad_accum_steps=2)


@pytest.mark.parametrize(
    ("argument", "setting"),
    [("batch_size", "batch_size"), ("grad_accum_steps", "accumulate"), ("workers", "workers")],
)
def test_counts_below_their_minimum_are_refused(argument: str, setting: str):
    with pytest.raises(ValueError, match=rf"data\.{setting} is -1"):
        train_batches(DigitsSource(), **{argument: -1})


def test_a_batch_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="step 0, micro_step 1"):
        train_batches(DigitsSource()).batch(0, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_also_after_a_jump(workers: int, image_folder: Make):
    names = [f"{n:02d}.png" for n in range(10)]
    source = FolderSource(image_folder(*names, damaged=("03.png", "07.png")))
    serial = train_batches(source, grad_accum_steps=2)
    parallel = train_batches(source, grad_accum_steps=2, workers=workers)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (7, 1), (8, 0), (1, 0), (1, 1), (1, 1)]
    try:
        pairs = [(parallel.batch(*key), serial.batch(*key)) for key in keys]
    finally:
        parallel.close()
    assert all(same(first, second) for first, second in pairs)
    assert any(batch.bad for batch, _ in pairs)


def test_workers_read_parquet_in_the_same_order(shard: Make):
    file = shard("a.parquet", range(24), group=2)
    source = ParquetSource(file, [file], cache_bytes=2000)
    assert source.chunks.window < 6
    serial, parallel = train_batches(source), train_batches(source, workers=2)
    try:
        assert all(same(serial.batch(step), parallel.batch(step)) for step in range(12))
    finally:
        parallel.close()


def test_evaluation_gives_whole_images_in_order_and_leaves_bad_ones_out(image_folder: Make):
    names = [f"{n}.png" for n in range(6)]
    source = FolderSource(image_folder(*names, damaged=("2.png",)))
    batches = list(eval_images(source, np.array([0, 1, 2, 4, 5]), (8, 8), batch_size=3))
    assert [numbers.tolist() for numbers, _ in batches] == [[0, 1, 4], [5]]
    assert batches[0][1].shape == (3, 3, 8, 8)
    assert batches[0][1].dtype == np.uint8
    assert np.array_equal(batches[0][1][2], center_crop_resize(source.load(4), (8, 8)).numpy())


def test_evaluation_of_nothing_yields_nothing():
    assert list(eval_images(DigitsSource(), np.array([], dtype=np.int64), (8, 8), 4)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_later_phase_changes_size_and_batch_from_its_epoch_on(workers: int):
    source = DigitsSource()
    later = (PhaseSpec(2, (8, 8), 2, grad_accum_steps=2),)
    batches = train_batches(source, indices=np.arange(12), later=later, workers=workers)
    steady = train_batches(
        source, indices=np.arange(12), size=(8, 8), batch_size=2, grad_accum_steps=2, workers=0
    )
    try:
        assert batches.batch(5).images.shape == (4, 3, 6, 10)
        # Steps 0..5 are two epochs of three steps; so are they of the steady run.
        for key in ((6, 0), (6, 1), (8, 0)):
            assert same(batches.batch(*key), steady.batch(*key))
        assert batches.batch(0).images.shape == (4, 3, 6, 10)  # and back again
    finally:
        batches.close()


@pytest.mark.parametrize("broken", ["train", "val", "test"])
def test_a_split_of_which_nothing_can_be_read_is_refused(image_folder: Make, broken: str):
    names = [f"{split}/{number}.png" for split in ("train", "val", "test") for number in range(3)]
    damaged = tuple(name for name in names if name.startswith(broken))
    source = FolderSource(image_folder(*names, damaged=damaged))
    splits = make_splits(source, 0, 0.1, 0.2)
    with pytest.raises(
        DataError, match=rf"none of 3 images of the {broken} split of .* can be read; the first: "
    ):
        check_readable(source, splits)
    one_left = FolderSource(image_folder(*names, damaged=damaged[:2], root="one"))
    check_readable(one_left, splits)
