"""Comparing collections by the identity of what is in them."""

from __future__ import annotations

import torch

from stability_callbacks._identity import same_objects


def test_objects_that_are_equal_are_not_the_same() -> None:
    one, twin = [1], [1]
    assert same_objects([one, twin], [one, twin])
    assert not same_objects([one, twin], [twin, one])
    assert not same_objects([one], [twin])


def test_a_collection_that_another_begins_with_is_not_the_same() -> None:
    one = object()
    assert not same_objects([one], [one, one])
    assert not same_objects([one, one], [one])
    assert same_objects([], [])


def test_tensors_are_not_compared_by_value_and_keys_stand_for_a_dictionary() -> None:
    weight, bias = torch.zeros(2), torch.zeros(3)
    assert same_objects([weight, bias], {weight: 1, bias: 2})
    assert not same_objects([weight, weight.clone()], {weight: 1, bias: 2})
