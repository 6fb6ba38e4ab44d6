"""The progress of an evaluation, reported to a listener while it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str], None]
"""Takes a few words; may raise to end the evaluation."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_part: ContextVar[str] = ContextVar("part", default="")
_reported: ContextVar[str] = ContextVar("reported", default="")


def report(text: str) -> None:
    """Say what is being computed: `12800 of 50000 images`."""
    listener = _listener.get()
    if listener is not None:
        words = ": ".join(filter(None, (_part.get(), text)))
        _reported.set(words)
        listener(words)


def report_again() -> None:
    """Say once more what was said last: in the middle of a long step, so that a listener can end it."""
    listener = _listener.get()
    if listener is not None:
        listener(_reported.get())


@contextmanager
def reported_to(listener: Listener) -> Iterator[None]:
    """Inside, what is reported goes to `listener`."""
    token, reported = _listener.set(listener), _reported.set("")
    try:
        yield
    finally:
        _listener.reset(token)
        _reported.reset(reported)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Inside, what is reported is of this part of the evaluation."""
    token = _part.set(", ".join(filter(None, (_part.get(), name))))
    try:
        yield
    finally:
        _part.reset(token)
