"""Typed errors of training. The Ray stages translate Ray's errors into these."""

from __future__ import annotations

from bim.orchestrator.text import first_line


class TrainingError(RuntimeError):
    """Training ended and a restart would not help; the message is meant for the user."""


class NonFiniteLossError(TrainingError):
    """A loss or a gradient norm became NaN or infinite."""

    def __init__(self, quantity: str, block: int, step: int, lr: float) -> None:
        # Unpickling in another process calls the constructor with `args`.
        super().__init__(quantity, block, step, lr)
        self.quantity, self.block, self.step, self.lr = quantity, block, step, lr

    def __str__(self) -> str:
        return (
            f"the {self.quantity} of block {self.block} is not finite at step {self.step} (learning rate {self.lr:.3g}); "
            "try a lower optim.blr, a longer schedule.warmup_epochs, or optim.clip_grad"
        )


class DeviceMemoryError(TrainingError):
    """The memory of a stage's device is full. One rewind in a new process is tried: another program may have held it."""


class ClusterLostError(TrainingError):
    """The head of the Ray cluster, or Ray on the machine of the driver, is gone."""


class StorageUnsupportedError(TrainingError):
    """This installation cannot open the URL of a storage; the message says what to install."""


class CheckpointDamagedError(RuntimeError):
    """A committed checkpoint turned out, while it was read, not to be as it was written.

    Args:
        checkpoint: the name of its folder.
    """

    def __init__(self, checkpoint: str, reason: str) -> None:
        super().__init__(checkpoint, reason)
        self.checkpoint, self.reason = checkpoint, reason

    def __str__(self) -> str:
        return f"checkpoint {self.checkpoint}: {self.reason}"


class StepOrderError(RuntimeError):
    """A stage received a step that is not its next one; a training step is not idempotent."""


class Interrupted(Exception):
    """A wait was given up because a stop was requested."""


class StageFailure(RuntimeError):
    """A stage or the data loader lost its process, or its code raised. The group can be rewound to the last checkpoint.

    Args:
        component: its name in messages: "stage 2 (blocks 4-5)", "the data loader".
        context: the activity: "at step 170", "while starting".
        cause: the error of the user's code, or why the process ended.
        process_lost: whether the process is gone and has to be created again.
        step: the step that failed; None outside of a step.
        details: everything that is known, of several lines, for the log file: tracebacks, the end of the process's log.
        raised_by_code: whether the component's own code raised, so that the same may happen again at the same step.
    """

    def __init__(
        self,
        component: str,
        context: str,
        cause: BaseException,
        process_lost: bool,
        step: int | None = None,
        details: str = "",
        raised_by_code: bool | None = None,
    ) -> None:
        super().__init__(component, context, cause, process_lost)
        self.component, self.context, self.cause = component, context, cause
        self.process_lost, self.step, self.details = process_lost, step, details
        self.raised_by_code = not process_lost if raised_by_code is None else raised_by_code

    def __str__(self) -> str:
        # A cause that the stage group worded is whole; of a foreign error one line.
        detail = first_line(self.cause)
        if self.process_lost:
            return f"{self.component} died {self.context}" + f": {detail}" * bool(detail)
        if not self.raised_by_code or isinstance(self.cause, TrainingError):
            return f"{self.component} failed {self.context}: {detail}"
        return f"{self.component} failed {self.context} ({type(self.cause).__name__}: {detail[:160]})"
