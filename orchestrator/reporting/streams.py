"""Standard output and error that never end a run: what cannot be written is dropped.

A reader may go away (`| head`, a closed terminal), a disk may be full, a terminal may not know a character, and a signal
handler may write while a write is under way.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from bim.orchestrator.text import printable

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)
"""Errors after which nothing that is written arrives any more."""


class GuardedStream:
    """A text stream around another one, whose `write` and `flush` never raise; everything else is that of the other.

    Once the reader is gone the file descriptor leads to /dev/null, so that the flush at the interpreter's end does not fail.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(_encodable(text, self._stream.encoding))
        except OSError as error:
            self._drop(error)
        except RuntimeError:  # a signal handler interrupted a write ("reentrant call")
            with suppress(OSError, ValueError):
                os.write(self._stream.fileno(), text.encode(errors="backslashreplace"))
        except ValueError:  # closed
            pass
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)
        except (RuntimeError, ValueError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        if error.errno not in GONE:
            return
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Inside, `sys.stdout` and `sys.stderr` are guarded; what is left in their buffers at the end is written or dropped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the process was started with a closed descriptor
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    before = sys.stdout, sys.stderr
    guarded = [GuardedStream(stream) for stream in before]
    sys.stdout, sys.stderr = guarded
    try:
        yield
    finally:
        for stream in guarded:
            stream.flush()
            _discard_unwritten(stream)
        sys.stdout, sys.stderr = before


def _discard_unwritten(stream: GuardedStream) -> None:
    """Lead a stream whose buffer cannot be written, on a full disk, to /dev/null; else Python exits with status 120."""
    try:
        stream._stream.flush()
    except OSError:
        stream._drop(OSError(errno.EPIPE, ""))
        stream.flush()
    except (ValueError, RuntimeError):
        pass


def _encodable(text: str, encoding: str | None) -> str:
    """The text with what the encoding lacks as escapes: bytes of file names that are not UTF-8, and other characters."""
    text = printable(text)
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        pass
    return text
