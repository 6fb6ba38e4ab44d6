"""Ablation: runs with one change each, over several seeds, compared with truncated MAE. Serves `pipelines/ablation.py`.

Every case is trained in one process (to the same weights as on Ray), evaluated on the test split at every depth, and
written as one line of JSON, so that an interrupted ablation can be continued.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import Scalar, changes_weights, end_to_end, flat, with_changes
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.evaluation.evaluate import evaluate_variants, raw_pixels
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.metric_info import ACCURACIES
from bim.orchestrator.evaluation.records import DepthReport, Scores
from bim.orchestrator.files import atomic_write
from bim.orchestrator.runs.checkpoints import committed_folder
from bim.orchestrator.runs.prepare import ResolvedRun, resolve_run
from bim.orchestrator.runs.resolve import eval_config
from bim.orchestrator.runs.train import resolve_layout, train
from bim.orchestrator.search.objective import SCORED_BY
from bim.orchestrator.tables import render
from bim.orchestrator.training.callbacks import NullCallback, StopRequest
from bim.orchestrator.training.checkpoint import load_weights
from bim.orchestrator.training.depth_variants import encoder_weights, random_variants, trained_variant

TRUNCATED_MAE = "mae"
"""The reference: one end-to-end MAE run, truncated at each depth."""

FRESH_NORM = "mae-fresh-norm"
RANDOM, RAW_PIXELS = "random", "no-network"

BASELINE = "bim"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("plain BIM: normalized pixels, one decoder layer per block", {}),
    TRUNCATED_MAE: ("MAE (K = 1), truncated at each depth, behind its own final norm", {}),
    "throw": (
        "PR-MIM, half of all tokens thrown and recovered",
        {"decoder.throw_ratio": 0.5, "decoder.recovery": "aggregate"},
    ),
    "throw-light": (
        "the same, a recovered token weighing a quarter of a decoded one",
        {"decoder.throw_ratio": 0.5, "decoder.recovery": "aggregate", "decoder.thrown_weight": 0.25},
    ),
    "drop": (
        "the same half dropped, not recovered",
        {"decoder.throw_ratio": 0.5, "decoder.recovery": "none"},
    ),
    "hog": ("HOG, cells of one patch (8 px)", {"target.name": "hog", "target.cell": 8}),
    "hog-ladder": (
        "HOG, cells of 2, 4, 8, 16 px by block",
        {"target.name": "hog", "target.cell": [2, 4, 8, 16]},
    ),
    "raw-pixels": ("pixels as they are", {"target.normalize": False}),
    "resolution": (
        "32, 48, 64 px from 0, 50, 75 % of the epochs on",
        {"schedule.resolution": [[0, 32], [0.5, 48], [0.75, 64]]},
    ),
    "ratios-up": ("mask ratio 0.6, 0.65, 0.7, 0.75 by block", {"mask.ratio": [0.6, 0.65, 0.7, 0.75]}),
    "ratio-flat": ("mask ratio 0.675 in every block, the mean of those", {"mask.ratio": 0.675}),
    "mae-flat": ("MAE (K = 1) with mask ratio 0.675, truncated", {"blocks": 1, "mask.ratio": 0.675}),
    "ratios-high": ("mask ratio 0.75, 0.8, 0.85, 0.9 by block", {"mask.ratio": [0.75, 0.8, 0.85, 0.9]}),
    "deeper": ("decoders of 1, 1, 2, 2 layers by block", {"decoder.depth": [1, 1, 2, 2]}),
    "noise": ("noise of 0.25 deviations on what crosses a boundary", {"boundary_noise": 0.25}),
    "mae-hog": (
        "MAE (K = 1) with HOG, truncated",
        {"blocks": 1, "mask.ratio": 0.75, "target.name": "hog", "target.cell": 8},
    ),
    RANDOM: ("the same depths before training", {}),
    RAW_PIXELS: ("raw pixels, no network", {}),
}
"""Case -> its description and its changed settings."""

ROWS = {
    **{name: description for name, (description, _) in CASES.items()},
    FRESH_NORM: "the same MAE run, every depth behind a fresh final norm",
}
"""Row of the table -> its description; the last rows are extra measurements of a case."""

EXTRA_MEASUREMENTS = {TRUNCATED_MAE: (FRESH_NORM,)}
"""Case -> rows that the same training also yields."""

SCORES = tuple(metric.key for metric in ACCURACIES)

FORMER_DEFAULTS: dict[str, Scalar] = {"mask.ratio": 0.75, "decoder.recovery": "aggregate"}
"""Defaults that have changed since the first results were written; digests use the old ones."""


@dataclass(frozen=True)
class CaseResult:
    """One case with one seed: test accuracies (0..1) by score and depth, seconds of training."""

    case: str
    seed: int
    epochs: int
    scores: dict[str, dict[int, float]]
    n_test: int
    train_s: float
    base: str = ""
    """`base_digest` of the settings that all cases share; results with another digest are not comparable."""


def base_digest(base: Settings) -> str:
    """Eight hexadecimal digits over the settings that change a trained weight or its score, except the seed.

    The name of the data folder counts, its location does not. Settings at their (former) default are left out, so that a
    setting added by a later version changes no digest.
    """
    source = Path(base.data.source).name
    values = flat(with_changes(base, {"seed": 0, "data.source": source}))
    if not any(base.per_block("decoder.throw_ratio")):  # every case that throws tokens names its own recovery
        values["decoder.recovery"] = FORMER_DEFAULTS["decoder.recovery"]
    bare = {"name": "x", "backbone": {"name": "x"}, "data": {"source": "x", "batch_size": 1}}
    default = flat(settings_from_mapping(bare | {"schedule": {"epochs": 1}})) | FORMER_DEFAULTS
    scored = {f"evaluation.{name}" for name in SCORED_BY}
    hashed = {
        key: v
        for key, v in values.items()
        if (changes_weights(key) or key in scored) and v != default.get(key)
    }
    return blake2b(json.dumps(hashed, sort_keys=True).encode(), digest_size=4).hexdigest()


def run_case(
    base: Settings, case: str, seed: int, changes: Mapping[str, Any] | None = None
) -> list[CaseResult]:
    """Train one case with one seed and evaluate all depths of the base's blocks on the test split.

    changes: settings of a case that is not in `CASES`. Returns the case and its `EXTRA_MEASUREMENTS`. Raises
    SettingsError, DataError, TrainingError.
    """
    depths = resolve_run(base, Path())[0].depths
    single_process = {
        "seed": seed,
        "placement.backend": "in_process",
        "placement.stages": 1,
        "checkpoint.every_epochs": float(base.schedule.epochs),
        "search.trials": 0,
    }
    settings = end_to_end(base) if case == TRUNCATED_MAE else base
    settings = with_changes(settings, {**(CASES[case][1] if changes is None else changes), **single_process})
    torch.set_num_threads(1)
    measured: dict[str, Mapping[int, Scores | DepthReport]] = {}
    train_s = 0.0
    with tempfile.TemporaryDirectory(prefix="ablation-") as folder:
        run, source, splits = resolve_run(settings, Path(folder))
        inputs = EvalInputs(
            source,
            splits,
            size=run.backbone.image_size,
            mean=run.spec.mean,
            std=run.spec.std,
            device=torch.device("cpu"),
            config=replace(eval_config(settings), latency=False),
        )
        if case == RAW_PIXELS:
            measured[case] = dict.fromkeys(depths, raw_pixels(inputs))
        elif case == RANDOM:
            variants = random_variants(run.spec, run.backbone, depths)
            measured[case] = _scores(variants, inputs)
        else:
            started = time.perf_counter()
            weights = _trained_weights(run, settings)
            train_s = time.perf_counter() - started
            variants = {depth: trained_variant(run.backbone, weights, depth) for depth in depths}
            measured[case] = _scores(variants, inputs)
            if case == TRUNCATED_MAE:
                encoders = [encoder_weights(block) for block in weights]
                variants = {depth: run.backbone.variant(depth, encoders, None) for depth in depths}
                measured[FRESH_NORM] = _scores(variants, inputs)
    return [
        CaseResult(
            name,
            seed,
            settings.schedule.epochs,
            {score: {depth: one.metrics()[score] for depth, one in by_depth.items()} for score in SCORES},
            by_depth[depths[0]].n_test,
            train_s,
            base_digest(base),
        )
        for name, by_depth in measured.items()
    ]


def _trained_weights(run: ResolvedRun, settings: Settings) -> list[dict[str, Tensor]]:
    """Weights of every block at the end of the run."""
    train(run, resolve_layout(settings, ClusterResources(1.0, 0.0)), "fp32", NullCallback(), StopRequest())
    return load_weights(committed_folder(run.out, run.total_steps), run.spec)


def _scores(variants: Mapping[int, nn.Module], inputs: EvalInputs) -> Mapping[int, Scores | DepthReport]:
    """Test accuracies by depth."""
    return {report.depth: report for report in evaluate_variants(variants, inputs)}


def read_results(file: Path) -> list[CaseResult]:
    """The results in a file; a line that was written incompletely is skipped."""
    if not file.exists():
        return []
    results = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            raw = json.loads(line)
        except json.JSONDecodeError:
            continue
        raw["scores"] = {name: {int(d): v for d, v in by.items()} for name, by in raw["scores"].items()}
        results.append(CaseResult(**raw))
    return results


def write_result(file: Path, result: CaseResult) -> None:
    """Append one result. Raises StorageError; the results before it stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"  # a line that an earlier version left half written
    atomic_write(file, before + json.dumps(asdict(result)) + "\n")


