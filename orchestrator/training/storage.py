"""Where checkpoints are: a folder that all nodes see, or a URL. Folders on a disk never import fsspec."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bim.orchestrator.files import storage_errors
from bim.orchestrator.training.errors import CheckpointDamagedError
from bim.orchestrator.training.manifest import Manifest

if TYPE_CHECKING:
    from bim.orchestrator.training.object_store import ObjectStore

Location = Path | str
"""A folder on a disk, or a URL. A URL is a `str`: a `Path` would lose one of its slashes."""

RETRY_AT_START_S = 5.0
"""How long a request is repeated before the first step."""


class Checkpoints(Protocol):
    """The checkpoints of one run, for the loop: `CheckpointStore` or `RemoteCheckpointStore`."""

    def make_root(self) -> None:
        """Make the folder of all checkpoints, once, when a run begins."""

    def directory(self, step: int) -> Location:
        """The folder of the checkpoint after `step` updates: that of the manifest that `latest` returned, else one to
        write into."""

    def commit(self, manifest: Manifest) -> Location:
        """Write the manifest, last of all, and remove checkpoints that are no longer kept. Returns the folder."""

    def latest(self, warn: bool = False) -> Manifest | None:
        """The newest valid checkpoint, or None. warn: log every newer one that is skipped, and why."""

    def reject(self, error: CheckpointDamagedError) -> None:
        """Skip a checkpoint from now on that turned out to be damaged while it was read."""

    def clear_uncommitted(self) -> None:
        """Remove folders without a manifest, which an interrupted run left. Only while no stage is running."""


def is_url(location: Location) -> bool:
    """Whether a location is a URL."""
    return isinstance(location, str) and "://" in location


def below(location: Location, name: str) -> Location:
    """The location `name` below another one."""
    return f"{location}/{name}" if is_url(location) else Path(location) / name


def check_storage(url: str) -> None:
    """Write and remove an object below a URL.

    Raises:
        StorageUnsupportedError: this installation cannot open it.
        StorageError: the storage refuses, or cannot be reached.
    """
    remove_probe(write_probe(url))


def write_probe(location: Location) -> Location:
    """Write an empty file of a random name. Returns its location, for `exists` on other nodes and `remove_probe`."""
    probe = below(location, f".shared-storage-probe-{secrets.token_hex(4)}.tmp")
    if is_url(probe):
        objects, name = _object(str(probe))
        objects.write(name, b"")
    else:
        with storage_errors(Path(probe)):
            Path(probe).write_bytes(b"")
    return probe


def exists(location: Location) -> bool:
    """Whether a file of another process is visible here."""
    if not is_url(location):
        return Path(location).exists()
    objects, name = _object(str(location))
    return objects.exists(name)


def remove_probe(probe: Location) -> None:
    """Remove what `write_probe` wrote. Raises StorageError."""
    if is_url(probe):
        objects, name = _object(str(probe))
        objects.remove([name])
    else:
        with storage_errors(Path(probe), "removed"):
            Path(probe).unlink()


def remove_below(url: str) -> None:
    """Remove every object below a URL."""
    objects, name = _object(url)
    names = [path for path in objects.sizes() if path.startswith(f"{name}/")]
    if names:
        objects.remove(names)


def _object(url: str) -> tuple[ObjectStore, str]:
    """The objects of a folder, and the name of one of them."""
    from bim.orchestrator.training.object_store import ObjectStore

    folder, _, name = url.rpartition("/")
    return ObjectStore(folder, RETRY_AT_START_S), name
