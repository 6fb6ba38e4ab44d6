from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bim.models.seeding import derive_seed, forked_rng, generator


def test_a_seed_is_the_same_in_every_version_and_process() -> None:
    assert derive_seed(0, "mask", 17) == 5905106239943441677
    assert derive_seed() == 8238016292129134938


@given(st.lists(st.integers() | st.text("aé0", max_size=3), max_size=4))
def test_a_seed_fits_into_63_bits(parts: list[int | str]) -> None:
    assert 0 <= derive_seed(*parts) < 2**63


@pytest.mark.parametrize(
    ("one", "other"),
    [((1,), ("1",)), (("ab", "c"), ("a", "bc")), ((1, 23), (12, 3)), ((0, "a"), ("a", 0)), ((), (0,))],
)
def test_parts_that_differ_in_type_length_or_order_give_different_seeds(
    one: tuple[int | str, ...], other: tuple[int | str, ...]
) -> None:
    assert derive_seed(*one) != derive_seed(*other)


def test_a_generator_depends_on_its_parts_alone() -> None:
    torch.rand(5)
    first = torch.rand(4, generator=generator(3, "mask", 7))
    torch.rand(5)
    assert torch.equal(first, torch.rand(4, generator=generator(3, "mask", 7)))
    assert not torch.equal(first, torch.rand(4, generator=generator(3, "mask", 8)))


def test_a_forked_generator_is_seeded_inside_and_leaves_no_trace_outside() -> None:
    before = torch.get_rng_state()
    with forked_rng(1, "init"):
        first = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    with forked_rng(1, "init"):
        assert torch.equal(first, torch.rand(3))


def test_a_forked_generator_is_given_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), forked_rng(1):
        raise KeyError("inside")
    assert torch.equal(before, torch.get_rng_state())
