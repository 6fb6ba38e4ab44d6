"""Worker processes that fill batches ahead of their consumer; every worker fills a slice of each batch.

Workers are new interpreters, not forks, so that a process with threads (a Ray actor, a notebook) can have them, and
they do not import the caller's main script. They import the plugins that it has imported. Batches travel through a
ring of slots in one anonymous memory file, messages through a pipe per worker; the end of a pipe ends its worker, so
workers end with their consumer. POSIX only.

`torch.utils.data.DataLoader` is slower: it puts every batch into a new shared-memory file, whose pages cost about a
seventh of the work of a batch, and the 64 MB of /dev/shm in a container hold three batches of 128 x 224 x 224. A killed
worker and slices per worker are no obstacle: the loader is made again at the same step, and slice w goes to worker w.
Images per CPU second (and per second) relative to this module; the median of five alternating turns, range of the CPU
ratio in brackets; clothing photographs, 128 crops of 224 x 224, two cores shared with other programs:

    workers   a worker fills whole batches      a worker fills a slice of each batch
    1         0.81 (0.79-0.83), 0.76            -
    2         0.90 (0.83-0.92), 0.94            0.80 (0.66-0.84), 0.89
    4         0.85 (0.83-0.91), 0.85            0.80 (0.70-0.83), 1.03

With 32 x 32 crops in batches of 512 the CPU ratio is 0.97 to 1.03. Made by
`python tests/unit/orchestrator/data/compare_dataloader.py SOURCE --size 224 --batch-size 128`."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import IO, Generic, Protocol, TypeVar

import numpy as np

from bim.orchestrator.data.errors import DataWorkerError
from bim.orchestrator.plugins import imported_plugins
from bim.orchestrator.signal_masks import blocked_in_children

PREFETCH_BATCHES = 3  # slots of the ring: one being copied out, two being filled
JOIN_TIMEOUT_S = 5.0  # for a worker to end after its pipe is closed
CHECK_EVERY_S = 0.2  # between two calls of what a waiting consumer checks

# A worker has the import path of its consumer, so that Ray's working_dir and editable installs hold
_BOOTSTRAP = (
    "import sys; sys.path[:] = {path!r}; "
    "from bim.orchestrator.plugins import import_plugins; import_plugins({plugins!r}); "
    "from bim.orchestrator.data.prefetch import run_worker; run_worker(*{arguments!r})"
)

BadItem = TypeVar("BadItem")
BadItem_co = TypeVar("BadItem_co", covariant=True)


class Reader(Protocol[BadItem_co]):
    """What the workers run. Pickles; gives the same bytes in every process and in any order of calls.

    A bad item is a tuple of plain values that say which one and why.
    """

    @property
    def batch_shape(self) -> tuple[int, ...]: ...

    def fill(self, out: np.ndarray, number: int, start: int) -> Sequence[BadItem_co]:
        """Write items start..start+len(out)-1 of batch `number` to `out` (n, ...) uint8.

        Returns the bad items met, in order of position.
        """
        ...


@dataclass(frozen=True)
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection


class Prefetcher(Generic[BadItem]):
    """Serves batches by number; the batches after the last requested one are filled ahead. For one consumer thread."""

    def __init__(self, reader: Reader[BadItem], workers: int) -> None:
        """Start `workers` processes (at least 1, at most one per item of a batch)."""
        batch_size = reader.batch_shape[0]
        count = min(workers, batch_size)
        bounds = [batch_size * w // count for w in range(count + 1)]
        shape = (PREFETCH_BATCHES, *reader.batch_shape)
        self._pending: deque[tuple[int, int]] = deque()  # (batch number, slot), in the order of the requests
        self._failure = ""
        self._workers: list[_Worker] = []
        # Ends the workers also when the consumer does not close, or when the interpreter ends
        self._finalizer = weakref.finalize(self, _end_workers, self._workers)
        with (
            _anonymous_file(size=math.prod(shape)) as slots,
            _anonymous_file(_pickled((reader, shape))) as state,  # unlike a pipe it never blocks
        ):
            self._slots = _map_slots(slots.fileno(), shape)
            for start, stop in itertools.pairwise(bounds):
                self._workers.append(_start_worker(slots.fileno(), state.fileno(), start, stop))

    def get(
        self, number: int, check: Callable[[], None] | None = None
    ) -> tuple[np.ndarray, tuple[BadItem, ...]]:
        """Batch `number`: items uint8 of the reader's batch_shape, owned by the caller, and its bad items.

        check: called now and then while the batch is waited for; what it raises ends the workers.

        Raises what the reader raised for it, DataWorkerError if a worker died.
        """
        if self._failure:  # every request names the cause
            raise DataWorkerError(self._failure)
        if not self._finalizer.alive:
            raise RuntimeError("the data workers are closed; make a new loader to go on")
        while self._pending and self._pending[0][0] != number:
            self._receive(check)  # a jump drops the prefetched batches
        if not self._pending:
            self._request(number, 0)
        while len(self._pending) < PREFETCH_BATCHES:
            last_number, last_slot = self._pending[-1]
            self._request(last_number + 1, (last_slot + 1) % PREFETCH_BATCHES)
        slot, bad, error = self._receive(check)
        if error is not None:
            raise error
        return self._slots[slot].copy(), bad

    def close(self) -> None:
        """End all workers and wait until they are gone; idempotent."""
        self._finalizer()

    def _request(self, number: int, slot: int) -> None:
        request = pickle.dumps((number, slot))
        for worker in self._workers:
            try:
                worker.pipe.send_bytes(request)
            except OSError:
                raise self._worker_died(worker) from None
        self._pending.append((number, slot))

    def _receive(self, check: Callable[[], None] | None) -> tuple[int, tuple[BadItem, ...], Exception | None]:
        """Wait until the oldest requested batch is filled; -> its slot, bad items, first error."""
        _, slot = self._pending.popleft()
        bad: list[BadItem] = []
        error: Exception | None = None
        try:
            for worker in self._workers:
                while check is not None and not _is_readable(worker.pipe):
                    check()
                try:
                    slice_bad, slice_error = pickle.loads(worker.pipe.recv_bytes())
                except (EOFError, OSError):
                    raise self._worker_died(worker) from None
                bad.extend(slice_bad)
                error = error or slice_error
        except BaseException:  # an interrupt between two answers loses which answer belongs to which request
            self.close()
            raise
        return slot, tuple(bad), error

    def _worker_died(self, worker: _Worker) -> DataWorkerError:
        """The error for a dead worker; ends the others."""
        try:
            status: int | None = worker.process.wait(JOIN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
        self.close()
        if status is not None and status < 0:
            cause = f"was killed by {signal.Signals(-status).name}"
            advice = "SIGKILL mostly means that memory ran out: lower data.workers or data.batch_size"
        else:
            cause = f"ended with exit status {status}"
            advice = "its standard error holds the cause"
        number = self._workers.index(worker) + 1
        self._failure = (
            f"data worker {number} of {len(self._workers)} (process {worker.process.pid}) {cause}; {advice}"
        )
        return DataWorkerError(self._failure)


def run_worker(pipe_fd: int, slots_fd: int, state_fd: int, start: int, stop: int) -> None:
    """The main function of a worker: load the reader, then fill items start..stop-1 of batches until the pipe closes."""
    with mmap.mmap(state_fd, 0, access=mmap.ACCESS_READ) as state:
        reader, shape = pickle.loads(state)
    slots = _map_slots(slots_fd, shape)
    pipe = Connection(pipe_fd)
    try:
        while True:
            number, slot = pickle.loads(pipe.recv_bytes())
            try:
                answer = pickle.dumps((reader.fill(slots[slot, start:stop], number, start), None))
            except Exception as error:  # the consumer raises it
                answer = pickle.dumps(([], _picklable(error)))
            pipe.send_bytes(answer)
    except (EOFError, ConnectionError):
        return  # the consumer has closed, or is gone


def _is_readable(pipe: Connection) -> bool:
    """Whether an answer, or the end of the pipe, is there within `CHECK_EVERY_S`."""
    try:
        return pipe.poll(CHECK_EVERY_S)
    except (EOFError, OSError):  # reading it tells
        return True


def _pickled(value: object) -> bytes:
    """`value` for a worker; classes and functions of a notebook or a main script travel by value, where cloudpickle is."""
    try:
        from cloudpickle import dumps
    except ImportError:  # an image with torch and timm alone
        return pickle.dumps(value)
    state: bytes = dumps(value)
    return state


def _picklable(error: Exception) -> Exception:
    """`error` with the worker's traceback as a note, as a RuntimeError if it does not survive pickling."""
    note = f"in a data worker:\n{''.join(traceback.format_exception(error))}"
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # the constructor of an exception may raise anything
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(note)
    return copy


