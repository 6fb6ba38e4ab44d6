"""One pretraining run, checked: settings resolved against the backbone and the data, and where its files go.

Serves a job for its backbones and their baselines, and the search for every trial. Starts nothing and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import end_to_end
from bim.orchestrator.data.loader import check_readable
from bim.orchestrator.data.phases import Phase, steps_until
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.runs.output_dir import open_store
from bim.orchestrator.runs.resolve import data_spec, resolve
from bim.orchestrator.runs.run_identity import RunIdentity
from bim.orchestrator.training.spec import PretrainSpec


@dataclass(frozen=True)
class ResolvedRun:
    """What is trained, on what, for how long, into which folder.

    Args:
        record: of the run, once its output directory is held; None: none, as for the trials of a search.
        search_run_id: of the run that a trial belongs to.
    """

    settings: Settings
    spec: PretrainSpec
    backbone: Backbone
    data: DataSpec
    phases: tuple[Phase, ...]
    out: Path
    record: RunIdentity | None = None
    search_run_id: str = ""

    @property
    def run_id(self) -> str:
        """The id in the manifests of its checkpoints; empty without a record."""
        return self.search_run_id if self.record is None else self.record.run_id

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the images when the job was prepared."""
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
class PreparedBackbone:
    """One backbone of a job, checked, with its images; nothing has been started and nothing written.

    Args:
        baseline: the end-to-end MAE run beside it, if there is one.
        name: of its folder, its lines and its rows among several backbones; empty for a single one.
        finished: an earlier process trained and evaluated it.
    """

    run: ResolvedRun
    baseline: ResolvedRun | None
    source: Source
    splits: Splits
    name: str = ""
    finished: bool = False

    @property
    def runs(self) -> tuple[ResolvedRun, ...]:
        """What is trained, in this order."""
        return (self.run,) if self.baseline is None else (self.run, self.baseline)

    def recorded_as(self, record: RunIdentity) -> PreparedBackbone:
        """The same, trained as the run of this record."""
        baseline = None if self.baseline is None else replace(self.baseline, record=record)
        return replace(self, run=replace(self.run, record=record), baseline=baseline)


def resolve_backbone(
    settings: Settings, out: Path, opened: tuple[Source, Splits] | None = None
) -> PreparedBackbone:
    """The run that these settings describe, and the baseline that they ask for. See `resolve_run`."""
    run, source, splits = resolve_run(settings, out, opened)
    baseline = None
    if settings.baseline == "mae":
        baseline, _, _ = resolve_run(end_to_end(settings), out / "baseline_mae", (source, splits))
    return PreparedBackbone(run, baseline, source, splits)


def resolve_run(
    settings: Settings, out: Path, opened: tuple[Source, Splits] | None = None
) -> tuple[ResolvedRun, Source, Splits]:
    """The run that these settings describe, and its images.

    Args:
        opened: the images and their split, if they are open already and of the same settings.

    Raises:
        SettingsError, DataError, OutputError: one clear sentence.
    """
    has_checkpoint = (
        settings.resume and settings.init_from is not None and open_store(out).latest() is not None
    )
    spec, backbone = resolve(settings, reads_init_from=not has_checkpoint)
    data = data_spec(settings, backbone)
    source, splits = opened or data.open()
    if opened is None:
        check_readable(source, splits)
    phases = replace(data, workers=0).batches_of(source, splits).phases
    data = replace(data, fingerprint=source.fingerprint())
    return ResolvedRun(settings, spec, backbone, data, phases, out), source, splits
