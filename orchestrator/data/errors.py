"""The two ways in which data can be wrong: the whole source (`DataError`, ends the run before it starts) or one
image of it (`ImageDecodeError`, replaced and counted). For the readers in this package and for the loop that counts."""

from __future__ import annotations


class DataError(ValueError):
    """A source or a split that cannot be used; the message is one sentence: what, where, what to do."""


class ImageDecodeError(Exception):
    """One record that is no readable image. `name` says which, `reason` why; neither depends on the process."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both as args, so that the exception survives pickling
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class TooManyCorruptImagesError(DataError):
    """More images than `data.max_bad_fraction` could not be read."""