def table(results: Sequence[CaseResult], cases: Mapping[str, str]) -> Iterator[str]:
    """Markdown lines, one table per score: mean over seeds +- standard error of the mean by depth, in percent.

    The error is that of the seeds only, since all of them share the test images. The last column is the difference of the
    mean over depths to truncated MAE, paired by seed.
    """
    for score in SCORES:
        rows = [row for name in cases if (row := _of(results, name, score))]
        if not rows:
            continue
        depths = sorted(next(iter(rows[0].values())))
        lines: list[dict[str, str]] = []
        mae = {seed: statistics.mean(by.values()) for seed, by in _of(results, TRUNCATED_MAE, score).items()}
        for name, description in cases.items():
            by_seed = _of(results, name, score)
            if not by_seed:
                continue
            line = {f"{score.replace('_', ' ')}, %": description}
            line |= {f"depth {d}": _mean_and_error([by[d] for by in by_seed.values()]) for d in depths}
            means = {seed: statistics.mean(by.values()) for seed, by in by_seed.items()}
            shared = sorted(means.keys() & mae.keys())
            line["mean"] = _mean_and_error(list(means.values()))
            if name != TRUNCATED_MAE and shared:
                differences = [means[seed] - mae[seed] for seed in shared]
                line["ahead of MAE"] = _mean_and_error(differences, signed=True)
            lines.append(line)
        yield from (*render(lines, "markdown").splitlines(), "")


def _of(results: Sequence[CaseResult], case: str, score: str) -> dict[int, dict[int, float]]:
    """Seed -> depth -> accuracy."""
    return {result.seed: result.scores[score] for result in results if result.case == case}


def _mean_and_error(values: Sequence[float], signed: bool = False) -> str:
    mean = 100 * statistics.mean(values)
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    if len(values) > 1:
        text += f" ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.1f}"
    return text
