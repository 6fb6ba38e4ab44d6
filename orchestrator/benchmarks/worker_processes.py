"""Processes that compute the cases of a benchmark side by side and end with it, whatever ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType
from typing import ParamSpec, TypeVar

from bim.orchestrator.signal_masks import HANDLED_SIGNALS

END_TIMEOUT_S = 2.0
"""Seconds that a worker has to remove its temporary files."""

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """`count` worker processes. If the block is left by an exception they end at once, at work or not.

    They leave signals to this process, and end when it is gone.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)
    try:
        yield pool
    except BaseException:
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        wait([worker.sentinel for worker in workers], END_TIMEOUT_S)
        for worker in workers:
            worker.join(END_TIMEOUT_S)
            if worker.is_alive():
                worker.kill()
                worker.join()
        raise
    pool.shutdown()


def in_worker(
    function: Callable[Arguments, Result], *args: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """Call a function in a worker, which ends after a SIGTERM as soon as the function has removed its temporary files."""
    try:
        return function(*args, **named)
    except SystemExit:  # the pool would hand it to the consumer and go on with the next call
        os._exit(128 + signal.SIGTERM)


def _begin() -> None:
    for number in HANDLED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_TIMEOUT_S)
    os._exit(128 + signal.SIGTERM)  # the main thread is inside a library
