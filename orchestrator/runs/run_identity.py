"""`OUT/run.json`: which run an output directory holds. Its random id stands in every manifest too.

`settings.yaml` is a recipe, which other runs may start from; this record belongs to one directory.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bim.orchestrator.files import atomic_write
from bim.orchestrator.training.manifest import Manifest

RUN_FILE = "run.json"


class OutputError(ValueError):
    """The output directory cannot be used by this run."""


@dataclass(frozen=True)
class RunIdentity:
    """The identity of a run.

    Args:
        run_id: random, made with the output directory.
        created: local date and time of that.
        data: fingerprint of the images; empty if unknown.
        adopted: a version without ids began the run, so checkpoints without one are its own.
        has_checkpoint: at least one was committed, so one must be there when the run is resumed.
    """

    run_id: str
    created: str
    data: str = ""
    adopted: bool = False
    has_checkpoint: bool = False

    def objection(self, manifest: Manifest) -> str | None:
        """Why a checkpoint is not one of this run; None if it is."""
        if manifest.run_id == self.run_id or (self.adopted and not manifest.run_id):
            return None
        if not manifest.run_id:
            return f"it has no run id, so it is not of the run {self.run_id}"
        return f"it is of the run {manifest.run_id}, and {RUN_FILE} says {self.run_id}"


def new_identity(data: str = "", adopted: bool = False, has_checkpoint: bool = False) -> RunIdentity:
    """The record of a run that begins now, or gets its id now."""
    return RunIdentity(
        secrets.token_hex(8), time.strftime("%Y-%m-%d %H:%M:%S"), data, adopted, has_checkpoint
    )


def read_identity(out: Path) -> RunIdentity | None:
    """The record in an output directory; None if it has none.

    Raises:
        OutputError: it cannot be read; the message says why.
    """
    path = out / RUN_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror or error})") from error
    try:
        raw = json.loads(content)
        values = {field.name: raw[field.name] for field in fields(RunIdentity)}
    except (ValueError, TypeError, KeyError, RecursionError):
        values = {}
    kinds = {"adopted": bool, "has_checkpoint": bool}
    if not values or any(type(value) is not kinds.get(name, str) for name, value in values.items()):
        raise OutputError(
            f"{path} is damaged: it does not hold the record of a run; remove it, and the id of the run is taken from its "
            "checkpoints"
        )
    return RunIdentity(**values)


def write_identity(out: Path, record: RunIdentity) -> None:
    """Write the record. Raises StorageError."""
    atomic_write(out / RUN_FILE, json.dumps(asdict(record), indent=1) + "\n")
