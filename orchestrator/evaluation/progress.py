"""The progress of an evaluation, reported to a listener while it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str], None]
"""Takes a few words; may raise to end the evaluation."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_part: ContextVar[str] = ContextVar("part", default="")


def report(text: str) -> None:
    """Say what is being computed: `12800 of 50000 images`."""
    listener = _listener.get()
    if listener is not None:
        listener(": ".join(filter(None, (_part.get(), text))))


@contextmanager
def reported_to(listener: Listener) -> Iterator[None]:
    """Inside, what is reported goes to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Inside, what is reported is of this part of the evaluation."""
    outer = _part.get()
    token = _part.set(f"{outer}, {name}" if outer else name)
    try:
        yield
    finally:
        _part.reset(token)
