"""timm's pyramids made small by keywords, one of each family that is cut by name and one of another class; and the
comparison of a backbone that encodes visible tokens with timm's model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bim.models.backbones import DenseBackbone, open_backbone
from bim.models.backbones.backbone import Backbone
from bim.models.masks.plan import MaskPlan, random_permutation
from bim.models.seeding import generator
from bim.models.tokens import gather_tokens

SWIN = {"embed_dim": 12, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 3, 4], "window_size": 4}
# family -> (timm name, overrides); levels of 1, 2, 2 and 1 layers, a mask unit of 32 pixels.
PYRAMIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin v2": ("swinv2_tiny_window8_256", SWIN),
    "pvt": ("pvt_v2_b0", {"depths": [1, 2, 2, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 3, 4]}),
    "convnext": ("convnext_atto", {"depths": [1, 2, 2, 1], "dims": [8, 16, 24, 32]}),
    "resnet": ("resnet50", {"layers": [1, 2, 2, 1], "channels": [5, 8, 12, 16]}),
    "resnet v2": ("resnetv2_50", {"layers": [1, 2, 2, 1], "channels": [8, 16, 24, 32]}),
}


@pytest.fixture(params=PYRAMIDS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def tiny_pyramid() -> Callable[..., DenseBackbone]:
    """(family, blocks, **overrides) -> a pyramid for images of 64 x 64 pixels that encodes every token."""

    def build(family: str, blocks: Any = 2, **overrides: Any) -> DenseBackbone:
        name, args = PYRAMIDS[family]
        backbone = open_backbone(name, blocks, {"img_size": 64} | args | overrides, encode="all")
        assert isinstance(backbone, DenseBackbone)
        return backbone

    return build


@pytest.fixture
def check_levels() -> Callable[[Backbone], None]:
    """(a backbone of one block a level) -> nothing; its blocks give timm's maps of 224 x 224 pixels, nothing masked."""

    @torch.no_grad()
    def check(backbone: Backbone) -> None:
        blocks = [backbone.build_block(index, seed=0).eval() for index in range(4)]
        model: Any = backbone.variant(backbone.depths[-1], [block.state_dict() for block in blocks], None)
        x = images = torch.randn(1, 3, 224, 224, generator=generator("image"))
        features = model.forward_intermediates(images, indices=4, intermediates_only=True)
        order = random_permutation(1, 49, generator("order"))
        for info, block, feature in zip(backbone.blocks, blocks, features, strict=True):
            plan = MaskPlan((7, 7), order, 49, 49, order[:, 49:], order[:, 49:], 32 // info.stride)
            x = block(x, plan)
            expected = gather_tokens(feature.flatten(2).transpose(1, 2), plan.keep_tokens)
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)

    return check
