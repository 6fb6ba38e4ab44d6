"""The HOG target is FastMIM's: against tensors computed with its authors' layer (tests/data/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bim.models.targets import HogTarget

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "hog.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ["32", "64", "photo"])
@pytest.mark.parametrize(("normalize", "suffix"), [(True, "l2norm"), (False, "raw")])
def test_every_value_of_every_cell_agrees(
    golden: dict[str, Tensor], name: str, normalize: bool, suffix: str, device: str
) -> None:
    found = HogTarget(16, normalize=normalize).cells(golden[f"image_{name}"].to(device)).cpu()
    expected = golden[f"hog_{name}_{suffix}"]
    # Sums of up to 64 magnitudes: their last bits depend on the order. The largest is about 421.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if normalize else 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_token_holds_its_cells_in_the_reference_channel_by_channel(golden: dict[str, Tensor]) -> None:
    expected = golden["hog_photo_l2norm"]
    tokens = HogTarget(16)(golden["image_photo"]).view(1, 8, 8, 27, 2, 2)
    torch.testing.assert_close(tokens[0, 3, 5], expected[0, :, 6:8, 10:12], rtol=0, atol=1e-5)
