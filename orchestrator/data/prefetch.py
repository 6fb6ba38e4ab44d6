"""Worker processes that fill batches ahead of their consumer, every worker a slice of each batch.
Knows nothing of images: what fills a slice is a picklable `Reader`. For `TrainBatches`.

Workers are fresh interpreters, not forks, so that a process with threads (a Ray actor, a notebook) can have them, and
they do not import the caller's main script. Pixels travel through one memory file shared by all, which no limit on
/dev/shm touches; messages travel through a pipe per worker, whose end is also the end of the worker: when the consumer
dies, however it dies, its workers do. POSIX only."""

from __future__ import annotations

import itertools
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
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import IO, Protocol

import numpy as np

_AHEAD = 3  # batches in memory: one being copied out, two being filled
_PATIENCE_S = 5.0  # for a worker to end after its pipe was closed

# The first thing a worker runs. Its import path is the consumer's, so that Ray's working_dir and editable installs hold.
_BOOT = "import sys; sys.path[:] = {path!r}; from bim.orchestrator.data.prefetch import serve; serve(*{arguments!r})"


class Reader(Protocol):
    """What the workers run. Pickles; gives the same bytes in every process and in any order of calls."""

    @property
    def batch_shape(self) -> tuple[int, ...]: ...

    def fill(self, out: np.ndarray, number: int, start: int) -> list[tuple[str, str]]:
        """Write items start..start+len(out)-1 of batch `number` to `out`; -> (name, reason) of bad items met."""
        ...


@dataclass(frozen=True)
class Filled:
    """One batch: items uint8 of the reader's batch_shape, owned by the caller; bad items in order of position."""

    items: np.ndarray
    bad: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection


