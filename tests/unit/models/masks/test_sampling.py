from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bim.models.masks.plan import MaskPlan, block_plans, partial_plan, random_permutation
from bim.models.masks.sampling import SAMPLERS, complement, kept_count
from bim.models.seeding import generator

FURTHEST = ("furthest", "furthest_from_visible")


def paper_plan(batch: int) -> MaskPlan:
    return block_plans(random_permutation(batch, 196, generator("papers")), (14, 14), [49])[0]


def share_beside(tokens: Tensor, neighbors: Tensor, grid: tuple[int, int]) -> float:
    """The share of `tokens` (B, M) that have one of `neighbors` (B, K) among their 8 neighbors."""
    rows, columns = (
        index.unsqueeze(2) - other.unsqueeze(1) for index, other in coordinates(tokens, neighbors, grid)
    )
    return float((torch.maximum(rows.abs(), columns.abs()) == 1).any(dim=2).float().mean())


def coordinates(one: Tensor, other: Tensor, grid: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], ...]:
    return (one // grid[1], other // grid[1]), (one % grid[1], other % grid[1])


def brute_force(masked: list[int], seeds: list[int], columns: int, kept: int, rank: list[int]) -> list[int]:
    """Furthest sampling, straight from its definition; the rank settles ties and the beginning."""

    def squared(a: int, b: int) -> int:
        return (a // columns - b // columns) ** 2 + (a % columns - b % columns) ** 2

    chosen: list[int] = []
    while len(chosen) < kept:
        near = [*seeds, *chosen]
        chosen.append(
            max(
                (token for token in masked if token not in chosen),
                key=lambda token: (
                    min((squared(token, other) for other in near), default=10**6),
                    rank[token],
                ),
            )
        )
    return chosen


@st.composite
def draws(draw: st.DrawFn) -> tuple[tuple[int, int], Tensor, int, int, Tensor]:
    """(grid, order (B, N), visible, kept, rank (B, N)); at least one token visible and one kept"""
    grid = draw(st.integers(1, 7)), draw(st.integers(2, 7))
    tokens = grid[0] * grid[1]
    visible = draw(st.integers(1, tokens - 1))
    kept = draw(st.integers(1, tokens - visible))
    gen = generator(draw(st.integers(0, 2**32)))
    batch = draw(st.integers(1, 3))
    return grid, random_permutation(batch, tokens, gen), visible, kept, random_permutation(batch, tokens, gen)


@pytest.mark.parametrize("name", FURTHEST)
@settings(max_examples=60, deadline=None)
@given(drawn=draws())
def test_furthest_sampling_is_what_its_definition_says(
    name: str, drawn: tuple[tuple[int, int], Tensor, int, int, Tensor]
) -> None:
    grid, order, visible, kept, rank = drawn
    chosen = SAMPLERS[name](order[:, visible:], order[:, :visible], grid, kept, rank)
    for sample in range(order.shape[0]):
        seen, masked = order[sample, :visible].tolist(), order[sample, visible:].tolist()
        seeds = seen if name == "furthest_from_visible" else []
        assert chosen[sample].tolist() == brute_force(masked, seeds, grid[1], kept, rank[sample].tolist())


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=60, deadline=None)
@given(drawn=draws())
def test_every_sampler_keeps_exactly_as_many_masked_tokens_as_asked_and_throws_the_others(
    name: str, drawn: tuple[tuple[int, int], Tensor, int, int, Tensor]
) -> None:
    grid, order, visible, kept, rank = drawn
    masked = order[:, visible:]
    chosen = SAMPLERS[name](masked, order[:, :visible], grid, kept, rank)
    thrown = complement(masked, chosen, order.shape[1])
    assert chosen.shape == (order.shape[0], kept)
    assert chosen.dtype == thrown.dtype == torch.int64
    together = torch.cat([chosen, thrown], dim=1).sort(dim=1).values
    assert torch.equal(together, masked.sort(dim=1).values)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_is_sampled_as_its_samples_one_by_one(name: str) -> None:
    plan, rank = paper_plan(16), random_permutation(16, 196, generator("rank"))
    whole = SAMPLERS[name](plan.masked, plan.keep, (14, 14), 49, rank)
    for i in range(16):
        row = slice(i, i + 1)
        single = SAMPLERS[name](plan.masked[row], plan.keep[row], (14, 14), 49, rank[row])
        assert torch.equal(single, whole[row])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_gpu_samples_the_same_tokens(name: str) -> None:
    plan = paper_plan(64)
    here = partial_plan(plan, 0.5, name, generator(0))
    there = partial_plan(plan.to("cuda"), 0.5, name, generator(0))
    assert torch.equal(there.decode.cpu(), here.decode)
    assert torch.equal(there.thrown.cpu(), here.thrown)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_is_per_sample_and_a_function_of_the_generator(name: str) -> None:
    order = random_permutation(1, 196, generator("one mask")).expand(32, -1)
    plan = block_plans(order, (14, 14), [49])[0]
    kept = partial_plan(plan, 0.5, name, generator(1)).decode
    assert torch.equal(kept, partial_plan(plan, 0.5, name, generator(1)).decode)
    assert not torch.equal(kept, partial_plan(plan, 0.5, name, generator(2)).decode)
    assert len({frozenset(row) for row in kept.tolist()}) > 16


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_that_share_a_mask_share_what_is_decoded(name: str) -> None:
    order = random_permutation(4, 196, generator("one mask"), per_batch=True)
    (plan,) = block_plans(order, (14, 14), [49], shared=True)
    (alone,) = block_plans(order[:1], (14, 14), [49])
    found, one = partial_plan(plan, 0.5, name, generator(1)), partial_plan(alone, 0.5, name, generator(1))
    assert torch.equal(found.decode, one.decode.expand(4, -1))
    assert torch.equal(found.thrown, one.thrown.expand(4, -1))


def test_where_furthest_sampling_begins_is_uniform() -> None:
    batch = 3000
    order = torch.arange(8).expand(batch, -1)
    first = SAMPLERS["furthest"](
        order[:, 2:], order[:, :2], (2, 4), 1, random_permutation(batch, 8, generator(0))
    )
    counts = torch.bincount(first.flatten(), minlength=8)
    assert counts[:2].tolist() == [0, 0]
    assert (counts[2:] - batch / 6).abs().max() < 4 * (batch / 6) ** 0.5


def test_furthest_sampling_leaves_a_kept_masked_token_beside_nearly_every_thrown_one() -> None:
    plan = partial_plan(paper_plan(512), 0.5, "furthest", generator("oracle 4"))
    assert share_beside(plan.thrown, plan.decode, (14, 14)) >= 0.99


def test_the_samplers_coverage_is_that_of_the_fact_sheet() -> None:
    beside_kept, beside_any = {}, {}
    for name in SAMPLERS:
        plan = partial_plan(paper_plan(512), 0.5, name, generator("coverage"))
        decoded = torch.cat([plan.keep, plan.decode], dim=1)
        beside_kept[name] = share_beside(plan.thrown, plan.decode, (14, 14))
        beside_any[name] = share_beside(plan.thrown, decoded, (14, 14))
    assert beside_kept["random"] == pytest.approx(0.866, abs=0.01)
    assert beside_kept["furthest_from_visible"] == pytest.approx(0.885, abs=0.01)
    assert beside_any["random"] == pytest.approx(0.988, abs=0.005)
    assert beside_any["furthest"] == beside_any["furthest_from_visible"] == 1.0


def test_sampling_away_from_visible_tokens_covers_high_ratios_too() -> None:
    plan = partial_plan(paper_plan(256), 0.65, "furthest_from_visible", generator(0))
    assert share_beside(plan.thrown, torch.cat([plan.keep, plan.decode], dim=1), (14, 14)) == 1.0


def test_cells_keep_one_diagonal_of_each_cell_as_far_as_the_count_allows() -> None:
    plan, rank = paper_plan(64), random_permutation(64, 196, generator("rank"))
    for kept in (20, 49, 110):
        chosen = SAMPLERS["cells"](plan.masked, plan.keep, (14, 14), kept, rank)
        diagonals = set()
        for sample in range(64):
            sides = [[(t // 14 + t % 14) % 2 for t in row[sample].tolist()] for row in (chosen, plan.masked)]
            most = max((0, 1), key=sides[0].count)
            assert sides[0].count(most) == min(kept, sides[1].count(most))
            diagonals.add(most)
        assert diagonals == {0, 1}


def test_the_throw_ratio_is_a_share_of_all_tokens() -> None:
    assert kept_count(196, 49, 0.5) == 49
    assert kept_count(196, 49, 0.25) == 98
    assert kept_count(196, 49, 0.0) == 147
    assert kept_count(784, 196, 0.5) == 196


def test_the_count_is_not_lowered_by_the_rounding_of_decimal_ratios() -> None:
    assert kept_count(10, 0, 0.9) == 1
    assert kept_count(100, 20, 0.42) == 38
    assert kept_count(20, 4, 0.75) == 1


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratios_outside_their_range_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"decoder\.throw_ratio is .*at most 0\.7448"):
        kept_count(196, 49, ratio)


def test_a_ratio_that_leaves_nothing_to_decode_is_refused_with_the_largest_one() -> None:
    with pytest.raises(ValueError, match=r"decoder\.throw_ratio 0\.75 .*the most is 0\.7448"):
        kept_count(196, 49, 0.75)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 4000), st.data())
def test_the_ratio_that_a_refusal_names_is_accepted(tokens: int, data: st.DataObject) -> None:
    visible = data.draw(st.integers(1, tokens - 1))
    with pytest.raises(ValueError, match="the most is") as refused:
        kept_count(tokens, visible, 0.9999999)
    most = float(str(refused.value).split("the most is ")[1].split(" ")[0])
    assert 1 <= kept_count(tokens, visible, most) <= tokens - visible
