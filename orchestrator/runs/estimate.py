"""What a run will cost, before it starts: seconds of a step from a short probe, memory of every stage, disk.

The probe trains a few micro-batches in this process, on the images and with the blocks of the run, and leaves nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bim.models.initialization import NoInitialization
from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits, can_score
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.evaluation.evaluate import RANKME_IMAGES
from bim.orchestrator.evaluation.features import MAX_IMAGES
from bim.orchestrator.evaluation.model_cost import block_gflops, num_params
from bim.orchestrator.runs.depth_scores import images_of_a_score, num_scores
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.training.build import build_local_mim
from bim.orchestrator.training.device_errors import breaks_device_context
from bim.orchestrator.training.errors import StageFailure, TrainingError
from bim.orchestrator.training.memory import BlockMemory, block_memories
from bim.orchestrator.training.messages import StepRequest
from bim.orchestrator.training.spec import Precision, PretrainSpec
from bim.orchestrator.training.stage_group import InProcessStages

PROBE_S = 5.0
"""Seconds that a micro-batch of the probe may take, and all of them together after the first."""

MIN_PROBED = 3
"""Micro-batches that are timed, unless a single one takes longer than `PROBE_S`."""

RAY_CPU_S = 0.004
"""CPU seconds of a stage on Ray for a micro-batch, its share of the driver included (docs/benchmarks.md)."""

SHARED_FACTOR, SHARED_CPU_S = 1.16, 0.018
"""The same where stages and loader are more processes than there are CPUs: they slow one another down, and each spends more
beside its work. Four stages on two cores, width 96, took 265 ms of CPU time for 16 images of 64 px and 710 ms for 64, which
a single process trains in 152 ms and 540 ms."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one micro-batch, scaled to that of the run.

    Args:
        stages: of work in every stage.
        loading: of decoding and cropping, in one process.
        scale: images of the run's micro-batch over those of the probe; above 1 the times are extrapolated.
    """

    stages: tuple[float, ...]
    loading: float
    scale: float = 1.0


def probe_steps(
    run: ResolvedRun, images: tuple[Source, Splits], layout: StageLayout, precision: Precision
) -> StepTimes:
    """Train some micro-batches and time them; the largest that takes less than `PROBE_S`.

    Weights that `init_from` names are not read.
    """
    spec = replace(run.spec, init_from=None, optim=replace(run.spec.optim, precision=precision))
    phase, threads = run.phases[-1], torch.get_num_threads()
    device = "cuda" if layout.gpus and torch.cuda.is_available() else "cpu"
    try:
        times, batch = None, min(2, phase.batch_size)
        timed_batch = batch
        while True:
            try:
                times = _timed(run, images, layout, spec, device, batch)
            except StageFailure as error:
                if not breaks_device_context(error):
                    raise
                if times is None:
                    raise TrainingError(str(error)) from error
                break  # a smaller one tells enough
            timed_batch = batch
            step_s = sum(times.stages) + times.loading
            larger = min(phase.batch_size, max(2 * batch, int(batch * PROBE_S / (4 * max(step_s, 1e-6)))))
            if batch == phase.batch_size or step_s * larger / batch > PROBE_S:
                break
            batch = larger
    finally:
        torch.set_num_threads(threads)
        if device == "cuda":
            torch.cuda.empty_cache()  # the stages of the run start on the same device
    scale = phase.batch_size / timed_batch
    return StepTimes(tuple(scale * s for s in times.stages), scale * times.loading, scale)


def _timed(
    run: ResolvedRun,
    images: tuple[Source, Splits],
    layout: StageLayout,
    spec: PretrainSpec,
    device: str,
    batch: int,
) -> StepTimes:
    """Median seconds of micro-batches of `batch` images."""
    source, splits = images
    phase = replace(run.data.phases[-1], first_epoch=0, batch_size=batch, grad_accum_steps=1)

    def loader() -> TrainBatches:
        return replace(run.data, phases=(phase,), workers=0).batches_of(source, splits)

    stages = InProcessStages(spec, loader, layout.stage_blocks, device, layout.threads)
    reports = []
    try:
        stages.restore(None, 0, lambda: False)
        start = time.perf_counter()
        for step in range(1 + 4 * MIN_PROBED):
            report = stages.wait(stages.submit(StepRequest(step, lr=0.0)), PROBE_S)
            if device == "cuda":
                torch.cuda.synchronize()
            reports.append(report)
            elapsed = time.perf_counter() - start
            if elapsed > PROBE_S or (step >= MIN_PROBED and elapsed > PROBE_S / 5):
                break
    finally:
        stages.close()
    timed = reports[1:] or reports  # the first one allocates

    busy = tuple(
        statistics.median_high([r.stages[k].busy_s for r in timed]) for k in range(len(layout.stage_blocks))
    )
    return StepTimes(busy, statistics.median_high([r.load_s for r in timed]))


def micro_batch_seconds(
    times: StepTimes, layout: StageLayout, backend: str, cpus: int, workers: int
) -> float:
    """Seconds between two micro-batches of a run whose stages work at the same time as far as there is room.

    Args:
        cpus: of the machine; stages and loader share them.
        workers: processes that load; 0: one, beside the stages.
    """
    stages, loading = sum(times.stages), times.loading
    if backend == "in_process":
        return stages + (loading / workers if workers else loading)
    slowest = max(*times.stages, loading / max(1, workers))
    if layout.gpus:
        return slowest + RAY_CPU_S
    processes = len(times.stages) + max(1, workers)
    work = layout.threads * stages + loading
    if processes > cpus:
        work = SHARED_FACTOR * work + SHARED_CPU_S * processes
    else:
        work += RAY_CPU_S * len(times.stages)
    return max(slowest + RAY_CPU_S, work / cpus)


def epoch_seconds(run: ResolvedRun, micro_batch_s: float) -> float:
    """Seconds of an epoch of the last phase."""
    phase = run.phases[-1]
    return micro_batch_s * phase.steps_per_epoch * phase.grad_accum_steps


def training_seconds(run: ResolvedRun, micro_batch_s: float) -> float:
    """Seconds of all epochs. Earlier phases, of smaller images, count by their numbers of pixels."""
    last, epochs, total = run.phases[-1], run.settings.schedule.epochs, 0.0
    ends = [*(phase.first_epoch for phase in run.phases[1:]), epochs]
    for phase, end in zip(run.phases, ends, strict=True):
        pixels = phase.size[0] * phase.size[1] * phase.batch_size
        relative = pixels / (last.size[0] * last.size[1] * last.batch_size)
        micro_batches = (end - phase.first_epoch) * phase.steps_per_epoch * phase.grad_accum_steps
        total += micro_batches * micro_batch_s * relative
    return total


def run_memories(run: ResolvedRun, precision: Precision) -> list[BlockMemory]:
    """The memory of every block in the phase with the most pixels in a micro-batch."""
    phase = max(run.phases, key=lambda p: p.batch_size * p.size[0] * p.size[1])
    return block_memories(run.spec, run.backbone, phase.size, phase.batch_size, precision)


def checkpoint_bytes(memories: list[BlockMemory], keep: int) -> int:
    """Disk that checkpoints take: weights and optimizer of those that are kept and of the one in the making."""
    return (keep + 1) * sum(block.parameters + block.optimizer for block in memories)


@dataclass(frozen=True)
class BlockCost:
    """One block of a run: what it computes for an image, and what it holds while a micro-batch is trained.

    Args:
        encoder_gmacs, decoder_gmacs: multiply-accumulates of the forward pass of one image / 1e9.
    """

    layers: int
    encoder_params: int
    decoder_params: int
    encoder_gmacs: float
    decoder_gmacs: float
    memory: BlockMemory


@dataclass(frozen=True)
class RunEstimate:
    """What a run costs on this machine.

    Args:
        blocks: of the whole run, in their order.
        stages: the blocks of each stage.
        images_per_s: of the training in its last phase.
        is_measured: whether times were measured with micro-batches of the size of the run.
        evaluation_s: of the depth variants and of the models that they are compared with.
        separate_ratio: multiply-accumulates of one end-to-end run for each depth, with the same decoder, over those of this
            run.
    """

    blocks: tuple[BlockCost, ...]
    stages: tuple[tuple[int, ...], ...]
    images_per_s: float
    epoch_s: float
    training_s: float
    evaluation_s: float
    checkpoint_bytes: int
    is_measured: bool
    separate_ratio: float

    def stage_bytes(self, stage: int) -> int:
        """Of a stage: all that its blocks keep, and the activations of the block that saves most.

        Each block is trained to the end of its backward pass before the next one begins.
        """
        memories = [self.blocks[k].memory for k in self.stages[stage]]
        kept = sum(memory.total - memory.activations for memory in memories)
        return kept + max(memory.activations for memory in memories)


TRAINING_FACTOR = 3
"""A backward pass costs two forward passes."""

GMACS_PER_S = 12.0
"""Multiply-accumulates / 1e9 that a CPU core trains in a second with layers of width 96: 821 images/s of the demo on two
cores (README)."""

EVALUATED_SETS = 2
"""Model sets of an evaluation that compute embeddings: trained and random weights."""

SCORE_START_S = 8.0
"""Seconds in which the process of a score starts on Ray: it imports torch and timm beside the stages."""

LATENCY_S = 2 * (0.2 + 0.6)
"""Seconds in which the latency of a depth is measured, at two batch sizes."""


def estimate_run(
    run: ResolvedRun,
    images: tuple[Source, Splits],
    layout: StageLayout,
    precision: Precision,
    cpus: int,
    is_probed: bool = True,
) -> RunEstimate:
    """Probe a run and compute what it will cost; see `probe_steps` and `block_memories`.

    is_probed: False: its times are computed with `GMACS_PER_S`.
    """
    costs = block_gflops(replace(run.spec, init_from=None), run.backbone, run.phases[-1].size)
    gmacs = [(encoder / 2, decoder / 2) for encoder, decoder in costs]
    blocks = []
    for k, memory in enumerate(run_memories(run, precision)):
        with NoInitialization():
            module = build_local_mim(replace(run.spec, init_from=None), k, run.backbone)
        sizes = (num_params(module.encoder), num_params(module.decoder))
        blocks.append(BlockCost(run.spec.blocks[k], *sizes, *gmacs[k], memory))
    times = probe_steps(run, images, layout, precision) if is_probed else computed_times(run, gmacs, layout)
    settings, phase = run.settings, run.phases[-1]
    micro_s = micro_batch_seconds(times, layout, settings.placement.backend, cpus, settings.data.workers)
    memories = [block.memory for block in blocks]
    return RunEstimate(
        tuple(blocks),
        layout.stage_blocks,
        images_per_s=phase.batch_size / micro_s,
        epoch_s=epoch_seconds(run, micro_s),
        training_s=training_seconds(run, micro_s),
        evaluation_s=_evaluation_seconds(run, images, times, gmacs),
        checkpoint_bytes=checkpoint_bytes(memories, settings.checkpoint.keep),
        is_measured=is_probed and times.scale == 1,
        separate_ratio=separate_ratio(gmacs),
    )


def computed_times(run: ResolvedRun, gmacs: Sequence[tuple[float, float]], layout: StageLayout) -> StepTimes:
    """Seconds of a micro-batch from its arithmetic alone, without loading.

    gmacs: (encoder, decoder) of every block.
    """
    batch = run.phases[-1].batch_size
    return StepTimes(
        tuple(
            TRAINING_FACTOR * batch * sum(sum(gmacs[k]) for k in blocks) / GMACS_PER_S
            for blocks in layout.stage_blocks
        ),
        loading=0.0,
    )


def separate_ratio(gmacs: Sequence[tuple[float, float]]) -> float:
    """Multiply-accumulates of one end-to-end run per depth, each with the decoder of its last block, over those of this run.

    gmacs: (encoder, decoder) of every block.
    """
    encoders = [encoder for encoder, _ in gmacs]
    separate = sum(sum(encoders[: k + 1]) + decoder for k, (_, decoder) in enumerate(gmacs))
    return separate / sum(encoder + decoder for encoder, decoder in gmacs)


def _evaluation_seconds(
    run: ResolvedRun,
    images: tuple[Source, Splits],
    times: StepTimes,
    gmacs: Sequence[tuple[float, float]],
) -> float:
    """Training and test images decoded once and embedded by every set, those of the scores while it trains, and latencies.

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
    start_s = SCORE_START_S if run.settings.placement.backend == "ray" else 0.0
    while_training_s = num_scores(run.settings) * (start_s + scored * (embedding_s + decoding_s))
    return measured * (EVALUATED_SETS * embedding_s + decoding_s) + while_training_s + latency_s
