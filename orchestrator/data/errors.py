"""Errors of the data: `DataError` for a source as a whole, `ImageDecodeError` for one image of it."""

from __future__ import annotations

import errno
import os

_ADVICE = {
    errno.EMFILE: "raise the limit of this process (ulimit -n), or lower data.workers",
    errno.ENFILE: "the whole machine has no file handle left; end other programs",
    errno.ENOMEM: "free memory, or lower data.workers",
    errno.EACCES: "make it readable for this user",
    errno.EPERM: "make it readable for this user",
    errno.EIO: "the disk or the network share fails; check it",
    errno.ESTALE: "mount the network share again",
}
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class DataError(ValueError):
    """A source or a split that cannot be used; the message is one sentence: what, where, what to do."""


class ImageDecodeError(Exception):
    """One image that cannot be decoded; the loader replaces and counts it.

    Args:
        sample_id: which image, as `Source.sample_id` gives it.
        reason: why, equal in every process.
    """

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(sample_id, reason)  # both as args, so that the exception survives pickling
        self.sample_id = sample_id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.sample_id}: {self.reason}"


class TooManyCorruptImagesError(DataError):
    """More images than `data.max_bad_fraction` could not be decoded."""


class DataWorkerError(RuntimeError):
    """A worker process of the data loader died; new ones can go on."""


def system_reason(error: OSError) -> str | None:
    """Why the operating system did not give a file, with a remedy; None if the system gave it and its bytes are wrong."""
    if error.errno is None:
        return None
    advice = _ADVICE.get(error.errno)
    return os.strerror(error.errno) + (f"; {advice}" if advice else "")


def is_exhausted(error: OSError) -> bool:
    """Whether the process or the machine ran out of file handles or memory, so that no other file could be read either."""
    return error.errno in _EXHAUSTED
