from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes._poison import Poison


@given(one_in=st.integers(1, 150), first_step=st.integers(0, 50), seed=st.integers(0, 2**32))
def test_each_stretch_holds_exactly_one_poisoned_step(one_in: int, first_step: int, seed: int) -> None:
    poison = Poison(one_in, first_step)
    assert not any(poison.hits(step, seed) for step in range(first_step))
    for stretch in range(3):
        start = first_step + stretch * one_in
        assert sum(poison.hits(step, seed) for step in range(start, start + one_in)) == 1


def test_places_depend_on_the_seed_and_on_nothing_else() -> None:
    poison = Poison(one_in=100, first_step=10)

    def places(seed: int) -> list[int]:
        return [step for step in range(500) if poison.hits(step, seed)]

    first = places(0)
    torch.rand(3)
    assert places(0) == first
    assert places(1) != first
    assert len({place % 100 for place in first}) > 1  # not the same place in each stretch


def test_spoils_one_number_of_a_copy() -> None:
    inputs = torch.zeros(4, 64)
    spoiled = Poison.spoil(inputs)
    assert spoiled.isnan().sum() == 1
    assert not inputs.isnan().any()


@pytest.mark.parametrize("arguments", [{"one_in": 0}, {"first_step": -1}])
def test_wrong_arguments_are_named(arguments: dict[str, int]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}` must be an integer >= ., got {arguments[name]}"):
        Poison(**arguments)
