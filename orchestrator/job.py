"""The main job: settings in, a trained, measured, exported and recorded family of backbones out.

Composes the parts and holds no arithmetic. Everything that can be wrong with the input is found in `prepare` or before
the first actor starts; those errors are `BAD_INPUT`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from models.backbones.backbone import Backbone
from orchestrator.assess import AssessJob, Assessment, EvaluationSpec, assess
from orchestrator.block_trainer import Precision
from orchestrator.checkpoint import CheckpointStore, Manifest
from orchestrator.command_line import SAVED_SETTINGS
from orchestrator.config import (
    Settings,
    SettingsError,
    end_to_end,
    flat,
    settings_to_mapping,
    settings_to_yaml,
    with_changes,
)
from orchestrator.data.errors import DataError
from orchestrator.data.sources import Source
from orchestrator.data.spec import DataSpec
from orchestrator.data.splits import Splits
from orchestrator.failures import RestartPolicy, TrainingError
from orchestrator.launch import ClusterError, ray_cluster, run_beside_stages
from orchestrator.model_card import CardFacts
from orchestrator.outputs import OutputError, check_output, make_output
from orchestrator.placement import ClusterResources, Layout, PlacementError, consecutive, plan_layout
from orchestrator.pretrain import PretrainResult, RunPlan, StopRequest, pretrain
from orchestrator.progress import Progress
from orchestrator.provenance import collect
from orchestrator.ray_stages import RayStages
from orchestrator.reporting import card_facts, data_record, opening_lines, record_depths, record_summary
from orchestrator.resolve import data_spec, resolve
from orchestrator.schedules import CosineSchedule
from orchestrator.stages import FamilySpec, InProcessStages, Stages
from orchestrator.stop_signals import Interrupted, interrupted_by_signals, stop_on_signals
from orchestrator.tracking import Tracker, TrackingError

Say = Callable[[str], None]


BAD_INPUT = (SettingsError, DataError, OutputError, PlacementError, TrackingError, ClusterError)


@dataclass(frozen=True)
class Family:
    """One pretraining run, checked: what is trained, on what, for how long, into which folder."""

    settings: Settings
    spec: FamilySpec
    backbone: Backbone
    data: DataSpec
    steps_per_epoch: int
    out: Path

    @property
    def fingerprint(self) -> str:
        """What the images are, as they were when the job was prepared."""
        return self.data.fingerprint or ""

    @property
    def total_steps(self) -> int:
        return self.settings.schedule.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Prepared:
    """A job whose input is known to be good; nothing has been started and nothing written."""

    family: Family
    baseline: Family | None
    source: Source
    splits: Splits


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `stopped` is the signal that ended it early, `table` what there is to show."""

    out: Path
    stopped: str | None
    table: str
    depths: tuple[int, ...]
    ui: str


