"""Settings for images that no recipe is given for: opened, counted, probed, chosen by the rules, and said."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import overlaid
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.data.facts import ImageFacts, image_facts
from bim.orchestrator.data.source import Source, given_source, open_source
from bim.orchestrator.data.splits import make_splits
from bim.orchestrator.distributed.cluster import ray_cluster
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.plugins import import_plugins
from bim.orchestrator.runs.auto_settings import Machine, choose_settings
from bim.orchestrator.runs.estimate import epoch_seconds, micro_batch_seconds, probe_steps
from bim.orchestrator.runs.prepare import resolve_run
from bim.orchestrator.runs.train import resolve_layout
from bim.orchestrator.text import wrapped
from bim.orchestrator.training.spec import Precision

log = logging.getLogger(__name__)


def automatic_settings(given: Mapping[str, Any], budget_s: float | None = None) -> dict[str, Any]:
    """Nested settings for `given["data.source"]`; every choice is logged with its reason.

    Args:
        given: dotted key -> value of what the user set, which no rule touches.
        budget_s: seconds that the training may take; None: by the rules.

    Raises:
        SettingsError, DataError, ClusterError, PluginError: the images, or what is given, cannot be used.
    """
    name, columns = given["data.source"], (given.get("data.image_column"), given.get("data.label_column"))
    import_plugins(given.get("plugins") or ())
    source = given_source(name) or open_source(name, *columns)
    facts, cluster = image_facts(source), machine_resources()
    machine = Machine(
        int(cluster.cpus), int(cluster.gpus) if given.get("placement.gpus_per_stage") != 0 else 0
    )
    chosen = choose_settings(
        facts, machine, given, budget_s, lambda values: _epoch_seconds(nested(values), source, cluster)
    )
    log.info("settings chosen for %s:", describe_images(facts))
    for choice in chosen.lines:
        for line in wrapped(f"  {choice}"):
            log.info(line)
    log.info("  no search: --search.trials 8 would cost about half of the training's time again, or more")
    return nested({"data.source": given["data.source"], **chosen.values})


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


def local_precision(settings: Settings, gpus: float) -> Precision:
    """The precision of the probe: that of the run if this machine has its device, else float32."""
    if settings.optim.precision != "auto":
        return settings.optim.precision
    has_bf16 = gpus and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections within sections."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result = overlaid(result, key.split(".", 2), value)
    return result


def _epoch_seconds(values: Mapping[str, Any], source: Source, cluster: ClusterResources) -> float:
    settings = settings_from_mapping(values)
    data = settings.data
    splits = make_splits(source, data.split_seed, data.val_fraction, data.test_fraction)
    run, _, _ = resolve_run(settings, Path("unused"), (source, splits))
    layout = resolve_layout(settings, cluster)
    times = probe_steps(run, (source, splits), layout, local_precision(settings, layout.gpus))
    backend = settings.placement.backend
    return epoch_seconds(run, micro_batch_seconds(times, layout, backend, int(cluster.cpus), data.workers))
