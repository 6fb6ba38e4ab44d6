"""The check of a checkpoint: once for files that stay as they are, and again where a read fails for a moment."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from bim.orchestrator.training import checkpoint_check
from bim.orchestrator.training.checkpoint import CheckpointStore, save_block
from bim.orchestrator.training.manifest import Manifest


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path)
    store.make_root()
    records = save_block(store.directory(5), 0, {"encoder.w": torch.zeros(3)}, {"step/w": torch.tensor(1.0)})
    store.commit(Manifest(5, 10, {}, {}, tuple(records)))
    return store


class Disk:
    """The reads of the check; the first `failing` of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = errno.EIO, failing: int = 0) -> None:
        self.code, self.failing = code, failing
        self.reads: list[str] = []
        self._crc32 = checkpoint_check._crc32
        monkeypatch.setattr(checkpoint_check, "_crc32", self.crc32)
        monkeypatch.setattr(checkpoint_check, "RETRY_PAUSES_S", (0.0, 0.0, 0.0))

    def crc32(self, path: Path) -> int:
        self.reads.append(path.name)
        if self.failing:
            self.failing -= 1
            raise OSError(self.code, "Input/output error", str(path))
        return self._crc32(path)


def test_a_file_is_read_once_while_it_stays_as_it_is(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    for _ in range(3):
        assert store.latest() is not None
    assert sorted(disk.reads) == ["block-0.optimizer.safetensors", "block-0.safetensors"]
    path = store.directory(5) / "block-0.safetensors"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert store.latest() is None
    assert store.problems() == {"step-00000005": "block-0.safetensors has a wrong checksum"}


def test_a_read_that_fails_for_a_moment_is_repeated(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, failing=3)
    assert store.latest() is not None


@pytest.mark.parametrize(("code", "reads"), [(errno.EIO, 4), (errno.EACCES, 1)])
def test_a_read_that_goes_on_failing_is_a_problem(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, code: int, reads: int
) -> None:
    disk = Disk(monkeypatch, code, failing=99)
    assert list(store.problems().values()) == ["block-0.safetensors cannot be read (Input/output error)"]
    assert len(disk.reads) == reads
