"""Settings for images that no recipe is given for: opened, counted, probed, chosen by the rules, and said."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bim.orchestrator.config.auto_rules import LEAST_SETTINGS, auto_rules
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import overlaid, with_changes
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.data.facts import ImageFacts, image_facts
from bim.orchestrator.data.source import Source, open_source
from bim.orchestrator.data.splits import make_splits
from bim.orchestrator.distributed.cluster import ray_cluster, run_on_worker
from bim.orchestrator.distributed.placement import ClusterResources, StageLayout, concurrent_backbones
from bim.orchestrator.jobs.backbone_entries import backbone_entries
from bim.orchestrator.jobs.cost import cpus_of_each, expected_precision, on_device, step_times
from bim.orchestrator.jobs.prepare import check_model_names, resolve_paths
from bim.orchestrator.runs.auto_settings import Chosen, StageResources, choose_settings
from bim.orchestrator.runs.batch_size import computed_batch, gpu_bytes, tried_batch
from bim.orchestrator.runs.estimate import seconds_in_turns
from bim.orchestrator.runs.output_dir import check_output
from bim.orchestrator.runs.prepare import resolve_run
from bim.orchestrator.runs.provenance import hardware
from bim.orchestrator.runs.resolve import load_plugins
from bim.orchestrator.runs.step_probe import Probe
from bim.orchestrator.runs.step_times import epoch_seconds, micro_batch_seconds
from bim.orchestrator.runs.train import resolve_layout
from bim.orchestrator.search.controller import epochs_of_trials
from bim.orchestrator.text import wrapped

SEARCH_TRIALS, SEARCH_SHARE = 8, 0.5
"""Of the search whose cost is told: its number of trials, and their epochs over those of the run."""

log = logging.getLogger(__name__)


def automatic_settings(given: Mapping[str, Any], budget_s: float | None = None) -> dict[str, Any]:
    """Nested settings for `given["data.source"]`; every choice is logged with its reason.

    Args:
        given: dotted key -> value of what the user set, which no rule touches.
        budget_s: seconds that the training may take; None: by the rules.

    Raises:
        SettingsError, DataError, OutputError, PlacementError, ClusterError: the images, or what is given, cannot be used.
        TrainingError: a step of the probe fails, as one of the training would.
    """
    name, columns = given["data.source"], (given.get("data.image_column"), given.get("data.label_column"))
    _check_given(given)
    source = open_source(name, *columns)
    facts, cluster = image_facts(source), machine_resources()
    machine = StageResources(
        int(cluster.cpus), int(cluster.gpus) if given.get("placement.gpus_per_stage") != 0 else 0
    )
    chosen = choose_settings(
        facts, machine, given, budget_s, lambda values: _epoch_seconds(nested(values), source, cluster)
    )
    if machine.gpus and not {"data.batch_size", "data.accumulate"} & given.keys():
        _split_batch(chosen, given, source)
    log.info("settings chosen for %s:", describe_images(facts))
    for choice in chosen.lines:
        for line in wrapped(f"  {choice}"):
            log.info(line)
    if not {"search.trials", "backbones"} & given.keys():
        with suppress(SettingsError):  # it is a hint
            log.info("  %s", _search_line(settings_from_mapping(nested({**chosen.values, **given}))))
    return nested({"data.source": given["data.source"], **chosen.values})


def _check_given(given: Mapping[str, Any]) -> None:
    """What can be wrong before anything is probed: plugins, the output directory, the name of the models.

    Raises:
        SettingsError, OutputError: it is wrong.
    """
    values = dict(LEAST_SETTINGS)
    for key, value in given.items():
        values = overlaid(values, key.split(".", 2), value)
    settings = settings_from_mapping(values)
    load_plugins(settings)
    check_model_names(settings)
    if settings.out is not None:
        settings, out = resolve_paths(settings)
        check_output(out, settings, fingerprint="")


def _search_line(settings: Settings) -> str:
    """What a search of short trials would cost."""
    epochs = settings.schedule.epochs
    options = {
        "search.trials": SEARCH_TRIALS,
        "search.trial_epochs": max(1, round(epochs * SEARCH_SHARE / SEARCH_TRIALS)),
    }
    expected, most = epochs_of_trials(with_changes(settings, options))
    flags = " ".join(f"--{key} {value}" for key, value in options.items())
    span = f"{expected:.0f} to {most}" if expected < most else f"{most}"
    return f"no search: {flags} would train for {span} epochs more, beside {epochs}"


def _split_batch(chosen: Chosen, given: Mapping[str, Any], source: Source) -> None:
    """Parts of a batch that the memory of a GPU holds, in place of the whole, if it is known and too small."""
    settings = settings_from_mapping(nested({**chosen.values, **given}))
    try:
        fitting, _ = min(_fitting_batches(settings, source, is_tried=False))
    except SettingsError:
        return  # its memory is unknown, or the error is told where the run is prepared
    batch = settings.data.batch_size
    if 0 < fitting < batch:
        parts = -(-batch // fitting)
        chosen.values |= {"data.batch_size": batch // parts, "data.accumulate": parts}
        chosen.lines.append(f"the batch in {parts} parts of {batch // parts}: what the memory of a GPU holds")


def largest_batch_size(settings: Settings) -> int:
    """What `--data.batch_size auto` stands for: the most images of a micro-batch that fit, computed, then tried.

    An epoch keeps the steps that the rules ask for; on CPUs a step has no more images than they allow there.

    Raises:
        SettingsError, DataError, PlacementError, ClusterError: the settings or the images cannot be used, or no image fits.
        TrainingError: the step that is tried fails for another reason than memory.
    """
    load_plugins(settings)
    data = settings.data
    source = open_source(data.source, data.image_column, data.label_column)
    batch_size, bound = min(_fitting_batches(settings, source, is_tried=True))
    if not batch_size:
        raise SettingsError(
            "data.batch_size auto: the memory of a device holds not even one image; choose a smaller backbone or image "
            "size, or more stages"
        )
    log.info("the largest batch, computed and tried: %d, for %s", batch_size, bound)
    return batch_size


def _fitting_batches(settings: Settings, source: Source, is_tried: bool) -> list[tuple[int, str]]:
    """The largest micro-batch of every backbone and what bounds it: memory, steps of an epoch, or images a step on CPUs."""
    data, steps = settings.data, auto_rules().steps
    splits = make_splits(source, data.split_seed, data.val_fraction, data.test_fraction)
    entries, cluster = [settings], machine_resources()
    if settings.backbones is not None:
        entries = list(backbone_entries(with_changes(settings, {"out": settings.out or "unused"})).values())
    batches = []
    for entry in entries:
        run, _, _ = resolve_run(entry, Path("unused"), (source, splits))
        layout = resolve_layout(entry, cluster)
        precision = expected_precision(entry, layout)
        accumulate, on_cpus = entry.data.accumulate, steps.images_per_step["cpu"]
        limit = len(splits.train) // (steps.min_per_epoch * accumulate)
        bound = f"{steps.min_per_epoch} steps an epoch"
        if not layout.gpus and on_cpus // accumulate < limit:
            limit, bound = on_cpus // accumulate, f"{on_cpus} images a step on CPUs"
        limit = max(1, limit)
        batch_size = computed_batch(run, layout, precision, _device_bytes(layout), limit)
        if is_tried:
            probe = Probe.of(run, layout, precision)
            batch_size = on_device(tried_batch, layout, entry, probe, batch_size, images=(source, splits))
        batches.append((batch_size, bound if 2 * batch_size > limit else "the memory of the device"))
    return batches


def _device_bytes(layout: StageLayout) -> float:
    """Memory of a GPU of the stages, or of this machine. Raises SettingsError if it is unknown."""
    if layout.gpus and os.environ.get("RAY_ADDRESS"):
        with ray_cluster():
            device_hardware = run_on_worker(hardware, layout)
    else:
        device_hardware = hardware()
    memory = gpu_bytes(device_hardware.gpus) if layout.gpus else (device_hardware.memory_gib or 0) * 2**30
    if not memory:
        raise SettingsError("data.batch_size auto: the memory of the device is unknown; give a number")
    return memory


def describe_images(facts: ImageFacts) -> str:
    """`1500 images, labeled, short side about 480 px`."""
    labels = "labeled" if facts.is_labeled else "without labels"
    return f"{sum(facts.splits.values())} images, {labels}, short side about {facts.short_side_px} px"


def machine_resources() -> ClusterResources:
    """CPUs and GPUs of the cluster that `RAY_ADDRESS` names, or of this machine; Ray is not started. Raises ClusterError."""
    if os.environ.get("RAY_ADDRESS"):
        with ray_cluster() as cluster:
            return cluster
    return ClusterResources(float(os.cpu_count() or 1), float(torch.cuda.device_count()))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections within sections."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result = overlaid(result, key.split(".", 2), value)
    return result


def _epoch_seconds(values: Mapping[str, Any], source: Source, cluster: ClusterResources) -> float:
    """Seconds of an epoch; of several backbones together, which divide the machine."""
    settings = settings_from_mapping(values)
    entries = [settings]
    if settings.backbones is not None:
        entries = list(backbone_entries(with_changes(settings, {"out": "unused"})).values())
    gpus_per_stage = settings.placement.gpus_per_stage
    cpus = cpus_of_each(len(entries), cluster, gpus_per_stage)
    concurrent = concurrent_backbones(len(entries), cluster, gpus_per_stage)
    return seconds_in_turns([_epoch_seconds_of_one(e, source, cluster, cpus) for e in entries], concurrent)


def _epoch_seconds_of_one(
    settings: Settings, source: Source, cluster: ClusterResources, cpus: float
) -> float:
    data = settings.data
    splits = make_splits(source, data.split_seed, data.val_fraction, data.test_fraction)
    run, _, _ = resolve_run(settings, Path("unused"), (source, splits))
    layout = resolve_layout(settings, cluster)
    times = step_times(run, (source, splits), layout, expected_precision(settings, layout))
    return epoch_seconds(
        run, micro_batch_seconds(times, layout, settings.placement.backend, cpus, data.workers)
    )
