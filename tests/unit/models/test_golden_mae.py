"""With one block our model is MAE: against tensors computed with its authors' implementation
(tests/data/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bim.models.backbones import open_backbone
from bim.models.decoders.local import LocalDecoder
from bim.models.local_mim import LocalMIM
from bim.models.masks.plan import MaskPlan, block_plans, visible_counts
from bim.models.targets import PixelTarget
from bim.models.tokens import gather_tokens

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "mae_tiny.safetensors"

# Our decoder's names -> MAE's.
DECODER_NAMES = {
    "norm": "norm",
    "embed": "decoder_embed",
    "layers": "decoder_blocks",
    "out_norm": "decoder_norm",
    "head": "decoder_pred",
    "mask_token": "mask_token",
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def mae(golden: dict[str, Tensor]) -> LocalMIM:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
    backbone = open_backbone("vit_tiny_patch16_224", 1, sizes)
    encoder = backbone.build_block(0, seed=0)
    decoder = LocalDecoder(48, dim=32, depth=2, num_heads=4, out_dim=48, num_prefix_tokens=1)
    torch.testing.assert_close(
        encoder.state_dict()["stem.pos_embed"], golden["param.pos_embed"], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        decoder.positions(backbone.grid)[:64], golden["param.decoder_pos_embed"][0, 1:], rtol=0, atol=1e-6
    )
    encoder.load_state_dict(
        {
            key: golden["param." + key.removeprefix("stem.").replace("layers.", "blocks.")]
            for key in encoder.state_dict()
        }
    )
    decoder.load_state_dict(
        {
            key: golden["param." + DECODER_NAMES[key.partition(".")[0]] + "".join(key.partition(".")[1:])]
            for key in decoder.state_dict()
        }
    )
    return LocalMIM(encoder, decoder, PixelTarget(4))


@pytest.fixture
def plan(golden: dict[str, Tensor]) -> MaskPlan:
    order = golden["noise"].argsort(dim=1, stable=True)
    return block_plans(order, (8, 8), visible_counts(64, [0.75]))[0]


def test_the_same_noise_masks_the_same_patches(golden: dict[str, Tensor], plan: MaskPlan) -> None:
    is_masked = torch.zeros(3, 64).scatter(1, plan.masked, 1.0)
    assert torch.equal(is_masked, golden["mask"])


def test_loss_latent_and_predictions_agree(golden: dict[str, Tensor], mae: LocalMIM, plan: MaskPlan) -> None:
    step = mae(golden["image"], golden["image"], plan)
    torch.testing.assert_close(step.loss, golden["loss"].squeeze(), rtol=0, atol=1e-5)
    torch.testing.assert_close(mae.decoder.norm(step.activations), golden["latent"], rtol=0, atol=1e-5)
    expected = gather_tokens(golden["pred"], plan.masked)
    torch.testing.assert_close(mae.decoder(step.activations, plan), expected, rtol=0, atol=1e-5)


def test_gradients_agree(golden: dict[str, Tensor], mae: LocalMIM, plan: MaskPlan) -> None:
    mae(golden["image"], golden["image"], plan).loss.backward()
    parameters = dict(mae.encoder.named_parameters())
    compared = 0
    for key in golden:
        if not key.startswith("grad."):
            continue
        name = key.removeprefix("grad.").replace("blocks.", "layers.")
        ours = parameters[name if name in parameters else "stem." + name].grad
        torch.testing.assert_close(ours, golden[key], rtol=0, atol=1e-5)
        compared += 1
    assert compared == 2
