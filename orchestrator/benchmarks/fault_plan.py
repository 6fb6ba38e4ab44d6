"""Which processes of the tiny job are killed, and when: a function of a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from bim.orchestrator.benchmarks.fault_job import CHECKPOINT_STEPS, STEPS

KINDS = ("stage", "loader", "data-worker", "driver", "raylet", "mlflow-server")
"""What is killed."""

LIVE_WHILE_MEASURING = ("driver", "mlflow-server")
"""Kinds whose processes are there after the training too."""

KILLS_PER_RUN = 8

START_FRACTION, MEASURING_FRACTION = 0.1, 0.1
"""Of the kills outside commits: moments before the first step, and after the last one."""

START_S, MEASURING_S = 6.0, 3.0
"""The longest delays of such kills."""

COMMIT_S = 0.03
"""The longest delay of a kill in a commit."""


@dataclass(frozen=True)
class Kill:
    """What is killed, where and when.

    Args:
        kind: one of `KINDS`.
        moment: "start": after a process of the kind is first seen. "step": when a step of the training is done. "commit":
            when the folder of a checkpoint has no manifest yet. "measuring": after the training.
        step: the least one at which the kill comes, or of whose checkpoint.
        delay_s: from the moment that this is seen.
        choice: which of several victims, in [0, 1).
        on_cluster: whether the job joins a cluster of several nodes instead of starting Ray.
    """

    kind: str
    moment: Literal["start", "step", "commit", "measuring"]
    step: int = 0
    delay_s: float = 0.0
    choice: float = 0.0
    on_cluster: bool = False


def plan(kills: int, seed: int, kinds: Sequence[str]) -> list[tuple[Kill, ...]]:
    """The kills of every run, in their order: as many of each kind, half of those in a commit and half on a cluster.

    A raylet is one of a cluster in any case.
    """
    chance = random.Random(f"faults {seed}")
    drawn = []
    for number, kind in zip(range(kills), cycle(kinds), strict=False):
        turn, index = divmod(number, len(kinds))
        on_cluster = kind == "raylet" or (turn + turn // 2) % 2 == 1
        drawn.append((kind, (turn + index) % 2 == 1, on_cluster))
    chance.shuffle(drawn)
    runs = []
    for place in (False, True):
        here = [(kind, in_commit) for kind, in_commit, on_cluster in drawn if on_cluster == place]
        count = -(-len(here) // KILLS_PER_RUN)
        runs += [_run(here[number::count], place, chance) for number in range(count)]
    chance.shuffle(runs)
    return runs


def _run(kills: Sequence[tuple[str, bool]], on_cluster: bool, chance: random.Random) -> tuple[Kill, ...]:
    """The kills of one run, (kind, whether in a commit), each in its part of the run."""
    return tuple(
        _kill(kind, in_commit, on_cluster, (index, len(kills)), chance)
        for index, (kind, in_commit) in enumerate(kills)
    )


def _kill(
    kind: str, in_commit: bool, on_cluster: bool, window: tuple[int, int], chance: random.Random
) -> Kill:
    """A kill at a random moment of window (index, number of windows) of a run."""
    index, windows = window
    position, choice = (index + chance.random()) / windows, chance.random()
    step = int(position * (STEPS - 2 * CHECKPOINT_STEPS))
    if in_commit:
        delay_s = chance.choice([0.0, chance.uniform(0.0, COMMIT_S)])
        return Kill(kind, "commit", step, delay_s, choice, on_cluster)
    # One a run: without a checkpoint in between, each counts against `failures.max_restarts`.
    if kind != "mlflow-server" and index == 0 and position < START_FRACTION:
        return Kill(kind, "start", 0, chance.uniform(0.0, START_S), choice, on_cluster)
    if kind in LIVE_WHILE_MEASURING and position > 1 - MEASURING_FRACTION:
        return Kill(kind, "measuring", STEPS, chance.uniform(0.0, MEASURING_S), choice, on_cluster)
    return Kill(kind, "step", step, 0.0, choice, on_cluster)
