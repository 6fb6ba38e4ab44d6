"""Fingerprints are asked for by every run that is resolved, and computed once for every source that is open."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

AnySource = TypeVar("AnySource")


def computed_once(compute: Callable[[AnySource], str]) -> Callable[[AnySource], str]:
    """A method `fingerprint` that computes its value at the first call.

    A pickled copy, which may see other files on another machine, computes its own.
    """
    values: WeakKeyDictionary[AnySource, str] = WeakKeyDictionary()

    @wraps(compute)
    def fingerprint(source: AnySource) -> str:
        value = values.get(source)
        if value is None:
            value = values[source] = compute(source)
        return value

    return fingerprint
