"""Errors of the data: `DataError` for a source as a whole, `ImageDecodeError` for one image of it."""

from __future__ import annotations


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
