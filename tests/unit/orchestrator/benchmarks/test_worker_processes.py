"""Worker processes of a benchmark end with it, and take their temporary files with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, as_completed
from pathlib import Path

import psutil
import pytest

from bim.orchestrator.benchmarks.worker_processes import in_worker, worker_pool

TESTS = Path(__file__).resolve().parents[4]


def work(folder: str) -> None:
    """A case: it has a temporary folder and takes a minute."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{os.getpid()}-"):
        time.sleep(60)


def square(number: int) -> int:
    return number * number


def working(folder: Path) -> list[psutil.Process]:
    """The workers, once both are at work."""
    end = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    return [psutil.Process(int(path.name.partition("-")[0])) for path in folder.iterdir()]


def gone(processes: list[psutil.Process]) -> bool:
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def test_workers_compute() -> None:
    with worker_pool(1) as pool:
        futures: list[Future[int]] = [pool.submit(in_worker, square, number) for number in (2, 3)]
        assert sorted(future.result() for future in as_completed(futures)) == [4, 9]


def test_an_interrupt_ends_the_workers_and_their_files_at_once(tmp_path: Path) -> None:
    processes: list[psutil.Process] = []

    def interrupted() -> None:
        with worker_pool(2) as pool:
            for _ in range(6):
                pool.submit(in_worker, work, str(tmp_path))
            processes.extend(working(tmp_path))
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(processes)
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - start < 40


def test_a_signal_to_the_whole_group_is_the_consumers_to_answer_and_its_death_ends_the_workers(
    tmp_path: Path,
) -> None:
    script = (
        "import sys\nfrom bim.orchestrator.benchmarks.worker_processes import in_worker, worker_pool\n"
        "from tests.unit.orchestrator.benchmarks.test_worker_processes import work\n"
        "if __name__ == '__main__':\n"
        f"    with worker_pool(2) as pool:\n        [pool.submit(in_worker, work, {str(tmp_path)!r}) for _ in range(3)]\n"
    )
    file = tmp_path.parent / "consumer.py"
    file.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    with subprocess.Popen([sys.executable, str(file)], env=environment, start_new_session=True) as consumer:
        processes = working(tmp_path)
        for process in processes:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGHUP)
        assert not gone(processes)
        consumer.kill()
    end = time.monotonic() + 5
    while not gone(processes) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone(processes)
    assert not list(tmp_path.iterdir())
