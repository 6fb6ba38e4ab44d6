"""What the training loop reports, and to whom: the callback protocol, its records and the request to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class EpochReport:
    """One epoch, for a person: mean loss per block, images/s, share of the time lost waiting for data, seconds to go.

    mask_wait: share lost waiting for plans of masks, at the stage that waited longest.
    """

    epoch: int
    epochs: int
    losses: dict[int, float]
    images_per_s: float
    data_wait: float
    eta_s: float
    mask_wait: float = 0.0


class Callback(Protocol):
    """Who hears of the training; nothing it does may raise."""

    def on_step(self, step: int, metrics: dict[str, float]) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def on_checkpoint(self, step: int) -> None:
        """The state after `step` updates lies on the disk, whole."""

    def on_rewind(self, step: int) -> None:
        """The training goes on after `step` updates; what was said of later ones is void."""

    def say(self, text: str) -> None: ...


@dataclass
class StopRequest:
    """Set from a signal handler; the loop ends with a checkpoint at the next step."""

    reason: str | None = None
