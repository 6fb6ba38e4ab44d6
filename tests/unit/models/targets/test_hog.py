from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from bim.models.seeding import generator
from bim.models.targets import TARGETS
from bim.models.targets.hog import HogTarget, strokes
from bim.models.tokens import normalize_images

LADDER = (4, 8, 16, 32)


def images(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width, generator=generator("hog"))


def ramp(degrees: float, side: int = 32) -> Tensor:
    """(1, 3, side, side): brightness that rises in that direction, 0 to the right, 90 downward."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle = math.radians(degrees)
    return (x * math.cos(angle) + y * math.sin(angle)).expand(1, 3, side, side)


@pytest.mark.parametrize(
    ("degrees", "index"),
    [(0, 4), (20, 3), (40, 2), (60, 1), (80, 0), (100, 8), (120, 7), (140, 6), (160, 5), (180, 4), (200, 3)],
)
def test_the_direction_of_a_ramp_decides_its_bin(degrees: float, index: int) -> None:
    inner = HogTarget(8).cells(ramp(degrees)).view(3, 9, 4, 4)[:, :, 1:-1, 1:-1]
    expected = torch.zeros_like(inner)
    expected[:, index] = 1.0
    torch.testing.assert_close(inner, expected)


def test_brightness_that_rises_up_or_down_exactly_is_in_the_first_bin() -> None:
    """Both lie on the border of two bins, and atan2 gives 0 for the one and pi for the other."""
    downward = torch.arange(32.0).view(1, 1, 32, 1).expand(1, 3, 32, 32)
    for image in (downward, -downward):
        inner = HogTarget(8).cells(image).view(3, 9, 4, 4)[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(inner[:, 0], torch.ones_like(inner[:, 0]))


def test_a_ramps_cell_sums_its_pixels_gradients() -> None:
    """Sobel's weights make a slope of 1 per pixel a gradient of 8; 64 pixels in a cell."""
    inner = HogTarget(8, normalize=False).cells(ramp(0)).view(3, 9, 4, 4)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner[:, 4], torch.full_like(inner[:, 4], 8.0 * 64))


