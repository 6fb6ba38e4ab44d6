"""Pictures of what the decoders of a checkpoint reconstruct."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bim.models.backbones.backbone import Backbone
from bim.models.tokens import denormalize_images
from bim.orchestrator.data.loader import BadImages, eval_images
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.reporting.figures.reconstruction import (
    Reconstructions,
    reconstruction_figure,
    reconstruction_grid,
)
from bim.orchestrator.reporting.figures.style import write_png
from bim.orchestrator.training.build import build_local_mim, mask_plans
from bim.orchestrator.training.spec import PretrainSpec

PICTURE_ROWS = 6


LENT_STATISTICS = "patches are shown with the true patch's mean and deviation"
"""What the title says where the target is normalized by patch: the prediction alone has neither."""


def save_all_reconstructions(
    spec: PretrainSpec,
    backbone: Backbone,
    weights: Sequence[dict[str, Tensor]],
    inputs: EvalInputs,
    folder: Path,
    bad: dict[str, str],
    title: str = "",
) -> dict[int, str]:
    """One picture per block: test images masked, reconstructed by that block's decoder, and as they are; and one of all.

    Args:
        weights: the whole `LocalMIM` state of every block.
        folder: where the pictures are written.
        bad: takes the images that cannot be read, by sample id, with the reason.
        title: of the picture of all blocks, `reconstructions.png`.

    Returns depth -> file of its own picture; nothing if none of these images can be read.
    """
    by_depth = _reconstructions(spec, backbone, weights, inputs, bad)
    paths = {}
    for depth, images in by_depth.items():
        text = f"depth {depth}: {images.masked.shape[1]} of {math.prod(images.grid)} patches predicted"
        figure = reconstruction_figure(images, text)
        paths[depth] = str(write_png(figure, folder / f"reconstruction_depth{depth:02d}.png"))
    if by_depth:
        _save_grid(spec, by_depth, folder / "reconstructions.png", title)
    return paths


def save_reconstruction_grid(
    spec: PretrainSpec,
    backbone: Backbone,
    weights: Sequence[dict[str, Tensor]],
    inputs: EvalInputs,
    path: Path,
    bad: dict[str, str],
    title: str = "",
) -> None:
    """One picture of what every block reconstructs of the same images under the same mask, whenever it is made.

    Args:
        path: of the picture; not written if none of the images can be read.
    """
    by_depth = _reconstructions(spec, backbone, weights, inputs, bad)
    if by_depth:
        _save_grid(spec, by_depth, path, title)


def _save_grid(spec: PretrainSpec, by_depth: dict[int, Reconstructions], path: Path, title: str) -> None:
    images = by_depth[min(by_depth)]
    lines = [title] if title else []
    if images.target is None and _is_normalized(spec):
        lines.append(LENT_STATISTICS)
    write_png(reconstruction_grid(by_depth, "\n".join(lines)), path)


def _is_normalized(spec: PretrainSpec) -> bool:
    return not spec.targets or bool(spec.targets[0].args.get("normalize", True))


@torch.inference_mode()
def _reconstructions(
    spec: PretrainSpec,
    backbone: Backbone,
    weights: Sequence[dict[str, Tensor]],
    inputs: EvalInputs,
    bad: dict[str, str],
) -> dict[int, Reconstructions]:
    """Depth -> what the decoder of its block predicts of `PICTURE_ROWS` test images, masked as in the first step."""
    splits, device = inputs.splits, inputs.device
    candidates = splits.test if len(splits.test) else splits.train
    rows = np.linspace(0, len(candidates) - 1, num=min(PICTURE_ROWS, len(candidates))).astype(int)
    met = BadImages()
    batches = list(eval_images(inputs.source, candidates[rows], inputs.size, len(rows), met))
    bad.update(met.reasons)
    if not batches:
        return {}
    _, pixels = batches[0]
    images = inputs.normalized(torch.from_numpy(pixels))
    plans = mask_plans(spec, backbone, inputs.size, len(images), step=0, micro_step=0)
    x, by_depth = images, {}
    for k, info in enumerate(backbone.blocks):
        plan = plans[k].to(device)
        module = build_local_mim(replace(spec, init_from=None), k, backbone)
        module.load_state_dict(weights[k])
        module.to(device).eval()
        x = module.encoder(x, plan)
        predicted = module.decoder(x, plan)
        # A decoder without recovery predicts nothing of the thrown tokens, which are the last of the masked.
        count = predicted.shape[1]
        masked, thrown = plan.masked[:, :count], plan.masked[:, count:]
        target = module.target(images)
        reconstruction = module.target.to_image(_all_tokens(predicted, masked, target), images)
        is_pixels = not spec.targets or spec.targets[k].name == "pixels"
        by_depth[info.depth] = Reconstructions(
            original=_rgb(images, spec),
            predicted=_rgb(reconstruction, spec),
            masked=masked.cpu().numpy(),
            grid=plan.token_grid,
            target=None if is_pixels else _rgb(module.target.to_image(target, images), spec),
            thrown=thrown.cpu().numpy(),
        )
    return by_depth


def _all_tokens(predicted: Tensor, masked: Tensor, target: Tensor) -> Tensor:
    """(B, M, D) predictions of the tokens `masked` among the true values of the others: (B, N, D)."""
    index = masked.unsqueeze(-1).expand(-1, -1, target.shape[-1])
    return target.scatter(1, index, predicted.to(target.dtype))


def _rgb(images: Tensor, spec: PretrainSpec) -> np.ndarray:
    """(B, 3, H, W) normalized -> (B, H, W, 3) in 0..1."""
    return denormalize_images(images, spec.mean, spec.std).permute(0, 2, 3, 1).cpu().numpy()
