"""With one block, all tokens and a HOG target our model is FastMIM's ViT: against tensors computed with its authors'
implementation (tests/data/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bim.models.backbones import open_backbone
from bim.models.decoders.light import LightDecoder
from bim.models.local_mim import LocalMIM
from bim.models.masks.plan import MaskPlan, block_plans, visible_counts
from bim.models.targets import TARGETS
from bim.models.tokens import gather_tokens

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "fastmim_vit_tiny.safetensors"

# Our decoder's names -> FastMIM's.
DECODER_NAMES = {
    "norm": "norm",
    "embed": "decoder_embed",
    "layers": "decoder_blocks",
    "out_norm": "decoder_norm",
    "head": "decoder_pred",
}
PAINT = "stem.paint.colour"


def encoder_name(key: str) -> str:
    """Our block's name -> FastMIM's."""
    return "mask_token" if key == PAINT else key.removeprefix("stem.").replace("layers.", "blocks.")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def fastmim(golden: dict[str, Tensor]) -> LocalMIM:
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
    backbone = open_backbone("vit_tiny_patch16_224", 1, sizes, encode="all")
    encoder = backbone.build_block(0, seed=0)
    torch.testing.assert_close(
        encoder.state_dict()["stem.pos_embed"], golden["param.pos_embed"], rtol=0, atol=1e-6
    )
    decoder = LightDecoder(48, dim=32, depth=1, num_heads=1, out_dim=108, num_prefix_tokens=1)
    encoder.load_state_dict({key: golden["param." + encoder_name(key)] for key in encoder.state_dict()})
    decoder.load_state_dict(
        {
            key: golden["param." + DECODER_NAMES[key.partition(".")[0]] + "".join(key.partition(".")[1:])]
            for key in decoder.state_dict()
        }
    )
    return LocalMIM(encoder, decoder, TARGETS["hog"](16))


@pytest.fixture
def plan(golden: dict[str, Tensor]) -> MaskPlan:
    order = golden["noise"].argsort(dim=1, stable=True)
    return block_plans(order, (4, 4), visible_counts(16, [0.75]))[0]


def test_the_same_noise_masks_the_same_patches(golden: dict[str, Tensor], plan: MaskPlan) -> None:
    is_masked = torch.zeros(2, 16).scatter(1, plan.masked, 1.0)
    assert torch.equal(is_masked.view(2, 1, 4, 4), golden["mask"])


def test_loss_and_predictions_agree(golden: dict[str, Tensor], fastmim: LocalMIM, plan: MaskPlan) -> None:
    step = fastmim(golden["image"], golden["image"], plan)
    torch.testing.assert_close(step.loss, golden["loss"].squeeze(), rtol=0, atol=1e-5)
    expected = gather_tokens(golden["pred"], plan.masked)
    torch.testing.assert_close(fastmim.decoder(step.activations, plan), expected, rtol=0, atol=1e-5)


def test_gradients_of_the_patch_embedding_and_of_the_color_agree(
    golden: dict[str, Tensor], fastmim: LocalMIM, plan: MaskPlan
) -> None:
    fastmim(golden["image"], golden["image"], plan).loss.backward()
    ours = {encoder_name(key): value.grad for key, value in fastmim.encoder.named_parameters()}
    keys = [key for key in golden if key.startswith("grad.")]
    assert len(keys) == 2
    for key in keys:
        torch.testing.assert_close(ours[key.removeprefix("grad.")], golden[key], rtol=0, atol=1e-5)
