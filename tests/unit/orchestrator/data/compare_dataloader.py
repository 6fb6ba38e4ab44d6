"""Speed of `Prefetcher` and of `torch.utils.data.DataLoader` with the same reader, for the table in data/prefetch.py.

    python tests/unit/orchestrator/data/compare_dataloader.py SOURCE --size 224 --batch-size 128

A DataLoader worker fills a whole batch, or a slice of it that the consumer concatenates. All loaders stay open and take
turns. Prints the median (and range) over the turns of the speed relative to `Prefetcher` of the same turn.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from bim.orchestrator.data.crops import RandomResizedCrop
from bim.orchestrator.data.loader import TrainReader
from bim.orchestrator.data.phases import constant
from bim.orchestrator.data.prefetch import PREFETCH_BATCHES, Prefetcher
from bim.orchestrator.data.source import open_source


class Slices(Dataset[torch.Tensor]):
    """Map-style: the images start..stop-1 of a batch, by (batch number, start, stop)."""

    def __init__(self, reader: TrainReader) -> None:
        self.reader = reader

    def __getitem__(self, key: tuple[int, int, int]) -> torch.Tensor:
        number, start, stop = key
        images = torch.empty((stop - start, *self.reader.batch_shape[1:]), dtype=torch.uint8)
        self.reader.fill(images.numpy(), number, start)
        return images


class SliceSampler:
    """The slices of every batch from batch 0 on, `count` of each; a DataLoader gives slice w to worker w."""

    def __init__(self, batch_size: int, count: int) -> None:
        self.bounds = [batch_size * k // count for k in range(count + 1)]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for number in itertools.count():
            for start, stop in itertools.pairwise(self.bounds):
                yield number, start, stop


def own_batches(reader: TrainReader, workers: int) -> Iterator[np.ndarray]:
    prefetcher = Prefetcher(reader, workers)
    for number in itertools.count():
        yield prefetcher.get(number)[0]


def dataloader_batches(reader: TrainReader, workers: int, slices: int) -> Iterator[np.ndarray]:
    loader = DataLoader(
        Slices(reader),
        batch_size=None,
        sampler=SliceSampler(reader.batch_size, slices),
        num_workers=workers,
        multiprocessing_context="spawn",
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=2 if slices < workers else PREFETCH_BATCHES,
        worker_init_fn=set_one_thread,
    )
    images = iter(loader)
    while True:
        yield (next(images) if slices == 1 else torch.cat(list(itertools.islice(images, slices)))).numpy()


def set_one_thread(worker: int) -> None:
    torch.set_num_threads(1)


@dataclass
class Lane:
    """One open loader and its worker processes."""

    batches: Iterator[np.ndarray]
    processes: list[psutil.Process]

    @classmethod
    def open(cls, batches: Iterator[np.ndarray]) -> Lane:
        before = psutil.Process().children(recursive=True)
        next(batches)
        workers = [child for child in psutil.Process().children(recursive=True) if child not in before]
        return cls(batches, [psutil.Process(), *workers])

    def measure(self, warmup: int, count: int) -> tuple[float, float]:
        """(batches per second, batches per CPU second of consumer and workers)."""
        for _ in range(warmup):  # until what was prefetched between turns is used up
            next(self.batches)
        start, cpu_start = time.perf_counter(), self._cpu_s()
        for _ in range(count):
            next(self.batches)
        return count / (time.perf_counter() - start), count / (self._cpu_s() - cpu_start)

    def _cpu_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=16, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    source, size = open_source(args.source), (args.size, args.size)
    (phase,) = constant(len(source) // args.batch_size, args.batch_size, size=size)
    crop = RandomResizedCrop(size, (0.2, 1.0), (3 / 4, 4 / 3), flip=True)
    reader = TrainReader(source, np.arange(len(source)), phase, crop, seed=0)
    for workers in args.workers:
        lanes = {
            "Prefetcher": Lane.open(own_batches(reader, workers)),
            "DataLoader, batches": Lane.open(dataloader_batches(reader, workers, 1)),
        }
        if workers > 1:
            lanes["DataLoader, slices"] = Lane.open(dataloader_batches(reader, workers, workers))
        speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in lanes}
        for turn in range(args.turns):
            names = list(lanes)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                speeds[name].append(lanes[name].measure(2 * workers + PREFETCH_BATCHES, args.batches))
        for name, rows in speeds.items():
            wall, cpu = (
                [row[k] / own[k] for row, own in zip(rows, speeds["Prefetcher"], strict=True)] for k in (0, 1)
            )
            images = args.batch_size * statistics.median(row[1] for row in rows)
            texts = [f"{statistics.median(x):.2f} ({min(x):.2f}-{max(x):.2f})" for x in (wall, cpu)]
            print(
                f"{workers} workers, {name}: images/s x {texts[0]}, images per CPU second {images:.0f}, x {texts[1]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
