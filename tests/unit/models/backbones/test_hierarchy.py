"""What holds for Swin and Twins alike; what is particular to one is in its own file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from bim.models.decoders.local import LocalDecoder
from bim.models.local_mim import LocalMIM
from bim.models.seeding import forked_rng
from bim.models.targets import PixelTarget
from bim.models.tokens import gather_tokens, patchify
from tests.unit.models.backbones.tiny_hierarchies import (
    SIZES,
    Shake,
    built,
    chained,
    images_of,
    plans_of,
    tiny,
)


@pytest.fixture(params=["swin", "twins"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_with_nothing_masked_every_level_is_timms_own(
    family: str, size: tuple[int, int], shake: Shake
) -> None:
    backbone = tiny(family, img_size=list(size))
    with forked_rng("checkpoint"):
        model = timm.create_model(backbone.name, **backbone.variant_args(10))
    shake(model)
    ours = built(backbone)
    for block in ours:  # timm made tables for the windows of this size; ours are nominal
        own, timms = block.state_dict(), model.state_dict()
        block.load_state_dict(
            {key: in_the_middle(timms[key.removeprefix("parts.")], own[key]) for key in own}
        )
    units = backbone.grid[0] * backbone.grid[1]
    plans = plans_of(backbone, size, units)
    with torch.no_grad():
        tokens = chained(ours, images_of(size), plans)
        wanted = model.eval().forward_intermediates(images_of(size), indices=4, intermediates_only=True)
    for found, feature, plan in zip(tokens, wanted, plans, strict=True):
        expected = gather_tokens(feature.flatten(2).transpose(1, 2), plan.keep_tokens)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def in_the_middle(table: Tensor, nominal: Tensor) -> Tensor:
    """The table of a 2 x 2 or 2 x 4 window in the middle of one of 4 x 4, among values that must never be read."""
    if table.shape == nominal.shape:
        return table
    rows, columns = 3, table.shape[0] // 3
    around = (0, 0, (7 - columns) // 2, (7 - columns) // 2, (7 - rows) // 2, (7 - rows) // 2)
    return nn.functional.pad(table.unflatten(0, (rows, columns)), around, value=1e3).flatten(0, 1)


@pytest.mark.parametrize("per_batch", [True, False])
def test_masked_pixels_are_never_seen_and_visible_ones_are(per_batch: bool, family: str) -> None:
    backbone = tiny(family, 2)
    size = (96, 64)
    plans = plans_of(backbone, size, 3, per_batch=per_batch)
    blocks = built(backbone)
    images = images_of(size)
    before = chained(blocks, images, plans)[-1]
    for units, seen in ((plans[0].masked, False), (plans[0].keep, True)):
        changed = images.clone()
        tokens = units if seen else plans[1].masked
        for sample in range(2):
            row, column = divmod(int(tokens[sample, 0]), 2)
            changed[sample, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = float("nan")
        after = chained(blocks, changed, plans)[-1]
        assert torch.equal(before, after) is not seen


def test_every_visible_token_comes_back_to_its_own_position(family: str) -> None:
    backbone = tiny(family)
    size = (96, 128)
    units = 12
    blocks = built(backbone)
    with torch.no_grad():  # layers that add nothing: what is left is where each token's pixels came from
        for block in blocks:
            for key, parameter in block.named_parameters():
                if any(part in key for part in ("attn.proj", "mlp.fc2", "pos_block")):
                    parameter.zero_()
    some, whole = plans_of(backbone, size, 4, per_batch=False), plans_of(backbone, size, units)
    images = images_of(size)
    with torch.no_grad():
        masked, unmasked = chained(blocks, images, some), chained(blocks, images, whole)
    for info, a, b, x, y in zip(backbone.blocks, some, whole, masked, unmasked, strict=True):
        every = torch.zeros_like(y).scatter(1, b.keep_tokens.unsqueeze(-1).expand_as(y), y)
        torch.testing.assert_close(x, gather_tokens(every, a.keep_tokens))
        with forked_rng("decoder"):
            decoder = LocalDecoder(info.width, 16, 1, 1, 4, num_prefix_tokens=0)
        decoder.layers = nn.Sequential()
        rows = decoder.embed(decoder.norm(every)) + decoder.positions(a.token_grid)[:-1]
        decoded = decoder.decode(x, a)[:, : x.shape[1]]
        torch.testing.assert_close(decoded, gather_tokens(rows, a.keep_tokens))
    patches = patchify(images, 4)
    stem = blocks[0].part("patch_embed" if family == "swin" else "patch_embeds.0")
    weight = stem.proj.weight.permute(0, 2, 3, 1).flatten(1)
    embedded = stem.norm(nn.functional.linear(patches, weight, stem.proj.bias))
    torch.testing.assert_close(masked[0], gather_tokens(embedded, some[0].keep_tokens), rtol=1e-5, atol=1e-5)


def test_masks_of_its_own_give_every_sample_what_it_gets_alone(family: str, shake: Shake) -> None:
    backbone = tiny(family)
    size = (96, 128)
    plans = plans_of(backbone, size, 5, batch=3, per_batch=False)
    blocks = built(backbone, shake)
    images = images_of(size, 3)
    with torch.no_grad():
        together = chained(blocks, images, plans)
        for sample in range(3):
            row = slice(sample, sample + 1)
            alone = tuple(
                replace(
                    plan, permutation=plan.permutation[row], decode=plan.decode[row], thrown=plan.thrown[row]
                )
                for plan in plans
            )
            for found, expected in zip(chained(blocks, images[row], alone), together, strict=True):
                torch.testing.assert_close(found, expected[row], rtol=1e-4, atol=1e-5)


def test_a_block_that_keeps_less_drops_whole_units_from_the_end(family: str) -> None:
    backbone = tiny(family, [2, 2, 2, 2, 2])
    size = (96, 128)
    plans = plans_of(backbone, size, [6, 5, 5, 3, 2])
    blocks = built(backbone)
    with torch.no_grad():
        tokens = chained(blocks, images_of(size), plans)
        for index, (info, plan) in enumerate(zip(backbone.blocks, plans, strict=True)):
            assert tokens[index].shape == (2, plan.visible * (32 // info.stride) ** 2, info.width)
            assert tokens[index].shape[1] == plan.keep_tokens.shape[1]
            if index:
                kept = plan.visible * (32 // backbone.blocks[index - 1].stride) ** 2
                again = blocks[index](tokens[index - 1][:, :kept], plan)
                torch.testing.assert_close(again, tokens[index], rtol=1e-5, atol=1e-5)


def test_plans_prepared_ahead_give_the_same_and_are_shared(family: str) -> None:
    backbone = tiny(family, [2, 2, 2, 2, 2])
    size = (96, 128)
    plans = plans_of(backbone, size, 5)
    prepared = backbone.prepare_plans(dict(enumerate(plans)))
    assert backbone.mask_per_batch_default
    assert list(prepared) == [0, 1, 2, 3, 4]
    blocks = built(backbone)
    with torch.no_grad():
        found = chained(blocks, images_of(size), tuple(prepared.values()))
        expected = chained(blocks, images_of(size), plans)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    levels = [plan.encoder_indices.levels for plan in prepared.values()]  # type: ignore[union-attr]
    assert [list(level) for level in levels] == [[0], [1], [2], [2], [3]]
    shared = levels[2][2].groups, levels[3][2].groups  # two blocks of one level
    assert list(shared[0]) == list(shared[1]) != []
    assert all(shared[0][shift] is shared[1][shift] for shift in shared[0])
    if family == "twins":  # the block that opens a level alone convolves there
        assert levels[2][2].halo is not None
        assert levels[3][2].halo is None
    else:
        groups = levels[0][0].groups
        assert list(groups) == [(0, 0), (2, 2)]
        assert groups[0, 0].token_of_slot.shape[0] == 1  # one set of indices for the batch
    moved = prepared[0].to("meta").encoder_indices.levels[0]  # type: ignore[union-attr]
    indices = [moved.halo, *(groups.token_of_slot for groups in moved.groups.values())]
    assert {index.device.type for index in indices if index is not None} == {"meta"}
    only = backbone.prepare_plans({3: plans[3]}, sweep=True)
    with torch.no_grad():
        swept = blocks[3](expected[2], only[3])
    torch.testing.assert_close(swept, expected[3], rtol=1e-4, atol=1e-5)


def test_each_loss_trains_its_own_block_at_every_size(family: str) -> None:
    backbone = tiny(family, [2, 2, 2, 2, 2])
    modules = []
    for info in backbone.blocks:
        target = PixelTarget(info.stride)
        with forked_rng("decoder", info.index):
            decoder = LocalDecoder(info.width, 16, 1, 1, target.out_dim, 0, norm_eps=backbone.norm_eps)
        modules.append(LocalMIM(backbone.build_block(info.index, seed=0), decoder, target))
    for size in ((64, 64), (160, 96)):
        x = images = images_of(size)
        for module, plan in zip(modules, plans_of(backbone, size, [3, 3, 2, 2, 2]), strict=True):
            module.zero_grad()
            before = x.clone()
            step = module(x, images, plan)
            step.loss.backward()
            assert torch.equal(x, before)
            x = step.activations
            assert all(
                parameter.grad is not None and parameter.grad.isfinite().all()
                for parameter in module.parameters()
            )


def test_parameters_of_a_block_depend_on_seed_and_index_alone(family: str) -> None:
    torch.manual_seed(1)
    alone = tiny(family).build_block(2, seed=0).state_dict()
    before = torch.get_rng_state()
    states = [block.state_dict() for block in built(tiny(family))]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(alone[key], value) for key, value in states[2].items())
    other = tiny(family).build_block(2, seed=1).state_dict()
    assert any(not torch.equal(alone[key], value) for key, value in other.items())
    names = [key for state in states for key in state]
    assert len(names) == len(set(names))
    model = timm.create_model(tiny(family).name, **tiny(family).variant_args(10))
    assert {key for key in model.state_dict() if not key.startswith("norm.")} == {
        key.removeprefix("parts.") for key in names
    }


def test_what_does_not_fit_is_refused_with_the_setting_to_change(family: str) -> None:
    backbone = tiny(family, 2)
    with pytest.raises(ValueError, match=r"100 x 64 is not divisible .* mask unit 32 .*schedule\.resolution"):
        backbone.check_size((100, 64))
    with pytest.raises(ValueError, match=r"no variant of depth 11; its variants have 1, .* 10 layers"):
        backbone.variant_args(11)
    with pytest.raises(ValueError, match="1 blocks hold 4 layers"):
        backbone.variant(6, [backbone.build_block(0, seed=0).state_dict()], None)
    plan = plans_of(backbone, (64, 64), 2)[1]
    for count in (16, 33, 96):
        with pytest.raises(
            ValueError, match=f"{count} tokens are not 2 or more of the plan's 2 x 2 units of 4 x 4"
        ):
            backbone.build_block(1, seed=0)(torch.zeros(1, count, 16), plan)
    for overrides, reason in (
        ({"img_size": 50}, "50 x 50 is not divisible"),
        ({"drop_path_rate": 0.1}, "cannot be set"),
        ({"embed_dimm": 3}, "takes no 'embed_dimm'"),
        ({"depths": 4}, r"'depths' is 4; it must be a list with one value per level, such as \["),
        ({"depths": [2, 2, 0, 2]}, r"'depths' is \[2, 2, 0, 2\], where a level has no layer"),
    ):
        with pytest.raises(ValueError, match=reason):
            tiny(family, 2, **overrides)
