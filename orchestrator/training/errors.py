"""What can go wrong while training, as typed errors, and what is done about it, as small values.

Knows no Ray: the Ray stages translate their errors into these, so that the policy is tested without a cluster.
"""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training ended and a restart would not help; the message is meant for the person who started the run."""


class NonFiniteLossError(TrainingError):
    """A loss or a gradient norm became NaN or infinite."""

    def __init__(self, what: str, block: int, step: int, lr: float) -> None:
        # All four go to args: errors cross process borders by being built again from their args.
        super().__init__(what, block, step, lr)
        self.what, self.block, self.step, self.lr = what, block, step, lr

    def __str__(self) -> str:
        return (
            f"the {self.what} of block {self.block} is not finite at step {self.step} (learning rate {self.lr:.3g}); "
            "try a lower optim.blr, a longer schedule.warmup_epochs, or optim.clip_grad"
        )


class StepOrderError(RuntimeError):
    """A stage was handed a step that is not its own next one; a training step is not idempotent."""


class StageFailure(RuntimeError):
    """A stage (or the loader beside it) died, or its step raised. The group can be rewound to the last checkpoint.

    Args:
        place: which one, for the reader: "stage 2 (blocks 4-5)", "the data loader".
        when: at what, for the reader: "at step 170", "while starting".
        cause: the error of the user's code, or the word of what killed the process.
        died: True when the process is gone and must be created anew.
    """

    def __init__(self, place: str, when: str, cause: BaseException, died: bool) -> None:
        super().__init__(place, when, cause, died)
        self.place, self.when, self.cause, self.died = place, when, cause, died

    def __str__(self) -> str:
        if self.died:
            return f"{self.place} died {self.when}"
        lines = str(self.cause).strip().splitlines()
        detail = lines[0].strip() if lines else ""
        return f"{self.place} failed {self.when} ({type(self.cause).__name__}: {detail[:160]})"