def test_gradients_are_sobels_over_reflected_edges_put_into_hard_bins() -> None:
    """FastMIM's definition (arXiv 2212.06593) in float64, pixel by pixel; noise has no gradient on a border of two bins."""
    image = images(8, 16)[:1]
    expected = torch.zeros(3, 9, 2, 4, dtype=torch.float64)

    def mirrored(i: int, size: int) -> int:
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    for color in range(3):
        for y in range(8):
            for x in range(16):

                def at(dy: int, dx: int, y: int = y, x: int = x, color: int = color) -> float:
                    return image[0, color, mirrored(y + dy, 8), mirrored(x + dx, 16)].item()

                gx = sum(w * (at(d, -1) - at(d, 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
                gy = sum(w * (at(-1, d) - at(1, d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
                index = math.floor(9 * math.atan2(gx, gy) / math.pi) % 9
                expected[color, index, y // 4, x // 4] += math.hypot(gx, gy)
    found = HogTarget(4, cell=4, normalize=False).cells(image)
    torch.testing.assert_close(found.view(3, 9, 2, 4), expected.float())


@pytest.mark.parametrize(("unit", "cell", "width"), [(16, 8, 108), (32, 8, 432), (16, 4, 432), (16, 16, 27)])
def test_a_token_has_the_papers_number_of_values(unit: int, cell: int, width: int) -> None:
    target = HogTarget(unit, cell)
    assert target.out_dim == width
    assert target(images()).shape == (2, (64 // unit) * (96 // unit), width)


def test_every_color_of_every_cell_has_length_one() -> None:
    for cell in LADDER:
        lengths = HogTarget(32, cell).cells(images()).unflatten(1, (3, 9)).norm(dim=2)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("normalize", [True, False])
def test_flat_images_of_every_gray_level_have_zeros_only(normalize: bool) -> None:
    """Rounding leaves something of two thirds of these levels, which the norm would make as long as an edge."""
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(-1, 3, 16, 16)
    flat = normalize_images(levels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert HogTarget(16, normalize=normalize)(flat).abs().max() == 0


def test_one_gray_level_in_a_flat_cell_counts_as_an_edge() -> None:
    pixels = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    pixels[..., 4:] += 1
    cell = HogTarget(8).cells(normalize_images(pixels, (0.5,) * 3, (1.0,) * 3)).view(3, 9)
    torch.testing.assert_close(cell[:, 4], torch.ones(3))


def test_a_raw_cell_is_the_sum_of_its_quarters_on_every_rung() -> None:
    for small, large in pairwise(LADDER):
        quarters = HogTarget(32, small, normalize=False).cells(images())
        whole = HogTarget(32, large, normalize=False).cells(images())
        summed = quarters.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).sum(dim=(3, 5))
        torch.testing.assert_close(whole, summed)


def test_a_tokens_values_run_by_channel_then_cell_row_then_cell_column() -> None:
    target = HogTarget(32, 8)
    cells, tokens = target.cells(images()), target(images())
    for row, column in ((0, 0), (1, 2)):
        expected = cells[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        assert torch.equal(tokens[:, 3 * row + column], expected)


def test_a_channel_is_color_by_color_bin_after_bin() -> None:
    only_green = ramp(0) * torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    assert HogTarget(8).cells(only_green)[0, :, 1, 1].nonzero().flatten().tolist() == [9 + 4]


def test_tokens_in_one_large_cell_share_its_values() -> None:
    target = HogTarget(8, 16)
    tokens, cells = target(images()), target.cells(images())
    assert tokens.shape == (2, 8 * 12, 27)
    for token in range(8 * 12):
        row, column = divmod(token, 12)
        assert torch.equal(tokens[:, token], cells[:, :, row // 2, column // 2])


def test_other_numbers_of_bins_are_finer_cuts_of_the_same_angles() -> None:
    fine = HogTarget(8, bins=18, normalize=False).cells(images()).unflatten(1, (3, 9, 2))
    coarse = HogTarget(8, normalize=False).cells(images()).unflatten(1, (3, 9))
    torch.testing.assert_close(fine.sum(dim=3), coarse)


def test_no_gradient_flows_into_the_images() -> None:
    x = images().requires_grad_()
    assert not HogTarget(16)(x).requires_grad


def test_autocast_and_half_precision_images_leave_it_in_float32() -> None:
    target = HogTarget(16)
    plain = target(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(target(images()), plain)
    half = images().bfloat16()
    assert torch.equal(target(half), target(half.float()))


def test_images_are_not_changed() -> None:
    x = images()
    target = HogTarget(16)
    target.to_image(target(x), x)
    assert torch.equal(x, images())


def test_a_target_adds_nothing_to_the_state_of_the_module_that_holds_it() -> None:
    module = nn.Module()
    module.target = HogTarget(16)  # type: ignore[assignment]
    assert not module.state_dict()


def test_the_meta_device_on_which_costs_are_counted_is_served() -> None:
    assert HogTarget(16)(images().to("meta")).shape == (2, 24, 108)


@pytest.mark.parametrize("cell", [*LADDER, 64])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_picture_is_as_large_as_the_images_and_within_their_range(cell: int, normalize: bool) -> None:
    x = images(64, 128)
    target = HogTarget(16, cell, normalize=normalize)
    picture = target.to_image(target(x) * 3 - 0.5, x)
    assert picture.shape == x.shape
    assert picture.isfinite().all()
    assert (picture <= x.amax(dim=(0, 2, 3), keepdim=True) + 1e-6).all()


def test_a_vertical_edge_is_drawn_upright_and_a_rising_one_rising() -> None:
    target = HogTarget(32, 32)
    for degrees, brightest in ((0, "upright"), (40, "rising")):
        x = ramp(degrees, 96)
        glyph = target.to_image(target(x), x)[0, 0, 32:64, 32:64]
        lit = glyph - glyph.min()
        upright = lit[:, 15:17].sum()
        rising = lit.flip(1).diagonal().sum() * 2  # from the lower left to the upper right
        assert (upright > rising) == (brightest == "upright")


def test_nothing_predicted_is_gray_and_a_stronger_value_is_brighter() -> None:
    x, target = images(), HogTarget(16, 8)
    none = torch.zeros(2, 24, 108)
    gray = target.to_image(none, x)
    assert torch.equal(gray, gray[:1, :, :1, :1].expand_as(gray))
    one = none.clone()
    one[0, 5, 4 * 4] = 0.5  # red, bin 4, first cell of the token
    drawn, twice = target.to_image(one, x) - gray, target.to_image(one * 2, x) - gray
    assert drawn[0, 0, 0:8, 80:88].max() > 0
    assert drawn.count_nonzero() == drawn[0, 0, 0:8, 80:88].count_nonzero()
    torch.testing.assert_close(twice, 2 * drawn, rtol=1e-4, atol=1e-5)


def test_strokes_of_all_bins_have_the_same_weight_about() -> None:
    weights = strokes(32, 9).sum(dim=(1, 2))
    assert weights.max() / weights.min() < 1.1


@pytest.mark.parametrize("cell", [0, -8, 7.5, None, [4, 8]])
def test_a_cell_that_is_no_positive_whole_number_is_refused(cell: object) -> None:
    with pytest.raises(ValueError, match=r"target\.cell is .*whole number"):
        HogTarget(16, cell)  # type: ignore[arg-type]


def test_a_target_without_bins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target\.bins is 0"):
        HogTarget(16, bins=0)


@pytest.mark.parametrize(("unit", "cell"), [(16, 6), (16, 24), (4, 6)])
def test_a_cell_that_fits_no_token_is_refused(unit: int, cell: int) -> None:
    with pytest.raises(ValueError, match=rf"target\.cell {cell} does not fit tokens of {unit} x {unit}"):
        HogTarget(unit, cell)


@pytest.mark.parametrize(("unit", "cell", "side"), [(16, 8, 40), (16, 32, 48), (8, 8, 36)])
def test_images_that_cells_or_tokens_do_not_tile_are_refused(unit: int, cell: int, side: int) -> None:
    with pytest.raises(ValueError, match=rf"target\.cell {cell} .*multiples of {max(unit, cell)}"):
        HogTarget(unit, cell)(images(side, side))


def test_the_table_builds_a_target_that_tells_its_width() -> None:
    target = TARGETS["hog"](16, cell=4, bins=6, normalize=False)
    assert target(images()).shape == (2, 24, target.out_dim)
