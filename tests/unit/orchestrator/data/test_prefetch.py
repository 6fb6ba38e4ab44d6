"""The life and death of data workers; what they compute is in test_batches."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from bim.orchestrator.data.crops import RandomCrop
from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.data.folder import FolderSource
from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.prefetch import Prefetcher
from bim.orchestrator.data.source import Source

CROP = RandomCrop((8, 8), (0.2, 1.0), (1.0, 1.0), flip=False)


def train_batches(source: Source, workers: int, batch_size: int = 4) -> TrainBatches:
    indices = np.arange(len(source))
    return TrainBatches(source, indices, batch_size, 1, (8, 8), (0.2, 1.0), (1.0, 1.0), False, 0, workers)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_end(pids: tuple[int, ...], within_s: float = 20.0) -> bool:
    until = time.monotonic() + within_s
    while not all(is_gone(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return all(is_gone(pid) for pid in pids)


def test_close_leaves_no_process_and_no_open_file_behind():
    before, files = set(psutil.Process().children(recursive=True)), psutil.Process().num_fds()
    batches = train_batches(DigitsSource(), workers=2)
    batches.batch(0)
    batches.close()
    batches.close()
    assert set(psutil.Process().children(recursive=True)) == before
    with pytest.raises(RuntimeError, match="closed"):
        batches.batch(1)
    del batches
    gc.collect()
    assert psutil.Process().num_fds() <= files


def test_a_forgotten_loader_ends_its_workers():
    batches = train_batches(DigitsSource(), workers=1)
    pids = batches.worker_pids
    del batches
    gc.collect()
    assert all_end(pids)


def test_there_are_no_more_workers_than_images_in_a_batch():
    batches = train_batches(DigitsSource(), workers=3, batch_size=1)
    assert len(batches.worker_pids) == 1
    batches.close()


def test_a_worker_that_dies_is_named_and_the_others_end():
    batches = train_batches(DigitsSource(), workers=2)
    batches.batch(0)
    os.kill(batches.worker_pids[1], signal.SIGKILL)
    wanted = rf"data worker 2 of 2 \(process {batches.worker_pids[1]}\) was killed by SIGKILL; .* memory"
    with pytest.raises(RuntimeError, match=wanted):
        list(map(batches.batch, range(1, 10)))  # what was read ahead may still come
    with pytest.raises(RuntimeError, match=wanted):
        batches.batch(10)
    assert all_end(batches.worker_pids)


def test_an_error_inside_a_worker_is_raised_as_itself_with_its_traceback(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"junk")
    (tmp_path / "b.png").write_bytes(b"junk")
    batches = train_batches(FolderSource(tmp_path), workers=1, batch_size=2)
    with pytest.raises(TooManyCorruptImagesError, match="in a row could not be read") as caught:
        batches.batch(0)
    assert "in a data worker" in caught.value.__notes__[0]
    batches.close()


def test_workers_end_when_their_consumer_is_killed():
    script = (
        "import sys, time\n"
        "from bim.orchestrator.data.loader import TrainBatches\n"
        "from bim.orchestrator.data.digits import DigitsSource\n"
        "import numpy as np\n"
        "b = TrainBatches(DigitsSource(), np.arange(99), 4, 1, (8, 8), (0.2, 1), (1, 1), False, 0, workers=1)\n"
        "b.batch(0)\n"
        "print(*b.worker_pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    consumer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert consumer.stdout is not None
    pids = tuple(int(word) for word in consumer.stdout.readline().split())
    consumer.kill()
    consumer.wait()
    consumer.stdout.close()
    assert len(pids) == 1
    assert all_end(pids)


class Broken:
    """A reader whose own code is at fault, in a way that no process can send on."""

    batch_shape = (2, 3)

    def fill(self, out: np.ndarray, number: int, start: int) -> list[tuple[str, str]]:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return eval, ("__import__('nowhere')",)


def test_a_worker_that_cannot_start_is_reported_and_no_hang():
    prefetcher = Prefetcher(Broken(), workers=1)
    with pytest.raises(
        RuntimeError, match=r"data worker 1 of 1 .* ended with exit status 1; .*standard error"
    ):
        prefetcher.get(0)
