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
from bim.orchestrator.reporting.figures.reconstruction import Reconstructions, reconstruction_figure
from bim.orchestrator.reporting.figures.style import write_png
from bim.orchestrator.training.build import build_local_mim, mask_plans
from bim.orchestrator.training.spec import PretrainSpec

PICTURE_ROWS = 6


@torch.inference_mode()
def save_all_reconstructions(
    spec: PretrainSpec,
    backbone: Backbone,
    weights: Sequence[dict[str, Tensor]],
    inputs: EvalInputs,
    folder: Path,
    bad: dict[str, str],
) -> dict[int, str]:
    """One picture per block: test images masked, reconstructed by that block's decoder, and as they are.

    Args:
        weights: the whole `LocalMIM` state of every block.
        folder: where the pictures are written.
        bad: takes the images that cannot be read, by sample id, with the reason.

    Returns depth -> file; nothing if none of these images can be read.
    """
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
    x, paths = images, {}
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
        reconstructions = Reconstructions(
            original=_rgb(images, spec),
            predicted=_rgb(reconstruction, spec),
            masked=masked.cpu().numpy(),
            grid=plan.token_grid,
            target=None if is_pixels else _rgb(module.target.to_image(target, images), spec),
            thrown=thrown.cpu().numpy(),
        )
        title = f"depth {info.depth}: {count} of {math.prod(plan.token_grid)} patches predicted"
        figure = reconstruction_figure(reconstructions, title)
        paths[info.depth] = str(write_png(figure, folder / f"reconstruction_depth{info.depth:02d}.png"))
    return paths


def _all_tokens(predicted: Tensor, masked: Tensor, target: Tensor) -> Tensor:
    """(B, M, D) predictions of the tokens `masked` among the true values of the others: (B, N, D)."""
    index = masked.unsqueeze(-1).expand(-1, -1, target.shape[-1])
    return target.scatter(1, index, predicted.to(target.dtype))


def _rgb(images: Tensor, spec: PretrainSpec) -> np.ndarray:
    """(B, 3, H, W) normalized -> (B, H, W, 3) in 0..1."""
    return denormalize_images(images, spec.mean, spec.std).permute(0, 2, 3, 1).cpu().numpy()
