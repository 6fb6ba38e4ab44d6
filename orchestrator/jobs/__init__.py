"""Composition: one job prepares, searches, trains, evaluates, exports and records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bim.orchestrator.jobs.python_api import Pretrained, pretrain

__all__ = ["Pretrained", "pretrain"]


def __getattr__(name: str) -> Any:
    """`pretrain` and the type of its result, imported when they are asked for: the package itself stays light."""
    if name in __all__:
        from bim.orchestrator.jobs import python_api

        return getattr(python_api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
