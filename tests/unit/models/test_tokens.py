from __future__ import annotations

import pytest
import torch

from bim.models.seeding import generator
from bim.models.tokens import gather_tokens, normalize_images, patchify, sincos_positions, unpatchify


def test_a_patch_runs_in_row_column_channel_order_and_patches_run_row_by_row() -> None:
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = patchify(images, 2)
    assert tokens.shape == (2, 6, 12)
    expected = [
        images[1, channel, 2 + row, 4 + column]
        for row in range(2)
        for column in range(2)
        for channel in range(3)
    ]
    assert tokens[1, 5].tolist() == expected


def test_unpatchify_is_the_inverse_of_patchify() -> None:
    images = torch.rand(2, 3, 8, 12, generator=generator(0))
    assert torch.equal(unpatchify(patchify(images, 4), 4, (2, 3)), images)


def test_an_image_that_does_not_divide_into_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="32 x 30 pixels"):
        patchify(torch.zeros(1, 3, 32, 30), 8)


def test_gathered_tokens_are_those_that_the_index_names() -> None:
    x = torch.rand(2, 5, 3, generator=generator(0))
    index = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(gather_tokens(x, index), torch.stack([x[0, [4, 0]], x[1, [1, 1]]]))


def test_the_first_half_of_a_position_tells_the_column_and_the_second_the_row() -> None:
    table = sincos_positions(16, (3, 5)).reshape(3, 5, 16)
    assert torch.equal(table[:1, :, :8].expand(3, 5, 8), table[..., :8])
    assert torch.equal(table[:, :1, 8:].expand(3, 5, 8), table[..., 8:])
    assert table.flatten(0, 1).unique(dim=0).shape[0] == 15


def test_a_position_follows_the_papers_formula() -> None:
    frequency = torch.tensor([1.0, 10000.0**-0.5])
    row, column = 2.0, 3.0
    expected = [
        (column * frequency).sin(),
        (column * frequency).cos(),
        (row * frequency).sin(),
        (row * frequency).cos(),
    ]
    torch.testing.assert_close(sincos_positions(8, (4, 4))[2 * 4 + 3], torch.cat(expected))


def test_positions_need_a_width_divisible_by_four() -> None:
    with pytest.raises(ValueError, match="divisible by 4, not 42"):
        sincos_positions(42, (4, 4))


def test_images_are_normalized_per_channel() -> None:
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    images[:, 1] = 0
    out = normalize_images(images, mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 2.0))
    assert out.dtype == torch.float32
    assert out[0, :, 0, 0].tolist() == [1.0, -2.0, 0.5]
