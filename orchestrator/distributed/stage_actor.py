"""The Ray actor that owns a pipeline stage."""

from __future__ import annotations

from bim.orchestrator.distributed.actors import ProcessActor
from bim.orchestrator.training.stage import Stage
from bim.orchestrator.training.storage import exists


class StageActor(ProcessActor, Stage):
    """A stage in its own process."""

    def path_exists(self, path: str) -> bool:
        """Whether a file of the driver, by its path or URL, is visible on this node."""
        return exists(path)
