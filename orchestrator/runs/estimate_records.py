"""What a run costs with what comes before and after it: plain records."""

from __future__ import annotations

from dataclasses import dataclass

from bim.orchestrator.training.memory import BlockMemory


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
        scores_s: of the depths scored while they train.
        evaluation_s: of the depth variants at the end, and of the models that they are compared with.
        separate_ratio: multiply-accumulates of one end-to-end run for each depth, with the same decoder, over those of this
            run.
        gpus: of all stages.
    """

    blocks: tuple[BlockCost, ...]
    stages: tuple[tuple[int, ...], ...]
    images_per_s: float
    epoch_s: float
    training_s: float
    scores_s: float
    evaluation_s: float
    checkpoint_bytes: int
    is_measured: bool
    separate_ratio: float
    gpus: float

    @property
    def total_s(self) -> float:
        """Seconds from the first step to the last measurement."""
        return self.training_s + self.scores_s + self.evaluation_s

    def stage_bytes(self, stage: int) -> int:
        """Of a stage: all that its blocks keep, and the activations of the block that saves most.

        Each block is trained to the end of its backward pass before the next one begins.
        """
        memories = [self.blocks[k].memory for k in self.stages[stage]]
        lasting = sum(memory.total - memory.activations for memory in memories)
        return lasting + max(memory.activations for memory in memories)


@dataclass(frozen=True)
class SearchEstimate:
    """What the trials cost that come before a run.

    Args:
        trials, epochs: how many, and of one that is not ended early.
        expected_s: where ASHA ends what it can at the first rung.
        longest_s: where it ends none.
        gpus: of all trials that train at a time.
    """

    trials: int
    epochs: int
    expected_s: float
    longest_s: float
    gpus: float


@dataclass(frozen=True)
class BackboneEstimate:
    """A run with what comes before and after it.

    Args:
        baseline: the end-to-end MAE run beside it.
    """

    run: RunEstimate
    baseline: RunEstimate | None = None
    search: SearchEstimate | None = None

    @property
    def runs(self) -> tuple[RunEstimate, ...]:
        return (self.run,) if self.baseline is None else (self.run, self.baseline)

    @property
    def total_s(self) -> float:
        """Seconds from the beginning to the last measurement."""
        search_s = 0.0 if self.search is None else self.search.expected_s
        return search_s + sum(run.total_s for run in self.runs)

    @property
    def gpu_hours(self) -> float:
        seconds = 0.0 if self.search is None else self.search.gpus * self.search.expected_s
        return (seconds + sum(run.gpus * run.total_s for run in self.runs)) / 3600

    @property
    def checkpoint_bytes(self) -> int:
        return sum(run.checkpoint_bytes for run in self.runs)
