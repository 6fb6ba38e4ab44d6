"""Checkpoints in the background, on a disk that the tests make slow or full."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from bim.orchestrator.training import checkpoint_writer
from bim.orchestrator.training.checkpoint_writer import CheckpointWriter
from bim.orchestrator.training.manifest import FileRecord


class Disk:
    """`save_block` that waits for `ready` and then raises `error` or notes what it was given."""

    def __init__(self) -> None:
        self.ready, self.error = threading.Event(), None
        self.written: list[tuple[str, float]] = []

    def save_block(self, folder: str, index: int, weights: dict, state: dict) -> list[FileRecord]:
        assert self.ready.wait(10)
        if self.error is not None:
            raise self.error
        self.written.append((folder, float(weights["w"])))
        return [FileRecord(f"{folder}-{index}", 1, 1)]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(checkpoint_writer, "save_block", disk.save_block)
    yield disk
    disk.ready.set()


def state(value: float) -> Callable[[], dict]:
    return lambda: {0: ({"w": torch.tensor(value)}, {})}


def test_a_save_returns_before_the_disk_and_is_reported_when_it_is_written(disk: Disk) -> None:
    writer = CheckpointWriter()
    writer.save("step-4", state(1.0))
    assert writer.finished() == ()
    disk.ready.set()
    writer.flush()
    (saved,) = writer.finished()
    assert (saved.checkpoint, [f.name for f in saved.files]) == ("step-4", ["step-4-0"])
    assert writer.finished() == ()


def test_the_next_save_waits_for_the_one_before_and_loses_none(disk: Disk) -> None:
    writer = CheckpointWriter()
    writer.save("step-4", state(1.0))
    threading.Timer(0.05, disk.ready.set).start()
    writer.save("step-8", state(2.0))
    assert disk.written[0] == ("step-4", 1.0)
    writer.flush()
    assert [saved.checkpoint for saved in writer.finished()] == ["step-4", "step-8"]


@pytest.mark.parametrize("ask", ["finished", "flush", "save"])
def test_an_error_of_the_disk_is_raised_by_whatever_comes_next(disk: Disk, ask: str) -> None:
    writer = CheckpointWriter()
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    disk.ready.set()
    writer.save("step-4", state(1.0))
    calls: dict[str, Callable[[], object]] = {
        "finished": writer.finished,
        "flush": writer.flush,
        "save": lambda: writer.save("step-8", state(2.0)),
    }
    wait_until_idle(writer)
    with pytest.raises(OSError, match="No space left"):
        calls[ask]()


def wait_until_idle(writer: CheckpointWriter) -> None:
    writer._executor.submit(lambda: None).result()


def test_what_is_discarded_is_not_reported_and_its_error_not_raised(disk: Disk) -> None:
    writer = CheckpointWriter()
    disk.error = OSError(errno.EIO, "Input/output error")
    disk.ready.set()
    writer.save("step-4", state(1.0))
    writer.discard()
    assert writer.finished() == ()
    disk.error = None
    writer.save("step-4", state(2.0))
    writer.flush()
    assert len(writer.finished()) == 1
