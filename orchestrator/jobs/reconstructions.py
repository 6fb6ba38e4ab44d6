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
from bim.models.masks.plan import MaskPlan, partial_plan
from bim.models.seeding import generator
from bim.models.targets import PixelTarget, Target
from bim.models.tokens import denormalize_images
from bim.orchestrator.data.loader import BadImages, eval_images
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.reporting.figures.reconstruction import (
    Reconstructions,
    reconstruction_figure,
    reconstruction_grid,
)
from bim.orchestrator.reporting.figures.style import data_name, write_png
from bim.orchestrator.training.build import build_local_mim, mask_plans
from bim.orchestrator.training.spec import PretrainSpec

PICTURE_ROWS = 6

GRID = "reconstructions"
"""Name of the picture of all depths."""

BORROWED = "each patch is shown with the mean and the variance of the true patch, which are no part of what is predicted"


def save_all_reconstructions(
    spec: PretrainSpec,
    backbone: Backbone,
    weights: Sequence[dict[str, Tensor]],
    inputs: EvalInputs,
    folder: Path,
    bad: dict[str, str],
    title: str = "",
) -> dict[int, str]:
    """A picture of all depths, `reconstructions.png`, and one for every depth by itself, all of the same images.

    Args:
        weights: the whole `LocalMIM` state of every block.
        folder: where the pictures are written.
        bad: takes the images that cannot be read, by sample id, with the reason.
        title: of all pictures, to which the images are added.

    Returns depth -> file; nothing if none of these images can be read. Raises StorageError.
    """
    by_depth = reconstruct(spec, backbone, weights, inputs, bad)
    if not by_depth:
        return {}
    write_png(reconstruction_grid(by_depth, _title(title, by_depth, inputs)), folder / f"{GRID}.png")
    paths = {}
    for depth, images in by_depth.items():
        of_depth = _title(f"{title}, depth {depth}" if title else f"depth {depth}", {depth: images}, inputs)
        path = folder / f"reconstruction_depth{depth:02d}.png"
        paths[depth] = str(write_png(reconstruction_figure(images, of_depth), path))
    return paths


def save_reconstruction_grid(
    spec: PretrainSpec,
    backbone: Backbone,
    weights: Sequence[dict[str, Tensor]],
    inputs: EvalInputs,
    path: Path,
    bad: dict[str, str],
    title: str,
) -> bool:
    """The picture of all depths alone, of any checkpoint: the same images under the same mask at every call.

    Arguments as of `save_all_reconstructions`; path: of the picture. Returns whether any of the images can be read; only
    then is it written. Raises StorageError.
    """
    by_depth = reconstruct(spec, backbone, weights, inputs, bad)
    if by_depth:
        write_png(reconstruction_grid(by_depth, _title(title, by_depth, inputs)), path)
    return bool(by_depth)


@torch.inference_mode()
def reconstruct(
    spec: PretrainSpec,
    backbone: Backbone,
    weights: Sequence[dict[str, Tensor]],
    inputs: EvalInputs,
    bad: dict[str, str],
) -> dict[int, Reconstructions]:
    """Depth -> what the decoder of its block reconstructs of `picture_images`, under `picture_plans`.

    Nothing if none of these images can be read, which `bad` takes.
    """
    bad_images = BadImages()
    rows = picture_images(inputs)
    batches = list(eval_images(inputs.source, rows, inputs.size, len(rows), bad_images))
    bad.update(bad_images.reasons)
    if not batches:
        return {}
    device = inputs.device
    images = inputs.normalized(torch.from_numpy(batches[0][1]))
    plans = picture_plans(spec, backbone, inputs.size, len(images))
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
            borrowed_note=_borrowed_note(module.target),
        )
    return by_depth


def picture_plans(
    spec: PretrainSpec, backbone: Backbone, size: tuple[int, int], count: int
) -> dict[int, MaskPlan]:
    """Block -> mask plan of `count` images of `size` (height, width): the masks of the first step.

    They depend on the seed alone. What decoders throw is drawn for all blocks alike, unlike in the training: blocks with
    the same mask and the same grid that throw as many tokens throw the same ones, and one that throws more throws those of
    the others too. Each block still sees what it is trained with: as many tokens, chosen by its sampler.
    """
    whole = replace(spec, decoders=tuple(replace(decoder, throw_ratio=0.0) for decoder in spec.decoders))
    plans = mask_plans(whole, backbone, size, count, step=0, micro_step=0)
    return {
        k: partial_plan(plan, decoder.throw_ratio, decoder.sampler, generator(spec.seed, "decode", 0, 0, 0))
        for (k, plan), decoder in zip(plans.items(), spec.decoders, strict=True)
    }


def picture_images(inputs: EvalInputs) -> np.ndarray:
    """(n,) numbers of the images of all pictures, n at most `PICTURE_ROWS`: spread over the test split.

    Over the train split if no image is kept for tests. The same for every checkpoint of a run.
    """
    splits = inputs.splits
    candidates = splits.test if len(splits.test) else splits.train
    rows = np.linspace(0, len(candidates) - 1, num=min(PICTURE_ROWS, len(candidates))).astype(int)
    return candidates[rows]


def shown_images(inputs: EvalInputs, count: int) -> str:
    """`6 test images of digits`."""
    split = "test" if len(inputs.splits.test) else "training"
    return f"{count} {split} image{'s' * (count > 1)} of {data_name(inputs.source.name)}"


def _title(title: str, by_depth: dict[int, Reconstructions], inputs: EvalInputs) -> str:
    """The title with the images, how many of their patches are masked, and how many are predicted if that is fewer."""
    first = next(iter(by_depth.values()))
    predicted = _percentages(
        [images.masked.shape[1] / math.prod(images.grid) for images in by_depth.values()]
    )
    masked = _percentages(
        [
            (images.masked.shape[1] + (0 if images.thrown is None else images.thrown.shape[1]))
            / math.prod(images.grid)
            for images in by_depth.values()
        ]
    )
    fewer = f", {predicted} predicted and the rest thrown" if predicted != masked else ""
    images = f"{shown_images(inputs, len(first.original))}, {masked} of the patches masked{fewer}"
    return f"{title}: {images}" if title else images


def _percentages(values: Sequence[float]) -> str:
    """`75%`, or `60% to 75%` where depths differ."""
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low} to {high}"


def _borrowed_note(target: Target) -> str:
    return BORROWED if isinstance(target, PixelTarget) and target.normalize else ""


def _all_tokens(predicted: Tensor, masked: Tensor, target: Tensor) -> Tensor:
    """(B, M, D) predictions of the tokens `masked` among the true values of the others: (B, N, D)."""
    index = masked.unsqueeze(-1).expand(-1, -1, target.shape[-1])
    return target.scatter(1, index, predicted.to(target.dtype))


def _rgb(images: Tensor, spec: PretrainSpec) -> np.ndarray:
    """(B, 3, H, W) normalized -> (B, H, W, 3) in 0..1."""
    return denormalize_images(images, spec.mean, spec.std).permute(0, 2, 3, 1).cpu().numpy()
