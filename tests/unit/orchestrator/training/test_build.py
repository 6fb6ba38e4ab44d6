from __future__ import annotations

import numpy as np
import pytest
import torch

from bim.models.tokens import normalize_images
from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.loader import eval_images
from bim.orchestrator.training.build import build_local_mim, mask_plans, open_spec_backbone
from bim.orchestrator.training.spec import DecoderSpec, PretrainSpec, TargetSpec


def test_a_new_hog_decoder_begins_near_its_target() -> None:
    spec = PretrainSpec(
        backbone="vit_tiny_patch16_224",
        model_args={"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 1, "num_heads": 3},
        blocks=(1,),
        mask_ratios=(0.75,),
        decoders=(DecoderSpec(1, 64, 2),),
        targets=(TargetSpec("hog", {"cell": 8}),),
    )
    _, pixels = next(iter(eval_images(DigitsSource(), np.arange(64), (32, 32), 64)))
    images = normalize_images(torch.from_numpy(pixels), spec.mean, spec.std)
    module = build_local_mim(spec, 0)
    plan = mask_plans(spec, open_spec_backbone(spec), (32, 32), 64, step=0, micro_step=0)[0]
    with torch.no_grad():
        loss = float(module(images, images, plan).loss)
    wanted = module.targets(images)
    assert loss == pytest.approx(float(wanted.var()), rel=0.5)
