"""The arguments of an evaluation of a checkpoint: a plain record, sent to the process that evaluates."""

from __future__ import annotations

from dataclasses import dataclass

from bim.orchestrator.config.transforms import recorded_mapping
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.export.model_card import CardFacts
from bim.orchestrator.runs.checkpoints import committed_folder
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.provenance import Provenance
from bim.orchestrator.runs.resolve import eval_config
from bim.orchestrator.text import redact
from bim.orchestrator.training.spec import PretrainSpec


@dataclass(frozen=True)
class EvaluationTask:
    """A checkpoint and how it is evaluated.

    Args:
        checkpoint: committed folder, or its URL.
        out: `variants/`, `decoders/` and `pictures/` are written below it.
        depths: cumulative layers of the variants; need not be block boundaries (a K = 1 run truncated).
        device: "cpu" or "cuda".
        threads: torch CPU threads at most, for honest latencies; None: as the process has them.
        with_baselines: also measure random starts and raw pixels.
        step: updates in the checkpoint.
    """

    spec: PretrainSpec
    data: DataSpec
    evaluation: EvalConfig
    checkpoint: str
    out: str
    depths: tuple[int, ...]
    card: CardFacts
    device: str = "cpu"
    threads: int | None = None
    with_baselines: bool = True
    step: int = 0


def evaluation_task(
    run: ResolvedRun,
    layout: StageLayout,
    provenance: Provenance,
    depths: tuple[int, ...],
    step: int,
    with_baselines: bool = True,
) -> EvaluationTask:
    """The evaluation of a trained run. step: of the checkpoint that is its result."""
    settings = run.settings
    return EvaluationTask(
        spec=run.spec,
        data=run.data,
        evaluation=eval_config(settings),
        checkpoint=str(committed_folder(run.out, step)),
        out=str(run.out),
        depths=depths,
        card=CardFacts(
            run=settings.name,
            seed=settings.seed,
            settings=recorded_mapping(settings),
            data=provenance.data,
            code=provenance.code,
            init_from=None if settings.init_from is None else redact(settings.init_from),
        ),
        device="cuda" if layout.gpus else "cpu",
        with_baselines=with_baselines,
        step=step,
    )
