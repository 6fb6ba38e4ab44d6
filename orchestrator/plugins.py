"""Modules of the user, imported for what they register: targets, decoders, data sources, timm models. A leaf.

The setting `plugins` names them. Every process of a run imports them before it builds anything: the driver, stages and
loaders, the worker processes of the data, evaluations and the trials of a search. Importing a module runs its code.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from bim.orchestrator.text import first_line

_imported: dict[str, None] = {}


class PluginError(ValueError):
    """A module of `plugins` cannot be imported; one sentence: which, why, what to do."""


def import_plugins(names: Sequence[str]) -> None:
    """Import the modules of these names, each once; one that Python does not find otherwise from the working directory.

    Raises:
        PluginError: a module is not there, or its own code raises.
    """
    for name in names:
        if name not in _imported:
            _import(name)
            _imported[name] = None


def imported_plugins() -> tuple[str, ...]:
    """The plugins of this process, in the order in which they were imported: what a process that it starts needs too."""
    return tuple(_imported)


def _import(name: str) -> None:
    folder = os.getcwd()
    if not {folder, ""} & set(sys.path):
        sys.path.append(folder)  # last: it hides no installed module; data workers take the whole path over
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise PluginError(_sentence(name, folder, error)) from error


def _sentence(name: str, folder: str, error: BaseException) -> str:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{name}.".startswith(f"{missing}."):
        return (
            f"plugins: there is no module '{missing}' that can be imported on this machine; it must lie in the working "
            f"directory ({folder}) or on PYTHONPATH, on every machine of a cluster, or be installed"
        )
    frame = next(
        (f for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename[:1] != "<"), None
    )
    location = "" if frame is None else f" ({frame.filename}, line {frame.lineno})"
    if isinstance(error, SyntaxError):
        location = ""  # its own text has the location
    return f"plugins: '{name}' cannot be imported: {type(error).__name__}: {first_line(error)}{location}"
