"""What the forward passes of one training image cost a family: all blocks and all decoders, targets left out.

Serves the search, which sets quality against it, and the tables of `pipelines/benchmark.py`. Knows no Ray, MLflow or
pydantic. What one image costs a finished variant is in `cost.py`.
"""

from __future__ import annotations

import torch

from models.backbones.backbone import Backbone
from orchestrator.cost import counting_flops
from orchestrator.family_spec import FamilySpec, build_local_mim, plans_of_step


def forward_gflops(spec: FamilySpec, backbone: Backbone, size: tuple[int, int]) -> float:
    """GFLOPs (2 x multiply-accumulates / 1e9) for one image of `size` (height, width); see `block_gflops`."""
    return sum(encoder + decoder for encoder, decoder in block_gflops(spec, backbone, size))


def block_gflops(spec: FamilySpec, backbone: Backbone, size: tuple[int, int]) -> list[tuple[float, float]]:
    """(encoder, decoder) of every block, GFLOPs for one image of `size` (height, width).

    One grey image is really computed, since positions of other sizes than the backbone's own depend on the values of its
    table; a fraction of a second.
    """
    plans = plans_of_step(spec, backbone, size, batch=1, step=0, micro=0)
    x = torch.zeros(1, 3, *size)
    found = []
    with torch.no_grad():
        for k in range(len(spec.blocks)):
            module = build_local_mim(spec, k, backbone).eval()
            with counting_flops() as encoder:
                x = module.encoder(x, plans[k])
            with counting_flops() as decoder:
                module.decoder(x, plans[k])
            found.append((encoder.get_total_flops() / 1e9, decoder.get_total_flops() / 1e9))
    return found
