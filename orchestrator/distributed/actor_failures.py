"""What Ray says about a failed call of an actor, translated into a `StageFailure` with its cause in one sentence."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from bim.orchestrator.distributed.actors import ActorProcess
from bim.orchestrator.training.errors import StageFailure

LOST = (RayActorError, WorkerCrashedError, NodeDiedError, OwnerDiedError, OutOfMemoryError)
"""Errors of Ray after which the process of an actor is gone, or cannot be reached."""

LOG_TAIL_BYTES = 4000
"""How much of the end of a worker's log goes to the log of the run."""

CRASH_SIGNALS = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")
"""Signals whose report Python or Ray leaves in the worker's log."""


def stage_failure(
    component: str, context: str, error: RayError, step: int | None, process: ActorProcess | None
) -> StageFailure:
    """The failure of a component, from what `ray.get` raised for its call.

    Args:
        context: the activity: "at step 170".
        process: where the component lived; None if it never answered.
    """
    log = _log_tail(process)
    details = "\n".join(filter(None, [str(error).strip(), _place(process), log]))
    # The death of an actor upstream is both, in the call of the next one.
    process_lost = isinstance(error, LOST)
    if isinstance(error, RayTaskError) and not process_lost and isinstance(error.cause, Exception):
        if not isinstance(error.cause, RayError):
            return StageFailure(component, context, error.cause, False, step, details)
        process_lost = isinstance(error.cause, LOST)
    cause = RuntimeError(exit_reason(error, process, log))
    return StageFailure(component, context, cause, process_lost, step, details, raised_by_code=False)


def exit_reason(error: RayError, process: ActorProcess | None = None, log: str = "") -> str:
    """Why a process ended, in one sentence, with its node and the file with its last words.

    Args:
        log: the end of that file, as far as this machine can read it.
    """
    text = str(error).strip()
    node = re.search(r"\bip: ([^\s,]+)", text, re.IGNORECASE)
    address = process.address if process else node[1] if node else None
    node_text = f"(node {address})" if address else ""
    path = f"its log: {process.log}" if process and process.log else ""
    crash = next((name for name in CRASH_SIGNALS if re.search(rf"\b{name}\b|{_FATAL[name]}", log)), None)
    exit_code = re.search(r"exit code (-?\d+)", text)
    if isinstance(error, OutOfMemoryError) or "OutOfMemoryError" in text or "low on memory" in text:
        reason = "killed by Ray because the memory of the node was nearly full"
    elif isinstance(error, RayActorError) and error.preempted:
        reason = "the node was taken away by its provider (preemption)"
    elif re.search(r"node (was |is )?(dead|died|terminated)|node.{0,80} (has )?died|its node", text, re.I):
        reason = "the node is lost"
    elif isinstance(error, ActorUnavailableError):
        reason = "the process cannot be reached"
    elif "ray.kill" in text:
        reason = "killed by this run"
    elif crash is not None:
        reason = f"the process crashed with signal {signal.Signals[crash].value} ({crash})"
    elif "connection error code 2" in text:
        reason = "the process ended without a message, as after signal 9 (SIGKILL): possibly the system was out of memory"
    elif exit_code is not None and "unexpectedly" in text:
        reason = f"the process ended with exit status {exit_code[1]}"
    else:
        reason = text.splitlines()[-1].split(". ")[0].rstrip(".") if text else type(error).__name__
    return ", ".join(filter(None, [f"{reason} {node_text}".strip(), path]))


_FATAL = {
    "SIGSEGV": "Segmentation fault",
    "SIGBUS": "Bus error",
    "SIGABRT": "Fatal Python error: Aborted",
    "SIGILL": "Illegal instruction",
    "SIGFPE": "Floating point exception",
}


def _place(process: ActorProcess | None) -> str:
    return f"process {process.pid} on node {process.address}, log {process.log}" if process else ""


def _log_tail(process: ActorProcess | None) -> str:
    """The end of a worker's log if it lies on this machine or on shared storage; else an empty text."""
    if process is None or process.log is None:
        return ""
    try:
        with open(Path(process.log), "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(
        line for line in lines if not line.startswith((":job_id:", ":actor_name:", ":task_name:"))
    )
