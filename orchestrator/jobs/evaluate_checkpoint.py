"""What a finished checkpoint is worth: every depth variant built, exported, measured, pictured, beside its random start.

One function that runs where a GPU is and returns plain records; the driver does the telling. Knows no Ray and no MLflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bim.models.backbones.backbone import Backbone
from bim.models.tokens import normalize_images
from bim.orchestrator.data.loader import eval_images
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.evaluate import evaluate_variants, raw_pixels
from bim.orchestrator.evaluation.model_cost import device_name, latencies_ms
from bim.orchestrator.evaluation.records import DepthReport, EvalConfig, EvaluationResult
from bim.orchestrator.export.model_card import CardFacts
from bim.orchestrator.export.timm_folder import export_decoder, export_variant, folder_name, rewrite_card
from bim.orchestrator.reporting.figures.reconstruction import save_reconstructions
from bim.orchestrator.training.build import build_local_mim, mask_plans, open_spec_backbone
from bim.orchestrator.training.checkpoint import load_block_weights
from bim.orchestrator.training.depth_variants import random_variants, trained_variant
from bim.orchestrator.training.spec import PretrainSpec

PICTURE_ROWS = 6


@dataclass(frozen=True)
class EvaluationTask:
    """A checkpoint and what to make of it.

    Args:
        checkpoint: committed folder.
        out: `variants/`, `decoders/` and `pictures/` are written below it.
        depths: cumulative layers of the variants; need not be block boundaries (a K = 1 run truncated).
        device: "cpu" or "cuda".
        threads: torch CPU threads, for honest latencies.
        references: also measure random starts and raw pixels.
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
    references: bool = True


