"""On visible tokens our Swin is GreenMIM's: against tensors computed with its authors' implementation
(tests/data/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from bim.models.backbones import SwinBackbone, open_backbone
from bim.models.masks.plan import MaskPlan, block_plans

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "green_swin_tiny.safetensors"
SIZES = {
    "img_size": 128,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2, 2, 2, 2],
    "num_heads": [1, 2, 4, 8],
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def weights(golden: dict[str, Tensor], tmp_path: Path) -> Path:
    """The reference's weights by timm's names, as timm itself converts them."""
    original = {
        key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")
    }
    whole = open_backbone("swin_tiny_patch4_window7_224", 1, SIZES)
    blocks = [whole.build_block(0, seed=0).state_dict()]
    converted = checkpoint_filter_fn(original, whole.variant(8, blocks, None))
    save_file({key: value.contiguous() for key, value in converted.items()}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def encoded(
    golden: dict[str, Tensor], weights: Path, blocks: int, reverse: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Parameters by timm's names, and the tokens after the final norm; units travel row by row, or the other way round."""
    backbone = open_backbone("swin_tiny_patch4_window7_224", blocks, SIZES)
    assert isinstance(backbone, SwinBackbone)
    order = golden["mask"].argsort(dim=1, stable=True).repeat(2, 1)
    order = torch.cat([order[:, :4].flip(1), order[:, 4:]], dim=1) if reverse else order
    scales = [backbone.mask_unit_px // info.stride for info in backbone.blocks]
    plans: list[MaskPlan] = list(block_plans(order, (4, 4), [4] * blocks, scales, True))
    x, parameters = golden["image"], {}
    for index, plan in enumerate(plans):
        block = backbone.build_block(index, 0, str(weights))
        parameters |= {key.removeprefix("parts."): value for key, value in block.named_parameters()}
        x = block(x, plan)
    norm = nn.LayerNorm(128, eps=backbone.norm_eps)
    norm.load_state_dict({key: golden[f"param.norm.{key}"] for key in ("weight", "bias")})
    return parameters, norm(x)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
def test_latent_and_gradients_agree(
    blocks: int, reverse: bool, golden: dict[str, Tensor], weights: Path
) -> None:
    parameters, latent = encoded(golden, weights, blocks, reverse)
    latent = latent.flip(1) if reverse else latent
    torch.testing.assert_close(latent, golden["latent"], rtol=0, atol=1e-4)
    (latent * golden["cotangent"]).sum().backward()
    keys = [key.removeprefix("grad.") for key in golden if key.startswith("grad.")]
    assert len(keys) == 3
    for key in keys:
        torch.testing.assert_close(parameters[key].grad, golden[f"grad.{key}"], rtol=0, atol=1e-4)