class Prefetcher:
    """Serves batch after batch, in order and ahead of time; any other number is sought anew. One consumer thread."""

    def __init__(self, reader: Reader, workers: int) -> None:
        """Start `workers` processes (at least 1, at most one per item of a batch)."""
        size = reader.batch_shape[0]
        count = min(workers, size)
        self._shape = (_AHEAD, *reader.batch_shape)
        self._pending: deque[tuple[int, int]] = deque()  # (batch number, slot), in the order of asking
        self._failure = ""
        edges = [size * w // count for w in range(count + 1)]
        self._workers: list[_Worker] = []
        # ends the workers too when the consumer forgets to close, or the interpreter ends
        self._end = weakref.finalize(self, _end_workers, self._workers)
        with (
            _memory_file(size=int(np.prod(self._shape))) as memory,
            _memory_file(pickle.dumps((reader, self._shape))) as state,  # never waits, unlike a pipe
        ):
            self._memory = _map(memory.fileno(), self._shape)
            for start, stop in itertools.pairwise(edges):
                self._workers.append(_start_worker(memory.fileno(), state.fileno(), start, stop))

    def get(self, number: int) -> Filled:
        """Batch `number`. Raises what the reader raised for it, RuntimeError if a worker died."""
        if self._failure:  # a caller that has asked ahead reads the cause each time
            raise RuntimeError(self._failure)
        if not self._end.alive:
            raise RuntimeError("the data workers are closed; make a new loader to go on")
        while self._pending and self._pending[0][0] != number:
            self._collect()  # a jump: what was asked in vain is waited for, then dropped
        if not self._pending:
            self._ask(number, 0)
        while len(self._pending) < _AHEAD:
            last, slot = self._pending[-1]
            self._ask(last + 1, (slot + 1) % _AHEAD)
        slot, bad, error = self._collect()
        if error is not None:
            raise error
        return Filled(self._memory[slot].copy(), bad)

    def close(self) -> None:
        """End all workers and wait until they are gone. Harmless if done twice."""
        self._end()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process numbers of the workers."""
        return tuple(worker.process.pid for worker in self._workers)

    def _ask(self, number: int, slot: int) -> None:
        request = pickle.dumps((number, slot))
        for worker in self._workers:
            self._send(worker, request)
        self._pending.append((number, slot))

    def _collect(self) -> tuple[int, tuple[tuple[str, str], ...], Exception | None]:
        """Wait until the oldest batch asked for is filled; -> its slot, bad items, error."""
        _, slot = self._pending.popleft()
        bad: list[tuple[str, str]] = []
        error: Exception | None = None
        try:
            for worker in self._workers:
                try:
                    found, failure = pickle.loads(worker.pipe.recv_bytes())
                except (EOFError, OSError):
                    raise self._death(worker) from None
                bad.extend(found)
                error = error or failure
        except BaseException:  # an interrupt between two answers: which answer is whose would be lost
            self.close()
            raise
        return slot, tuple(bad), error

    def _send(self, worker: _Worker, message: bytes) -> None:
        try:
            worker.pipe.send_bytes(message)
        except OSError:
            raise self._death(worker) from None

    def _death(self, worker: _Worker) -> RuntimeError:
        """The error for a dead worker; ends the others."""
        try:
            code: int | None = worker.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = None
        place = f"data worker {self._workers.index(worker) + 1} of {len(self._workers)} (process {worker.process.pid})"
        self.close()
        if code is not None and code < 0:
            cause = f"was killed by {signal.Signals(-code).name}"
            advice = "SIGKILL mostly means that memory ran out: lower data.workers or data.batch_size"
        else:
            cause = f"ended with exit status {code}"
            advice = "what it wrote to standard error says why"
        self._failure = f"{place} {cause}; {advice}"
        return RuntimeError(self._failure)


def serve(pipe_fd: int, memory_fd: int, state_fd: int, start: int, stop: int) -> None:
    """A worker's whole life: take the reader, then fill items start..stop-1 of batches until the pipe closes."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the consumer's to answer
    torch.set_num_threads(1)
    with mmap.mmap(state_fd, 0, access=mmap.ACCESS_READ) as state:
        reader, shape = pickle.loads(state)
    memory = _map(memory_fd, shape)
    pipe = Connection(pipe_fd)
    try:
        while True:
            number, slot = pickle.loads(pipe.recv_bytes())
            try:
                answer = pickle.dumps((reader.fill(memory[slot, start:stop], number, start), None))
            except Exception as error:
                answer = pickle.dumps(([], _portable(error)))
            pipe.send_bytes(answer)
    except (EOFError, ConnectionError):
        return  # the consumer has closed, or is gone


def _portable(error: Exception) -> Exception:
    """`error` with the worker's traceback as a note, as itself if it survives pickling, else as a RuntimeError."""
    note = f"in a data worker:\n{''.join(traceback.format_exception(error))}"
    try:
        same = pickle.loads(pickle.dumps(error))
    except Exception:  # an exception's constructor may do anything
        same = RuntimeError(f"{type(error).__name__}: {error}")
    same.add_note(note)
    return same


def _start_worker(memory_fd: int, state_fd: int, start: int, stop: int) -> _Worker:
    ours, theirs = Pipe(duplex=True)
    arguments = (theirs.fileno(), memory_fd, state_fd, start, stop)
    boot = _BOOT.format(path=sys.path, arguments=arguments)
    # one thread per worker, set before its torch is imported; the accelerator belongs to the consumer
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", boot],
            stdin=subprocess.DEVNULL,
            pass_fds=arguments[:3],
            env=env,
        )
    return _Worker(process, ours)


def _end_workers(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.terminate()  # they own nothing that a sudden end could hurt
    for worker in workers:
        try:
            worker.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def _memory_file(content: bytes = b"", size: int = 0) -> IO[bytes]:
    """An open file without a name that holds `content`, or `size` zeros: in memory on Linux, on the disk elsewhere."""
    create = getattr(os, "memfd_create", None)
    file = os.fdopen(create("bim-data"), "w+b") if create else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(content)
    file.truncate(max(size, len(content)))
    file.flush()
    return file


def _map(fd: int, shape: tuple[int, ...]) -> np.ndarray:
    """The shared memory as uint8 of `shape`: (slot, item, ...)."""
    return np.frombuffer(mmap.mmap(fd, int(np.prod(shape))), dtype=np.uint8).reshape(shape)