def prepare(settings: Settings) -> Prepared:
    """Check everything that needs no cluster: backbone, data, splits, output directory.

    Raises:
        SettingsError, DataError, OutputError: one clear sentence.
    """
    out = (
        (settings.out or Path("runs") / f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        .expanduser()
        .absolute()
    )
    settings = with_changes(settings, {"out": str(out)} | _absolute_inputs(settings))
    spec, backbone = resolve(settings)
    data = data_spec(settings, backbone.image_size)
    source, splits = data.open()
    steps = replace(data, workers=0).train_batches().steps_per_epoch
    data = replace(data, fingerprint=source.fingerprint())
    family = Family(settings, spec, backbone, data, steps, out)
    check_output(out, settings, family.fingerprint)
    baseline = None
    if settings.baseline == "mae":
        alone = end_to_end(settings)
        baseline_spec, baseline_backbone = resolve(alone)
        baseline = Family(alone, baseline_spec, baseline_backbone, data, steps, out / "baseline_mae")
    return Prepared(family, baseline, source, splits)


def run_job(prepared: Prepared, say: Say) -> Outcome:
    """Train, measure, export and record. See `Outcome`.

    Raises:
        OutputError, PlacementError, TrackingError, ClusterError: before the first actor starts.
        TrainingError: training cannot go on; the last checkpoint stays.
    """
    try:
        return _run(prepared, say)
    except KeyboardInterrupt as interrupt:  # while Ray waits, it makes a bare one of an Interrupted
        name = interrupt.name if isinstance(interrupt, Interrupted) else "SIGINT"
        return Outcome(prepared.family.out, name, "", (), "")


def _run(prepared: Prepared, say: Say) -> Outcome:
    family, settings = prepared.family, prepared.family.settings
    depths = tuple(block.depth for block in family.backbone.blocks)
    with ExitStack() as stack:
        cluster = _cluster(settings, stack, say)
        stack.enter_context(interrupted_by_signals())
        layout = layout_of(settings, cluster)
        baseline_layout = (
            None if prepared.baseline is None else layout_of(prepared.baseline.settings, cluster)
        )
        precision = precision_on(settings, layout)
        provenance = collect(data_record(prepared), resolved(family, layout, precision, cluster))
        made = make_output(family.out)
        try:
            tracker = stack.enter_context(open_tracker(family))
        except TrackingError:
            for folder in made:
                folder.rmdir()
            raise
        settings_text = settings_to_yaml(with_changes(settings, {"resume": False}))
        (family.out / SAVED_SETTINGS).write_text(settings_text, encoding="utf-8")
        tracker.log_settings(flat(settings), settings_text)
        tracker.log_provenance(provenance)
        for line in opening_lines(family, prepared, layout):
            say(line)
        stop = StopRequest()
        train(family, layout, precision, Progress(say, tracker), stop)
        if stop.reason is None:
            say(f"measuring and exporting depth{'s' * (len(depths) > 1)} {', '.join(map(str, depths))}")
            found = _assess(family, layout, card_facts(family, provenance), depths)
            record_depths(tracker, family, found)
        if stop.reason is None and prepared.baseline is not None and baseline_layout is not None:
            say("the baseline: one end-to-end MAE run (K = 1), to be truncated at each depth")
            train(prepared.baseline, baseline_layout, precision, Progress(say, tracker, "mae"), stop)
        if stop.reason is not None:
            tracker.finish("KILLED")
            return Outcome(family.out, stop.reason, "", depths, tracker.ui_hint())
        truncated = None
        if prepared.baseline is not None and baseline_layout is not None:
            facts = card_facts(prepared.baseline, provenance)
            truncated = _assess(prepared.baseline, baseline_layout, facts, depths, references=False)
            record_depths(tracker, prepared.baseline, truncated, series="mae")
        table = record_summary(tracker, family, found, truncated)
        ui = tracker.ui_hint()
    return Outcome(family.out, None, table, depths, ui)


def resolved(
    family: Family, layout: Layout, precision: Precision, cluster: ClusterResources
) -> dict[str, str]:
    """What the settings left open and this machine decided, for the record of the run."""
    return {
        "cluster": f"{cluster.cpus:g} CPU, {cluster.gpus:g} GPU",
        "layers_by_block": "+".join(str(size) for size in family.spec.blocks),
        "blocks_by_stage": " | ".join(", ".join(map(str, place)) for place in layout.places),
        "per_stage": f"{layout.gpus:g} GPU, {layout.cpus:g} CPU, {layout.threads} threads",
        "precision": precision,
    }


def train(
    family: Family, layout: Layout, precision: Precision, progress: Progress, stop: StopRequest
) -> PretrainResult:
    """Train one family from its last checkpoint to its end, on the stages of `layout`.

    Raises:
        OutputError: the checkpoint was trained in another precision.
        PlacementError, DataError: before the first step; later on they are a TrainingError.
    """
    settings = family.settings
    spec = replace(family.spec, optim=replace(family.spec.optim, precision=precision))
    family.out.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(family.out, settings.checkpoint.keep, progress.say)
    store.clear_uncommitted()
    _check_precision(family.out, precision)
    schedule, epoch = settings.schedule, family.steps_per_epoch
    plan = RunPlan(
        epochs=schedule.epochs,
        steps_per_epoch=epoch,
        micros=settings.data.accumulate,
        images_per_step=settings.effective_batch,
        lr=CosineSchedule(settings.learning_rate, round(schedule.warmup_epochs * epoch), family.total_steps),
        window=settings.placement.window or 2 * len(layout.places),
        checkpoint_every=max(1, round(settings.checkpoint.every_epochs * epoch)),
        max_bad_images=int(settings.data.max_bad_fraction * epoch * settings.effective_batch),
    )
    facts = {"data": family.fingerprint, "precision": precision}

    def manifest(step: int) -> Manifest:
        return Manifest(step, epoch, settings_to_mapping(settings), facts, ())

    stages = make_stages(family, spec, layout)
    try:
        with stop_on_signals(stop, progress.say):
            return pretrain(
                plan, stages, store, manifest, progress, RestartPolicy(settings.failures.max_restarts), stop
            )
    except (PlacementError, DataError) as error:
        if not progress.began:
            raise
        raise TrainingError(str(error)) from error
    finally:
        stages.close()


def _check_precision(out: Path, precision: Precision) -> None:
    found = CheckpointStore(out, say=lambda _: None).latest()  # the loop tells what it passes over
    before = precision if found is None else found.facts.get("precision", precision)
    if before != precision:
        raise OutputError(
            f"the run was trained in {before} and would go on in {precision} on these devices; "
            f"set optim.precision to {before}, or start a new run with another --out"
        )


def make_stages(family: Family, spec: FamilySpec, layout: Layout) -> Stages:
    """The group of stages that the settings ask for, not yet started."""
    if family.settings.placement.backend == "ray":
        return RayStages(spec, family.data, layout, family.out, max(120.0, family.settings.placement.wait_s))
    device = "cuda" if layout.gpus else "cpu"
    return InProcessStages(spec, family.data.train_batches, layout.places, device, layout.threads)


def layout_of(settings: Settings, cluster: ClusterResources) -> Layout:
    """Where the blocks of these settings live. Raises PlacementError."""
    asked = settings.placement
    if asked.backend == "ray":
        given = (asked.stages, asked.gpus_per_stage, asked.cpus_per_stage, asked.threads_per_stage)
        if asked.wait_s > 0 and asked.gpus_per_stage:  # what is not there yet is waited for, not refused
            stages = asked.stages or settings.num_blocks
            needed = ClusterResources(
                (asked.cpus_per_stage or 1.0) * (stages + 1), asked.gpus_per_stage * stages
            )
            cluster = ClusterResources(max(cluster.cpus, needed.cpus), max(cluster.gpus, needed.gpus))
        return plan_layout(settings.num_blocks, cluster, *given)
    use_gpu = cluster.gpus > 0 and asked.gpus_per_stage != 0
    if asked.gpus_per_stage and not use_gpu:
        raise PlacementError(
            "placement.gpus_per_stage asks for a GPU, and this process sees none; set it to 0"
        )
    places = consecutive(settings.num_blocks, asked.stages or 1)
    threads = asked.threads_per_stage or torch.get_num_threads()
    return Layout(places, float(use_gpu), cpus=1.0, loader_cpus=0.0, threads=threads)


def precision_on(settings: Settings, layout: Layout) -> Precision:
    """What `auto` means: bfloat16 where the stages' GPUs have it, else float32."""
    asked = settings.optim.precision
    if asked != "auto":
        return asked
    if not layout.gpus:
        return "fp32"
    able = run_beside_stages(_has_bf16, layout) if settings.placement.backend == "ray" else _has_bf16()
    return "bf16" if able else "fp32"


def _has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def open_tracker(family: Family) -> Tracker:
    """The MLflow record of this run, continued if the run is. Raises TrackingError within seconds."""
    track = family.settings.tracking
    continued = Tracker.recorded_run(family.out) if family.settings.resume else None
    name = track.model_name or family.settings.name
    return Tracker.open(track.uri, track.experiment, family.out.name, family.out, continued, name)


def _cluster(settings: Settings, stack: ExitStack, say: Say) -> ClusterResources:
    if settings.placement.backend == "ray":
        return stack.enter_context(ray_cluster(say))
    return ClusterResources(float(os.cpu_count() or 1), float(torch.cuda.device_count()))


def _assess(
    family: Family, layout: Layout, card: CardFacts, depths: tuple[int, ...], references: bool = True
) -> Assessment:
    settings = family.settings
    how = settings.evaluation
    job = AssessJob(
        spec=family.spec,
        data=family.data,
        evaluation=EvaluationSpec(
            how.knn_k, how.knn_temperature, how.batch_size, how.latency, settings.data.split_seed
        ),
        checkpoint=str(CheckpointStore(family.out).directory(family.total_steps)),
        out=str(family.out),
        depths=depths,
        card=card,
        device="cuda" if layout.gpus else "cpu",
        references=references,
    )
    return run_beside_stages(assess, layout, job) if settings.placement.backend == "ray" else assess(job)


def _absolute_inputs(settings: Settings) -> dict[str, str]:
    """Paths that actors must find whatever directory they run in."""
    given = {"data.source": settings.data.source, "init_from": settings.init_from}
    found = {}
    for key, value in given.items():
        # "local-dir:DIR" and "torchvision:NAME:ROOT" end in a path too.
        head, colon, path = (value or "").rpartition(":")
        if path and Path(path).exists():
            found[key] = f"{head}{colon}{Path(path).absolute()}"
    return found
