"""Multiplying learning rates, and the way back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stability_callbacks.engine import LearningRates

TENSOR = pytest.param(True, id="tensor")
FLOAT = pytest.param(False, id="float")
either = pytest.mark.parametrize("tensor", [FLOAT, TENSOR])


def optimizer_with(*rates: float, tensor: bool = False) -> Optimizer:
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": torch.tensor(rate, dtype=torch.float64) if tensor else rate}
        for rate in rates
    ]
    return torch.optim.SGD(groups)


def rates_of(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@either
def test_each_group_has_its_own_multiple(tensor: bool) -> None:
    optimizer = optimizer_with(0.1, 0.3, tensor=tensor)
    rates = LearningRates(optimizer)
    rates.multiply([0.5, 0.25])
    assert rates_of(optimizer) == [0.05, 0.075]
    rates.restore()
    assert rates_of(optimizer) == [0.1, 0.3]


@either
def test_multiples_are_those_of_the_base_rate_and_do_not_drift(tensor: bool) -> None:
    optimizer = optimizer_with(0.1, tensor=tensor)
    rates = LearningRates(optimizer)
    for step in range(1000):
        rates.multiply([step / 7])
        assert rates_of(optimizer) == [0.1 * (step / 7)]
    rates.restore()
    assert rates_of(optimizer) == [0.1]


@either
def test_a_multiple_of_zero_can_be_undone(tensor: bool) -> None:
    optimizer = optimizer_with(0.1, tensor=tensor)
    rates = LearningRates(optimizer)
    rates.multiply([0.0])
    assert rates_of(optimizer) == [0.0]
    rates.multiply([1.0])
    assert rates_of(optimizer) == [0.1]


@either
def test_the_base_rate_that_is_put_back_is_a_number_of_its_own(tensor: bool) -> None:
    optimizer = optimizer_with(0.1, 0.3, tensor=tensor)
    rates = LearningRates(optimizer)
    rates.multiply([0.5, 0.5])
    rates.restore()
    optimizer.param_groups[0]["lr"] *= 10
    rates.multiply([0.2, 0.2])
    assert rates_of(optimizer) == pytest.approx([0.2, 0.06])
    rates.restore()
    assert rates_of(optimizer) == [1.0, 0.3]


@pytest.mark.parametrize("absent", [True, False])
def test_a_group_without_a_rate_has_no_multiple(absent: bool) -> None:
    optimizer = optimizer_with(0.1, 0.3)
    if absent:
        del optimizer.param_groups[0]["lr"]
    else:
        optimizer.param_groups[0]["lr"] = None
    rates = LearningRates(optimizer)
    assert not rates.known
    rates.multiply([0.5, 0.5])
    assert optimizer.param_groups[0].get("lr") is None
    effective = rates.effective()
    assert math.isnan(effective[0])
    assert effective[1] == 0.15
    rates.restore()
    assert optimizer.param_groups[0].get("lr") is None
    assert optimizer.param_groups[1]["lr"] == 0.3


@either
def test_what_another_party_writes_is_a_new_base_rate(tensor: bool) -> None:
    optimizer = optimizer_with(0.1, tensor=tensor)
    rates = LearningRates(optimizer)
    rates.multiply([0.5])
    optimizer.param_groups[0]["lr"] = torch.tensor(0.4, dtype=torch.float64) if tensor else 0.4
    rates.multiply([0.5])
    assert rates_of(optimizer) == [0.2]
    rates.restore()
    assert rates_of(optimizer) == [0.4]


def test_writing_into_a_tensor_is_noticed() -> None:
    optimizer = optimizer_with(0.1, tensor=True)
    rates = LearningRates(optimizer)
    rates.multiply([0.5])
    optimizer.param_groups[0]["lr"].fill_(0.4)
    rates.multiply([0.5])
    assert rates_of(optimizer) == [0.2]


def test_a_new_tensor_is_noticed_even_if_it_was_written_to_as_often() -> None:
    optimizer = optimizer_with(0.1, tensor=True)
    rates = LearningRates(optimizer)
    rates.multiply([0.5])
    other = torch.tensor(0.4, dtype=torch.float64)
    while other._version < optimizer.param_groups[0]["lr"]._version:
        other.mul_(1)
    optimizer.param_groups[0]["lr"] = other
    rates.multiply([0.5])
    assert rates_of(optimizer) == [0.2]


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_a_tensor_replaced_by_a_number_is_noticed(value: float) -> None:
    optimizer = optimizer_with(0.1, tensor=True)
    rates = LearningRates(optimizer)
    for _ in range(2):  # so that the number of writes equals the value in one of the two cases
        rates.multiply([0.5])
        optimizer.param_groups[0]["lr"] = value
        rates.multiply([0.5])
        assert rates_of(optimizer) == [value / 2]
        rates.restore()
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)


def test_tensors_stay_the_same_objects() -> None:
    """A compiled or captured optimizer reads from the very tensor that it was given."""
    optimizer = optimizer_with(0.1, tensor=True)
    tensor = optimizer.param_groups[0]["lr"]
    rates = LearningRates(optimizer)
    rates.multiply([0.5])
    rates.multiply([0.7])
    rates.restore()
    assert optimizer.param_groups[0]["lr"] is tensor


def test_loading_a_state_dict_starts_from_its_rates() -> None:
    optimizer = optimizer_with(0.1)
    rates = LearningRates(optimizer)
    rates.multiply([0.5])
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.8
    optimizer.load_state_dict(state)
    rates.multiply([0.5])
    assert rates_of(optimizer) == [0.4]
    rates.restore()
    assert rates_of(optimizer) == [0.8]


def test_a_group_added_later_takes_part() -> None:
    optimizer = optimizer_with(0.1)
    rates = LearningRates(optimizer)
    rates.multiply([0.5])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.4})
    rates.multiply([0.5, 0.5])
    assert rates_of(optimizer) == [0.05, 0.2]
    rates.restore()
    assert rates_of(optimizer) == [0.1, 0.4]


def test_effective_rates_are_a_copy() -> None:
    numbers, tensors = optimizer_with(0.1), optimizer_with(0.1, tensor=True)
    for optimizer in (numbers, tensors):
        rates = LearningRates(optimizer)
        rates.multiply([0.5])
        effective = rates.effective()
        rates.restore()
        assert [float(rate) for rate in effective] == [0.05]
    assert isinstance(effective[0], Tensor)


@either
def test_restoring_twice_does_no_harm(tensor: bool) -> None:
    optimizer = optimizer_with(0.1, tensor=tensor)
    rates = LearningRates(optimizer)
    rates.multiply([0.5])
    rates.restore()
    rates.restore()
    assert rates_of(optimizer) == [0.1]
