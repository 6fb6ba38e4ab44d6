"""Where the lines of a job go: to the terminal, and with their times to `OUT/events.log`.

Modules log below the logger `bim`; without `configure_console` nothing of that is printed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from bim.orchestrator.text import printable, redact

ROOT = logging.getLogger("bim")

_prefix: ContextVar[str] = ContextVar("prefix", default="")


@contextmanager
def line_prefix(prefix: str) -> Iterator[None]:
    """Inside, every line that this thread logs begins with `prefix` and two spaces; with none if it is empty."""
    token = _prefix.set(_prefix.get() + (f"{prefix}  " if prefix else ""))
    try:
        yield
    finally:
        _prefix.reset(token)


def configure_console(verbose: bool = False, quiet: bool = False, on_stderr: bool = False) -> None:
    """Print what is logged from now on: plain lines on stdout, errors as `error: ...` on stderr.

    Args:
        verbose: also the debug level.
        quiet: only warnings and errors.
        on_stderr: every line, where stdout is for what the command prints.
    """
    for handler in [handler for handler in ROOT.handlers if isinstance(handler, _ConsoleHandler)]:
        ROOT.removeHandler(handler)
    console = _ConsoleHandler(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    console.stderr_level = logging.NOTSET if on_stderr else logging.ERROR
    console.addFilter(lambda record: not getattr(record, "in_live_display", False))
    console.setFormatter(_LineFormatter())
    ROOT.addHandler(console)
    ROOT.setLevel(logging.DEBUG)  # files of `log_to_file` get everything


@contextmanager
def console_unless_configured(quiet: bool = False) -> Iterator[None]:
    """Inside, lines are printed as by `configure_console`, unless the program has configured logging by itself."""
    if ROOT.handlers or logging.getLogger().handlers:
        yield
        return
    level = ROOT.level
    configure_console(quiet=quiet)
    added = ROOT.handlers[0]
    try:
        yield
    finally:
        ROOT.removeHandler(added)
        ROOT.setLevel(level)


@contextmanager
def log_to_file(path: Path, prefix: str = "") -> Iterator[None]:
    """Inside, what is logged, of every level, is appended to `path` with its time, and an error that ends the context.

    A file there grows.

    Args:
        prefix: only the lines below this `line_prefix`, which is left out of them.
    """
    handler = _EventsHandler(path, encoding="utf-8", delay=True)
    below = f"{prefix}  " if prefix else ""
    handler.addFilter(lambda record: _prefix.get().startswith(below))
    handler.setFormatter(_LineFormatter(below, timestamps=True))
    if ROOT.level == logging.NOTSET:  # a job that is called from Python, with no console
        ROOT.setLevel(logging.DEBUG)
    ROOT.addHandler(handler)
    try:
        yield
    except Exception as error:
        handler.handle(ROOT.makeRecord(ROOT.name, logging.ERROR, "", 0, error, (), None))
        raise
    finally:
        ROOT.removeHandler(handler)
        handler.close()


class _ConsoleHandler(logging.Handler):
    stderr_level = logging.ERROR

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # sys.stdout is looked up at every line: it may be redirected in between.
            stream = sys.stderr if record.levelno >= self.stderr_level else sys.stdout
            print(self.format(record), file=stream, flush=True)
        except Exception:
            self.handleError(record)


class _EventsHandler(logging.FileHandler):
    """A line that the disk does not take is lost: it must not end a training."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # of opening the file
            super().emit(record)

    def close(self) -> None:
        with suppress(OSError):  # of flushing
            super().close()

    def handleError(self, record: logging.LogRecord) -> None: ...


class _LineFormatter(logging.Formatter):
    """Every line of a message, with the prefix of its thread; errors begin with `error: `."""

    def __init__(self, without: str = "", timestamps: bool = False) -> None:
        super().__init__()
        self._without, self._timestamps = without, timestamps

    def format(self, record: logging.LogRecord) -> str:
        head = _prefix.get().removeprefix(self._without)
        if record.levelno >= logging.ERROR:
            head = f"{head}error: "
        if self._timestamps:
            head = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))}  {head}"
        message = printable(redact(super().format(record)))
        return "\n".join(head + line for line in message.splitlines())
