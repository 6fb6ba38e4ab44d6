"""The output directory: never overwritten silently, resumed only by the run that made it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bim.orchestrator.config.recipes import SAVED_SETTINGS, read_recipe
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import differing_keys, flat
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.runs.checkpoints import checkpoint_store


class OutputError(ValueError):
    """The output directory cannot be used by this run."""


NEW_RUN_HINT = "start a new run with another --out"


def check_output(
    out: Path,
    settings: Settings,
    fingerprint: str,
    remedy: str = NEW_RUN_HINT,
    apply_search: Callable[[Settings], Settings] = lambda saved: saved,
) -> None:
    """Refuse a directory that this run may not use. Writes nothing.

    Args:
        remedy: what the user does to train with other settings than those of the run in it.
        apply_search: saved settings -> the same with the best values of a finished search of that run.

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
    _check_same(out, settings, fingerprint, remedy, apply_search)


@contextmanager
def new_output(out: Path) -> Iterator[None]:
    """Create the output directory for what is opened inside; if that raises, a directory that is new goes again.

    Raises:
        OutputError: the system refuses it.
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the output directory {out} cannot be made ({error.strerror}); choose another one with --out"
        ) from error
    try:
        yield
    except Exception:
        if out in new:
            shutil.rmtree(out, ignore_errors=True)
        with suppress(OSError):  # another run may have written beside it
            for folder in new[1:]:
                folder.rmdir()
        raise


def _check_same(
    out: Path,
    settings: Settings,
    fingerprint: str,
    remedy: str,
    apply_search: Callable[[Settings], Settings],
) -> None:
    store = checkpoint_store(out)
    latest = store.latest()
    saved = read_recipe(str(out / SAVED_SETTINGS)) if latest is None else latest.settings
    try:
        # A search may have ended just before its best values were saved.
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
        changes = "; ".join(f"{key} is {new.get(key)}, was {old.get(key)}" for key in keys)
        raise OutputError(
            f"{out} cannot be resumed with other settings than it was trained with: {changes}; "
            f"give the same ones, or {remedy}"
        )
    if latest is not None and latest.facts.get("data", fingerprint) != fingerprint:
        raise OutputError(
            f"the images behind data.source have changed since the last checkpoint in {out} "
            f"(step {latest.step}); {remedy}"
        )
