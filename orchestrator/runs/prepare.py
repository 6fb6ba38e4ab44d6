"""One pretraining run, checked: settings resolved against the backbone and the data, and where its files go.

Made by the main job for itself and its baseline, and by the search for every trial. Starts nothing and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.data.phases import Phase, steps_until
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.runs.resolve import data_spec, resolve
from bim.orchestrator.training.spec import PretrainSpec


@dataclass(frozen=True)
class ResolvedRun:
    """What is trained, on what, for how long, into which folder."""

    settings: Settings
    spec: PretrainSpec
    backbone: Backbone
    data: DataSpec
    phases: tuple[Phase, ...]
    out: Path

    @property
    def fingerprint(self) -> str:
        """What the images are, as they were when the job was prepared."""
        return self.data.fingerprint or ""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return steps_until(self.phases, self.settings.schedule.epochs)

    @property
    def depths(self) -> tuple[int, ...]:
        """Cumulative layers at the end of every block: the depth variants."""
        return tuple(block.depth for block in self.backbone.blocks)


@dataclass(frozen=True)
class PreparedJob:
    """A job whose input is known to be good; nothing has been started and nothing written."""

    family: ResolvedRun
    baseline: ResolvedRun | None
    source: Source
    splits: Splits


def resolve_run(
    settings: Settings, out: Path, opened: tuple[Source, Splits] | None = None
) -> tuple[ResolvedRun, Source, Splits]:
    """The family of these settings, and its images.

    Args:
        opened: the images and their split, if they are open already and of the same settings.

    Raises:
        SettingsError, DataError: one clear sentence.
    """
    spec, backbone = resolve(settings)
    data = data_spec(settings, backbone)
    source, splits = opened or data.open()
    phases = replace(data, workers=0).batches_of(source, splits).phases
    family = ResolvedRun(
        settings, spec, backbone, replace(data, fingerprint=source.fingerprint()), phases, out
    )
    return family, source, splits
