"""What the training loop reports: the callback protocol, its records, and the request to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

SAVE_TIMEOUT_S = 15.0
"""How long a stop waits for the steps in flight and their checkpoint."""


@dataclass(frozen=True)
class EpochReport:
    """Summary of one epoch.

    Args:
        epoch: counted from 1.
        epochs: of the whole run.
        losses: block -> mean loss.
        data_wait: fraction of the time in which all stages waited for data.
        eta_s: estimated seconds to the end of the run.
        mask_wait: fraction of the time in which the slowest stage waited for mask plans.
        slow_stage: a stage that is much slower than the others, and how many times: "stage 2 (block 2) 3.4 x".
    """

    epoch: int
    epochs: int
    losses: dict[int, float]
    images_per_s: float
    data_wait: float
    eta_s: float
    mask_wait: float = 0.0
    slow_stage: str | None = None


@dataclass(frozen=True)
class PretrainResult:
    """How the loop ended.

    `stopped`: the reason of a stop that was requested; None if all steps were trained, or the callback ended it early.
    """

    step: int
    restarts: int
    stopped: str | None
    bad_images: dict[str, str]
    images_per_s: float


class Callback(Protocol):
    """Receives the events of the training loop. Its methods must not raise."""

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics, averaged over the steps since the last call; `step` updates are done."""

    def on_epoch(self, report: EpochReport) -> None:
        """An epoch ended."""

    def on_checkpoint(self, step: int) -> bool | None:
        """The checkpoint after `step` updates is committed. Returns True where the training may end early."""

    def on_rewind(self, step: int) -> None:
        """Training continues after `step` updates; metrics of later steps are void."""


class NullCallback:
    """A callback that ignores every event; a base class for those that need only some of them."""

    started = True
    """Whether the stages were restored once, ready to train."""

    def on_step(self, step: int, metrics: dict[str, float]) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def on_checkpoint(self, step: int) -> bool | None: ...

    def on_rewind(self, step: int) -> None: ...


@dataclass
class StopRequest:
    """Set from a signal handler; the loop saves a checkpoint after the current step and ends.

    Args:
        reason: the name of the signal; None while the training goes on.
        saves_requested: how often a checkpoint was asked for without an end.
        can_save: whether there are steps that a checkpoint would keep; the loop sets it.
    """

    reason: str | None = None
    saves_requested: int = 0
    can_save: bool = False
