from __future__ import annotations

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop
from torchvision.transforms.v2 import functional as F

from bim.models.seeding import generator
from bim.orchestrator.data.crops import DRAWS_PER_CROP, RandomResizedCrop, center_crop_resize, crop_box


def draws(number: int) -> list[float]:
    return torch.rand(DRAWS_PER_CROP, generator=generator(0, number)).tolist()


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=generator(1), dtype=torch.uint8)


def test_boxes_lie_inside_and_keep_area_and_ratio():
    areas = []
    for n in range(500):
        top, left, height, width = crop_box(90, 120, (0.2, 1.0), (3 / 4, 4 / 3), draws(n))
        assert 0 <= top <= 90 - height
        assert 0 <= left <= 120 - width
        assert 0.73 < width / height < 1.37  # sides are rounded
        areas.append(height * width / (90 * 120))
    assert 0.19 < min(areas) < 0.22
    assert max(areas) > 0.9


def test_mean_area_is_that_of_torchvision():
    ours = [crop_box(90, 120, (0.2, 1.0), (3 / 4, 4 / 3), draws(n)) for n in range(2000)]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        image = torch.empty(3, 90, 120)
        theirs = [TorchvisionCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    for k in (0, 1, 2, 3):  # top, left, height, width; the standard error is about 0.5 pixels
        assert abs(sum(box[k] for box in ours) - sum(box[k] for box in theirs)) / 2000 < 2.5


def test_positions_reach_both_edges():
    boxes = [crop_box(8, 8, (0.25, 0.25), (1.0, 1.0), draws(n)) for n in range(200)]
    assert {box[0] for box in boxes} == {0, 1, 2, 3, 4}
    assert {box[1] for box in boxes} == {0, 1, 2, 3, 4}


def test_an_image_too_narrow_for_any_ratio_gives_its_center():
    assert crop_box(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), draws(0)) == (0, (1000 - 13) // 2, 10, 13)
    assert crop_box(1, 1, (0.2, 1.0), (3 / 4, 4 / 3), draws(0)) == (0, 0, 1, 1)


def test_crop_equals_torchvisions_resized_crop():
    image, uniforms = noise(40, 50), draws(3)
    top, left, height, width = crop_box(40, 50, (0.2, 1.0), (3 / 4, 4 / 3), uniforms)
    expected = F.resized_crop(
        image, top, left, height, width, [16, 24], InterpolationMode.BICUBIC, antialias=True
    )
    crop = RandomResizedCrop((16, 24), (0.2, 1.0), (3 / 4, 4 / 3), flip=False)(image, uniforms)
    assert crop.dtype == torch.uint8
    assert torch.equal(crop, expected)


def test_half_of_the_images_are_flipped_and_only_if_asked():
    image = noise(8, 8)
    plain, flipping = (RandomResizedCrop((8, 8), (1.0, 1.0), (1.0, 1.0), flip) for flip in (False, True))
    outcomes = [torch.equal(flipping(image, draws(n)), image.flip(2)) for n in range(200)]
    assert 70 < sum(outcomes) < 130
    assert all(torch.equal(plain(image, draws(n)), image) for n in range(20))


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.0, 1.0), (1, 1)), ((0.5, 0.2), (1, 1)), ((0.2, 1.5), (1, 1))]
)
def test_wrong_ranges_are_refused(scale: tuple[float, float], ratio: tuple[float, float]):
    with pytest.raises(ValueError, match="crop_scale"):
        RandomResizedCrop((8, 8), scale, ratio, flip=True)


def test_center_crop_of_a_square_is_the_whole_image():
    image = noise(40, 40)
    assert torch.equal(
        center_crop_resize(image, (16, 16)), F.resize(image, [16, 16], InterpolationMode.BICUBIC)
    )
    assert torch.equal(center_crop_resize(image, (40, 40)), image)


def test_center_crop_shows_the_middle_of_the_long_side():
    image = torch.zeros(3, 20, 60, dtype=torch.uint8)
    image[:, :, 20:40] = 200
    assert (center_crop_resize(image, (10, 10)) == 200).all()
    assert (center_crop_resize(image.transpose(1, 2), (10, 10)) == 200).all()


def test_center_crop_of_an_extreme_shape_stays_small():
    assert center_crop_resize(noise(1, 100_000), (32, 32)).shape == (3, 32, 32)
    assert center_crop_resize(noise(50, 30), (16, 64)).shape == (3, 16, 64)
