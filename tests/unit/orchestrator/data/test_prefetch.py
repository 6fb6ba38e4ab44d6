"""The lifetime of data workers; the content of the batches is tested in test_loader."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import DataWorkerError, TooManyCorruptImagesError
from bim.orchestrator.data.folder import FolderSource
from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.phases import PhaseSpec
from bim.orchestrator.data.prefetch import Prefetcher
from bim.orchestrator.data.source import Source
from tests.unit.orchestrator.data.counting_reader import CountingReader, PluginReader


def train_batches(source: Source, workers: int, batch_size: int = 4) -> TrainBatches:
    phases = (PhaseSpec(0, (8, 8), batch_size),)
    return TrainBatches(
        source, np.arange(len(source)), phases, (0.2, 1.0), (1.0, 1.0), flip=False, seed=0, workers=workers
    )


def children() -> list[psutil.Process]:
    """The child processes of this one, in the order of their start."""
    return sorted(psutil.Process().children(), key=lambda process: (process.create_time(), process.pid))


def all_end(processes: list[psutil.Process], timeout_s: float = 20.0) -> bool:
    return not psutil.wait_procs(processes, timeout=timeout_s)[1]


def test_close_leaves_no_process_and_no_open_file_behind():
    before, files = children(), psutil.Process().num_fds()
    batches = train_batches(DigitsSource(), workers=2)
    batches.batch(0)
    batches.close()
    batches.close()
    assert children() == before
    with pytest.raises(RuntimeError, match="closed"):
        batches.batch(1)
    del batches
    gc.collect()
    assert psutil.Process().num_fds() <= files


def test_a_forgotten_loader_ends_its_workers():
    before = children()
    batches = train_batches(DigitsSource(), workers=1)
    workers = [process for process in children() if process not in before]
    assert len(workers) == 1
    del batches
    gc.collect()
    assert all_end(workers)


def test_there_are_no_more_workers_than_images_in_a_batch():
    before = len(children())
    batches = train_batches(DigitsSource(), workers=3, batch_size=1)
    assert len(children()) - before == 1
    batches.close()


def test_a_worker_that_dies_is_named_and_the_others_end():
    batches = train_batches(DigitsSource(), workers=2)
    batches.batch(0)
    workers = children()[-2:]
    workers[1].kill()
    message = rf"data worker 2 of 2 \(process {workers[1].pid}\) was killed by SIGKILL; .* memory"
    with pytest.raises(RuntimeError, match=message):
        list(map(batches.batch, range(1, 10)))  # prefetched batches may still come
    with pytest.raises(RuntimeError, match=message):
        batches.batch(10)
    assert all_end(workers)


@given(
    workers=st.integers(1, 3),
    # A number asks for that many batches on (backward too), a text kills a worker
    actions=st.lists(
        st.sampled_from([1, 1, 1, 2, -1, "kill 0", "kill 1", "kill 2"]), min_size=4, max_size=12
    ),
)
@settings(max_examples=10, deadline=None)
def test_whichever_worker_dies_batches_are_correct_and_a_new_prefetcher_continues(
    workers: int, actions: list[int | str]
):
    before = children()
    prefetcher, number, killed = Prefetcher(CountingReader(5), workers), 5, set()
    for action in actions:
        if isinstance(action, str):
            worker = int(action[-1]) % workers
            children()[len(before) + worker].kill()  # a zombie stays a child until its end is noticed
            killed.add(worker + 1)
            continue
        number += action
        try:
            items, bad = prefetcher.get(number)
        except RuntimeError as error:
            cause = re.fullmatch(r"data worker (\d) of \d .* was killed by SIGKILL; .*", str(error))
            assert cause is not None
            assert int(cause[1]) in killed
            assert children() == before
            prefetcher, killed = Prefetcher(CountingReader(5), workers), set()
            items, bad = prefetcher.get(number)
        assert items.tolist() == [[number, item] for item in range(5)]
        assert bad == tuple((f"item {5 * w // workers}", f"batch {number}") for w in range(workers))
    prefetcher.close()
    assert children() == before


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
        "import psutil, time\n"
        "from bim.orchestrator.data.prefetch import Prefetcher\n"
        "from tests.unit.orchestrator.data.counting_reader import CountingReader\n"
        "prefetcher = Prefetcher(CountingReader(4), workers=1)\n"
        "prefetcher.get(0)\n"
        "print(*(worker.pid for worker in psutil.Process().children()), flush=True)\n"
        "time.sleep(60)\n"
    )
    consumer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert consumer.stdout is not None
    (worker,) = (psutil.Process(int(pid)) for pid in consumer.stdout.readline().split())
    consumer.kill()
    consumer.wait()
    consumer.stdout.close()
    assert all_end([worker])


class Unpicklable:
    """A reader whose worker cannot start."""

    batch_shape = (2, 3)

    def fill(self, out: np.ndarray, number: int, start: int) -> list[tuple[str, str]]:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return eval, ("__import__('nowhere')",)


def test_a_worker_that_cannot_start_is_reported_and_no_hang():
    prefetcher = Prefetcher(Unpicklable(), workers=1)
    with pytest.raises(RuntimeError, match=r"data worker 1 of 1 .* exit status 1; .*standard error"):
        prefetcher.get(0)


def test_workers_import_the_plugins_of_their_consumer_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bim.orchestrator.plugins._imported", {"colorsys": None, "this_is_imported": None})
    prefetcher = Prefetcher(PluginReader(), 1)
    try:
        with pytest.raises(DataWorkerError, match="ended with exit status 1"):
            prefetcher.get(0)
    finally:
        prefetcher.close()
    monkeypatch.setattr("bim.orchestrator.plugins._imported", {"colorsys": None})
    prefetcher = Prefetcher(PluginReader(), 1)
    try:
        assert prefetcher.get(0)[0].tolist() == [[1], [1]]
    finally:
        prefetcher.close()
