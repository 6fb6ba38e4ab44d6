"""What a run will cost, before it starts: its times from those of a micro-batch, memory of every stage, disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bim.models.initialization import NoInitialization
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits, can_score
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.evaluation.evaluate import RANKME_IMAGES
from bim.orchestrator.evaluation.features import MAX_IMAGES
from bim.orchestrator.evaluation.model_cost import block_gflops, num_params
from bim.orchestrator.runs.depth_scores import images_of_a_score, num_scores
from bim.orchestrator.runs.estimate_records import BlockCost, RunEstimate
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.step_probe import StepTimes
from bim.orchestrator.runs.step_times import epoch_seconds, micro_batch_seconds, training_seconds
from bim.orchestrator.training.build import build_local_mim
from bim.orchestrator.training.memory import BlockMemory, block_memories
from bim.orchestrator.training.spec import Precision


def run_memories(run: ResolvedRun, precision: Precision) -> list[BlockMemory]:
    """The memory of every block in the phase with the most pixels in a micro-batch."""
    phase = max(run.phases, key=lambda p: p.batch_size * p.size[0] * p.size[1])
    return block_memories(run.spec, run.backbone, phase.size, phase.batch_size, precision)


def checkpoint_bytes(memories: Sequence[BlockMemory], keep: int, keeps_best: bool = False) -> int:
    """Disk that checkpoints take: weights and optimizer of those that are kept and of the one in the making.

    Args:
        keep: newest ones that are kept.
        keeps_best: the one with the best scores while it trains is kept beside them.
    """
    return (keep + 1 + keeps_best) * sum(block.parameters + block.optimizer for block in memories)


def seconds_in_turns(seconds: Sequence[float], concurrent: int) -> float:
    """Until the last one ends, where so many go on at a time and the next one begins as soon as one has ended."""
    ends = [0.0] * max(1, concurrent)
    for length in seconds:
        ends[ends.index(min(ends))] += length
    return max(ends)


TRAINING_FACTOR = 3
"""A backward pass costs two forward passes."""

GMACS_PER_S = 12.0
"""Multiply-accumulates / 1e9 that a CPU core trains in a second with layers of width 96: 821 images/s of the demo on two
cores (README)."""

EVALUATED_SETS = 2
"""Model sets of an evaluation that compute embeddings: trained and random weights."""

SCORE_START_S = 8.0
"""Seconds in which the process of a score starts on Ray: it imports torch and timm beside the stages. With GPUs every score
has one of its own."""

LATENCY_S = 2 * (0.2 + 0.6)
"""Seconds in which the latency of a depth is measured, at two batch sizes."""


def estimate_run(
    run: ResolvedRun,
    images: tuple[Source, Splits],
    layout: StageLayout,
    precision: Precision,
    cpus: float,
    times: StepTimes | None,
    evaluated_sets: int = EVALUATED_SETS,
) -> RunEstimate:
    """What a run will cost; for its memory see `block_memories`.

    Args:
        cpus: of the machine, or the share of it.
        times: of a probe; None: computed from the arithmetic with `GMACS_PER_S`.
        evaluated_sets: of models whose embeddings are computed at the end.
    """
    gmacs = block_gmacs(run)
    blocks = []
    for k, memory in enumerate(run_memories(run, precision)):
        with NoInitialization():
            module = build_local_mim(replace(run.spec, init_from=None), k, run.backbone)
        sizes = (num_params(module.encoder), num_params(module.decoder))
        blocks.append(BlockCost(run.spec.blocks[k], *sizes, *gmacs[k], memory))
    is_measured = times is not None and times.scale == 1
    times = times or computed_times(run, gmacs, layout)
    settings, phase = run.settings, run.phases[-1]
    micro_s = micro_batch_seconds(times, layout, settings.placement.backend, cpus, settings.data.workers)
    scores_s, evaluation_s = _measuring_seconds(run, images, times, gmacs, layout.gpus, evaluated_sets)
    memories = [block.memory for block in blocks]
    return RunEstimate(
        tuple(blocks),
        layout.stage_blocks,
        images_per_s=phase.batch_size / micro_s,
        epoch_s=epoch_seconds(run, micro_s),
        training_s=training_seconds(run, micro_s),
        scores_s=scores_s,
        evaluation_s=evaluation_s,
        checkpoint_bytes=checkpoint_bytes(memories, settings.checkpoint.keep, num_scores(settings) > 0),
        is_measured=is_measured,
        separate_ratio=separate_ratio(gmacs),
        gpus=layout.gpus * len(layout.stage_blocks),
    )


def block_gmacs(run: ResolvedRun) -> list[tuple[float, float]]:
    """(encoder, decoder) of every block: multiply-accumulates of the forward pass of one image / 1e9, in the last phase."""
    costs = block_gflops(replace(run.spec, init_from=None), run.backbone, run.phases[-1].size)
    return [(encoder / 2, decoder / 2) for encoder, decoder in costs]


def computed_times(
    run: ResolvedRun,
    gmacs: Sequence[tuple[float, float]],
    layout: StageLayout,
    gmacs_per_s: float = GMACS_PER_S,
    loading: float = 0.0,
) -> StepTimes:
    """Seconds of a micro-batch from its arithmetic alone.

    Args:
        gmacs: (encoder, decoder) of every block.
        loading: seconds in which an image is loaded.
    """
    batch = run.phases[-1].batch_size
    return StepTimes(
        tuple(
            TRAINING_FACTOR * batch * sum(sum(gmacs[k]) for k in blocks) / gmacs_per_s
            for blocks in layout.stage_blocks
        ),
        loading=loading * batch,
    )


def times_of_another(
    run: ResolvedRun, times: StepTimes | None, another: ResolvedRun, layout: StageLayout
) -> StepTimes:
    """Seconds of a micro-batch of `another` run on the same images, from those of `run`, by their arithmetic.

    Args:
        times: of `run`; None: computed with `GMACS_PER_S`.
        layout: of the other run.
    """
    if times is None:
        return computed_times(another, block_gmacs(another), layout)
    batch = run.phases[-1].batch_size
    trained = TRAINING_FACTOR * batch * sum(map(sum, block_gmacs(run)))
    rate = trained / sum(times.stages)
    return computed_times(another, block_gmacs(another), layout, rate, times.loading / batch)


def separate_ratio(gmacs: Sequence[tuple[float, float]]) -> float:
    """Multiply-accumulates of one end-to-end run per depth, each with the decoder of its last block, over those of this run.

    gmacs: (encoder, decoder) of every block.
    """
    encoders = [encoder for encoder, _ in gmacs]
    separate = sum(sum(encoders[: k + 1]) + decoder for k, (_, decoder) in enumerate(gmacs))
    return separate / sum(encoder + decoder for encoder, decoder in gmacs)


def _measuring_seconds(
    run: ResolvedRun,
    images: tuple[Source, Splits],
    times: StepTimes,
    gmacs: Sequence[tuple[float, float]],
    gpus: float,
    evaluated_sets: int,
) -> tuple[float, float]:
    """Seconds of the scores while it trains; of the evaluation: images decoded once, embedded by every set, latencies.

    kNN and probes come on top.
    """
    phase, (source, splits) = run.phases[-1], images
    if can_score(source, splits):
        measured = sum(min(len(split), MAX_IMAGES) for split in (splits.train, splits.test))
    else:
        measured = min(len(splits.train), RANKME_IMAGES)
    trained = TRAINING_FACTOR * sum(map(sum, gmacs)) * phase.batch_size
    seconds_per_gmac = sum(times.stages) / trained
    visible = 1 - max(run.spec.mask_ratios) if run.backbone.encode == "visible" else 1.0
    forward_gmacs = sum(encoder for encoder, _ in gmacs) / visible * (len(gmacs) + 1) / 2
    embedding_s, decoding_s = forward_gmacs * seconds_per_gmac, times.loading / phase.batch_size
    scored = min(
        len(splits.train) + len(splits.val), images_of_a_score(run.settings, run.phases, run.total_steps)
    )
    latency_s = LATENCY_S * len(run.depths) if run.settings.evaluation.latency else 0.0
    scores = num_scores(run.settings)
    processes = 0 if run.settings.placement.backend != "ray" else scores if gpus else min(scores, 1)
    scores_s = processes * SCORE_START_S + scores * scored * (embedding_s + decoding_s)
    return scores_s, measured * (evaluated_sets * embedding_s + decoding_s) + latency_s
