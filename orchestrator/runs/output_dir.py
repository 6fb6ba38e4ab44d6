"""The output directory: never overwritten silently, resumed only by the run that made it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bim.orchestrator.config.recipes import SAVED_SETTINGS, read_recipe
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import differing_keys, flat
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.manifest import MANIFEST


class OutputError(ValueError):
    """The output directory holds something else than this run needs."""


NEW_RUN_HINT = "start a new run with another --out"


def check_output(
    out: Path,
    settings: Settings,
    fingerprint: str,
    anew: str = NEW_RUN_HINT,
    apply_search: Callable[[Settings], Settings] = lambda saved: saved,
) -> None:
    """Refuse a directory that this run may not use. Writes nothing.

    anew: what to do for other settings than those of the run in it.
    apply_search: saved settings -> the same with what a finished search of that run found.

    Raises:
        OutputError: in use by another run; nothing there to resume; or resumed with settings or data that contradict it.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"out is {out}, which is a file; give --out a directory that is new or empty")
    nearest = next(folder for folder in (out, *out.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "may not be written to" if nearest.is_dir() else "is a file"
        raise OutputError(f"out cannot be {out}: {nearest} {what}; give --out a directory that can be made")
    used = out.exists() and any(out.iterdir())
    if not settings.resume:
        if used:
            raise OutputError(
                f"the output directory {out} is in use; continue its run with --resume, or choose another one with --out"
            )
        return
    if not (out / SAVED_SETTINGS).exists():
        flag = "--resume" if settings.resume else "--search.resume"
        raise OutputError(f"there is no run to resume in {out}; leave {flag} out to start one there")
    _check_same(out, settings, fingerprint, anew, apply_search)


def make_output(out: Path) -> list[Path]:
    """Make the output directory. Returns the folders that were not there before, the innermost first.

    Raises:
        OutputError: the system refuses it.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the output directory {out} cannot be made ({error.strerror}); choose another one with --out"
        ) from error
    return missing


@contextmanager
def new_output(out: Path) -> Iterator[None]:
    """Make the output directory for what is opened inside; if that is refused with nothing written, it goes again.

    Raises:
        OutputError: the system refuses it.
    """
    made = make_output(out)
    try:
        yield
    except Exception:
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        raise


def _check_same(
    out: Path,
    settings: Settings,
    fingerprint: str,
    anew: str,
    apply_search: Callable[[Settings], Settings],
) -> None:
    store = CheckpointStore(out)
    latest = store.latest()
    saved = read_recipe(str(out / SAVED_SETTINGS)) if latest is None else latest.settings
    try:
        # A search may have ended just before what it found was written down.
        before = apply_search(settings_from_mapping(saved))
    except SettingsError as error:
        raise OutputError(
            f"the run in {out} was made with settings that this version does not know: {error}"
        ) from error
    keys = differing_keys(settings, before)
    if settings.backbones is not None and before.backbones is not None:
        # Each backbone has a folder, and what it was trained with, of its own: some may be new, some left out.
        keys = [key for key in keys if key.partition(".")[0] not in ("backbone", "backbones")]
    if keys:
        old, new = flat(before), flat(settings)
        told = "; ".join(f"{key} is {new.get(key)}, was {old.get(key)}" for key in keys)
        raise OutputError(
            f"{out} cannot be resumed with other settings than it was trained with: {told}; "
            f"give the same ones, or {anew}"
        )
    if latest is not None and latest.facts.get("data", fingerprint) != fingerprint:
        raise OutputError(
            f"the images behind data.source have changed since the last checkpoint in {out} "
            f"({store.directory(latest.step).name}/{MANIFEST}); {anew}"
        )
