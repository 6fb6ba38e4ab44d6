"""The beginning of a run in its output directory and in MLflow: settings, provenance, and the page of the first minute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.config.transforms import flat, settings_to_yaml, with_changes
from bim.orchestrator.distributed.placement import ClusterResources, StageLayout
from bim.orchestrator.files import atomic_write
from bim.orchestrator.jobs.backbone_run import BackboneRun
from bim.orchestrator.jobs.search_job import search_due
from bim.orchestrator.reporting.log import log_to_file
from bim.orchestrator.runs.output_dir import Claim
from bim.orchestrator.runs.prepare import PreparedBackbone, ResolvedRun
from bim.orchestrator.runs.provenance import DataRecord, collect
from bim.orchestrator.runs.signals import at_forced_exit
from bim.orchestrator.search.record import finished_search
from bim.orchestrator.text import redact
from bim.orchestrator.tracking.descriptions import fenced
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.spec import Precision

EVENTS = "events.log"


def open_backbone_run(
    prepared: PreparedBackbone,
    layouts: list[StageLayout],
    precision: Precision,
    cluster: ClusterResources,
    parent: Tracker | None,
    label: str,
    claim: Claim,
    stack: ExitStack,
) -> BackboneRun:
    """Begin the run of a backbone in its output directory and in MLflow, and save its settings and provenance.

    Args:
        parent: of the comparison of several backbones, below which its run stands.
        label: begins its lines.
        claim: of the output directory.
        stack: closes what is opened here.

    Raises:
        TrackingError, StorageError: the run has not begun.
    """
    run = prepared.run
    provenance = collect(data_record(prepared), _resolved_settings(run, layouts[0], precision, cluster))
    run_name = run.out.name if parent is None else f"{parent.out.name}/{prepared.name}"
    with claim.begin():
        text = write_settings(run)  # before anything else: by this file --resume knows that it was begun
        tracker = stack.enter_context(open_tracker(run, run_name, None if parent is None else parent.run_id))
    stack.enter_context(at_forced_exit(tracker.end_at_once))
    stack.enter_context(log_to_file(run.out / EVENTS, label))
    # MLflow never changes a parameter, so those that the search decides wait for its end.
    log_settings(run, tracker, text, undecided_settings(run))
    tracker.log_provenance(provenance)
    return BackboneRun(prepared, layouts, precision, provenance, tracker, label, lease=claim.lease)


def undecided_settings(run: ResolvedRun) -> tuple[str, ...]:
    """The settings that a search before the training is to choose."""
    return tuple(run.settings.search.space) if search_due(run.settings, run.out) else ()


def open_tracker(run: ResolvedRun, run_name: str, parent_run_id: str | None) -> Tracker:
    """The MLflow record of this run, continued if the run is. Raises TrackingError within seconds."""
    tracking = run.settings.tracking
    resumed = Tracker.recorded_run(run.out) if run.settings.resume else None
    return Tracker.open(
        tracking.uri, tracking.experiment, run_name, run.out, resumed, model_name(run), parent_run_id
    )


def write_settings(run: ResolvedRun) -> str:
    """Save the settings in the output directory, from where --resume takes them. Returns the text.

    After a finished search they are those of its best trial, and a run that starts from them does not search again.
    """
    settings = with_changes(run.settings, {"resume": False, "from_scratch": False, "search.resume": False})
    if finished_search(run.out) is not None:
        settings = with_changes(settings, {"search.trials": 0})
    text = settings_to_yaml(settings)
    atomic_write(run.out / SAVED_SETTINGS, text)
    return text


def log_settings(run: ResolvedRun, tracker: Tracker, text: str, undecided: tuple[str, ...] = ()) -> None:
    """Log the settings to MLflow, without the keys in `undecided`; `text` is the whole of them as YAML."""
    if finished_search(run.out) is not None:
        undecided = (*undecided, "search.trials")  # MLflow has the number that the search was started with
    tracker.log_settings({key: v for key, v in flat(run.settings).items() if key not in undecided}, text)


def data_record(prepared: PreparedBackbone) -> DataRecord:
    """The images of a run, for its provenance and its model cards."""
    source, splits = prepared.source, prepared.splits
    return DataRecord(
        source=redact(prepared.run.settings.data.source),
        fingerprint=prepared.run.fingerprint,
        images=len(source),
        train=len(splits.train),
        val=len(splits.val),
        test=len(splits.test),
        classes=None if source.class_names is None else len(source.class_names),
    )


def _resolved_settings(
    run: ResolvedRun, layout: StageLayout, precision: Precision, cluster: ClusterResources
) -> dict[str, str]:
    """What the settings leave to the machine, for the provenance."""
    return {
        "cluster": cluster_text(cluster),
        "layers_by_block": "+".join(str(size) for size in run.spec.blocks),
        "blocks_by_stage": " | ".join(", ".join(map(str, blocks)) for blocks in layout.stage_blocks),
        "per_stage": f"{layout.gpus:g} GPU, {layout.cpus:g} CPU, {layout.threads} threads",
        "precision": precision,
    }


def cluster_text(cluster: ClusterResources) -> str:
    """`4 CPU, 1 GPU`."""
    return f"{cluster.cpus:g} CPU, {cluster.gpus:g} GPU"


def describe_beginning(backbone: BackboneRun, estimate: Sequence[str]) -> None:
    """What is trained, what it will cost, and the way to its depths, on the page of a run from its first minute.

    estimate: lines of `log_estimate`, if there are any.
    """
    run = backbone.prepared.run
    parts = [f"{summary_sentence(backbone)} {links(backbone)}."]
    if search_due(run.settings, run.out):
        searched = ", ".join(run.settings.search.space)
        parts.append(
            f"Before it a search of up to {run.settings.search.trials} trials over {searched}; they stand below the depths."
        )
    if estimate:
        parts.append(fenced("\n".join(estimate)))
    backbone.tracker.describe("\n\n".join(parts))


def summary_sentence(backbone: BackboneRun) -> str:
    """What is trained, in a sentence."""
    run, splits = backbone.prepared.run, backbone.prepared.splits
    settings, blocks = run.settings, run.backbone.blocks
    layers = "+".join(str(block.layers) for block in blocks)
    return (
        f"{settings.backbone.name}, {blocks[-1].depth} layers in {len(blocks)} block{'s' * (len(blocks) > 1)} ({layers}); "
        f"{settings.schedule.epochs} epochs of {len(splits.train):,} images of {redact(settings.data.source)}."
    )


def links(backbone: BackboneRun) -> str:
    """Markdown links to the depths of a run and to the chart of all its losses."""
    losses = [f"block{block.index}/loss" for block in backbone.prepared.run.backbone.blocks]
    return backbone.tracker.run_links(losses)


def model_name(run: ResolvedRun) -> str:
    """The name below which MLflow registers the depths of a run."""
    return run.settings.tracking.model_name or run.settings.name