def _start_worker(slots_fd: int, state_fd: int, start: int, stop: int) -> _Worker:
    consumer_end, worker_end = Pipe(duplex=True)
    with worker_end:
        arguments = (worker_end.fileno(), slots_fd, state_fd, start, stop)
        plugins = imported_plugins()
        with blocked_in_children():  # signals are the consumer's to answer
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _BOOTSTRAP.format(path=sys.path, plugins=plugins, arguments=arguments),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=arguments[:3],
                # One thread per worker, set before it imports torch; the accelerator belongs to the consumer
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
    return _Worker(process, consumer_end)


def _end_workers(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.kill()  # a worker owns nothing that needs an orderly end
    for worker in workers:
        worker.process.wait()


def _anonymous_file(content: bytes = b"", size: int = 0) -> IO[bytes]:
    """An open file without a name that holds `content`, or `size` zeros: in memory on Linux, on the disk elsewhere."""
    create = getattr(os, "memfd_create", None)
    file = os.fdopen(create("bim-data"), "w+b") if create else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(content)
    file.truncate(max(size, len(content)))
    file.flush()
    return file


def _map_slots(fd: int, shape: tuple[int, ...]) -> np.ndarray:
    """The shared memory as uint8 of `shape` (slot, item, ...)."""
    return np.frombuffer(mmap.mmap(fd, math.prod(shape)), dtype=np.uint8).reshape(shape)