def evaluate_checkpoint(job: EvaluationTask) -> EvaluationResult:
    """Export, measure and picture every depth variant of a checkpoint."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    backbone = open_spec_backbone(job.spec)
    source, splits = job.data.open()
    weights = [load_block_weights(Path(job.checkpoint), k) for k in range(len(job.spec.blocks))]
    variants = {depth: trained_variant(backbone, weights, depth) for depth in job.depths}
    measured = _measure(job, backbone, source, splits, variants, device)
    random: tuple[DepthReport, ...] = ()
    raw: dict[str, float] = {}
    if job.references:
        random = _measure(
            job,
            backbone,
            source,
            splits,
            random_variants(job.spec, backbone, job.depths),
            device,
            add_latency=False,
        )
        if source.labels is not None:
            raw = raw_pixels(source, splits, backbone.image_size, job.evaluation, device).metrics()
    folders = _export(job, backbone, variants, measured, random, raw)
    for k, state in enumerate(weights):
        decoder = {
            name.removeprefix("decoder."): value
            for name, value in state.items()
            if name.startswith("decoder.")
        }
        export_decoder(decoder, Path(job.out) / "decoders" / f"block-{k}.safetensors")
    return EvaluationResult(
        measured, random, raw, folders, _reconstructions(job, backbone, weights, source, splits, device)
    )


def add_latency(job: EvaluationTask, found: EvaluationResult) -> EvaluationResult:
    """The same with latencies, measured now, and on the model cards: for what was assessed beside other work.

    found: what `evaluate_checkpoint` made of the same job.
    """
    device, backbone = torch.device(job.device), open_spec_backbone(job.spec)
    weights = [load_block_weights(Path(job.checkpoint), k) for k in range(len(job.spec.blocks))]
    variants = {
        depth: trained_variant(backbone, weights, depth).to(device).eval() for depth in sorted(job.depths)
    }
    ones, many = (latencies_ms(variants, backbone.image_size, batch, device) for batch in (1, 64))
    reports = tuple(
        replace(
            report,
            latency_ms_b1=ones[report.depth],
            latency_ms_b64=many[report.depth],
            device=device_name(device),
        )
        for report in found.reports
    )
    for (
        depth,
        folder,
    ) in found.folders.items():  # the weights there have what was gathered of the images since
        rewrite_card(backbone, depth, Path(folder), job.card, reports, found.random, found.raw)
    return replace(found, reports=reports)


def _export(
    job: EvaluationTask,
    backbone: Backbone,
    variants: dict[int, nn.Module],
    measured: tuple[DepthReport, ...],
    random: tuple[DepthReport, ...],
    raw: dict[str, float],
) -> dict[int, str]:
    """A timm folder for every variant, with its card; depth -> folder."""
    folders = {}
    for report in measured:
        folder = Path(job.out) / "variants" / folder_name(report.depth)
        export_variant(
            backbone, report.depth, variants[report.depth], folder, job.card, measured, random, raw
        )
        folders[report.depth] = str(folder)
    return folders


def _measure(
    job: EvaluationTask,
    backbone: Backbone,
    source: Source,
    splits: Splits,
    variants: dict[int, nn.Module],
    device: torch.device,
    add_latency: bool = True,
) -> tuple[DepthReport, ...]:
    return tuple(
        evaluate_variants(
            variants,
            source,
            splits,
            backbone.image_size,
            mean=job.spec.mean,
            std=job.spec.std,
            device=device,
            config=replace(job.evaluation, latency=job.evaluation.latency and add_latency),
        )
    )


@torch.inference_mode()
def _reconstructions(
    job: EvaluationTask,
    backbone: Backbone,
    weights: list[dict[str, Tensor]],
    source: Source,
    splits: Splits,
    device: torch.device,
) -> dict[int, str]:
    """One picture per block: test images masked, reconstructed by that block's decoder, and as they are."""
    shown = splits.test if len(splits.test) else splits.train
    chosen = shown[np.linspace(0, len(shown) - 1, num=min(PICTURE_ROWS, len(shown))).astype(int)]
    _, pixels = next(iter(eval_images(source, chosen, backbone.image_size, len(chosen))))
    images = normalize_images(torch.from_numpy(pixels).to(device), job.spec.mean, job.spec.std)
    plans = mask_plans(job.spec, backbone, backbone.image_size, len(images), step=0, micro=0)
    x, paths = images, {}
    is_pixels = [target.name == "pixels" for target in job.spec.targets] or [True] * len(job.spec.blocks)
    for k, info in enumerate(backbone.blocks):
        plan = plans[k].to(device)
        module = build_local_mim(job.spec, k, backbone)
        module.load_state_dict(weights[k])
        module.to(device).eval()
        x = module.encoder(x, plan)
        found = module.decoder(x, plan)
        count = found.shape[
            1
        ]  # without recovery a decoder says nothing of thrown tokens, the last of the masked
        masked, thrown = plan.masked[:, :count], plan.masked[:, count:]
        wanted = module.target(images)
        predicted = module.target.to_image(_all_tokens(found, masked, wanted), images)
        path = Path(job.out) / "pictures" / f"reconstruction_depth{info.depth:02d}.png"
        save_reconstructions(
            path,
            original=_visible_range(images, job.spec),
            predicted=_visible_range(predicted, job.spec),
            masked=masked.cpu().numpy(),
            grid=plan.token_grid,
            wanted=None if is_pixels[k] else _visible_range(module.target.to_image(wanted, images), job.spec),
            title=f"depth {info.depth}: {count} of {math.prod(plan.token_grid)} patches predicted",
            thrown=thrown.cpu().numpy(),
        )
        paths[info.depth] = str(path)
    return paths


def _all_tokens(predicted: Tensor, masked: Tensor, target: Tensor) -> Tensor:
    """(B, M, D) predictions of the tokens `masked` among the true values of the others: (B, N, D)."""
    index = masked.unsqueeze(-1).expand(-1, -1, target.shape[-1])
    return target.scatter(1, index, predicted.to(target.dtype))


def _visible_range(images: Tensor, spec: PretrainSpec) -> np.ndarray:
    """(B, 3, H, W) normalised -> (B, H, W, 3) in [0, 1]."""
    mean = torch.tensor(spec.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(1, 3, 1, 1)
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
