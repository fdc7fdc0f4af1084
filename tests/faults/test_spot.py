"""What a fault does to memory: the drawn element or tensor changes as asked, and no other bit."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.faults import Fault, draw_spot
from tests.models import assert_same_bits

VALUES = ["nan", "inf", "-inf", -3.0, 0.0]


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "matrix": torch.randn(3, 4),
        "transposed": torch.randn(4, 3).t(),
        "strided": torch.randn(6, 8)[::2, ::3],
        "scalar": torch.randn(()),
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "parameter": nn.Parameter(torch.randn(2, 3)),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "dirty": torch.tensor([1.0, math.nan, math.inf, -0.0]),
    }


@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize("value", VALUES)
def test_changes_one_element_or_multiplies_all_and_goes_back(name: str, value: Any) -> None:
    tensor = tensors()[name]
    before = tensor.detach().clone()
    spot = draw_spot(Fault("weight", value, steps=0), 0, [(name, tensor)])
    assert spot is not None
    undo = spot.corrupt_(float(value))
    assert spot.name == name
    if isinstance(value, str):
        assert spot.memory.shape == ()
        assert repr(float(spot.memory)) == value
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        changed = tensor.detach().clone().view(bits) != before.view(bits)
        assert int(changed.sum()) <= 1  # none if the element drawn was of that value before
    else:
        assert_same_bits(tensor, before * value)
    undo()
    assert_same_bits(tensor, before)


def test_every_element_is_drawn_about_equally_often() -> None:
    tensor = torch.zeros(2, 3)
    counts: Counter[int] = Counter()
    for step in range(3000):
        spot = draw_spot(Fault("weight", steps=0), step, [("x", tensor)])
        assert spot is not None
        undo = spot.corrupt_(math.nan)
        counts[int(tensor.isnan().reshape(-1).int().argmax())] += 1
        undo()
    assert len(counts) == 6
    expected = 3000 / 6
    assert (
        sum((count - expected) ** 2 / expected for count in counts.values()) < 30
    )  # chi-square, 5 degrees: p = 1.5e-5


def test_every_tensor_is_drawn_about_equally_often_and_only_those_that_fit() -> None:
    candidates = [
        ("a.weight", torch.zeros(2)),
        ("a.count", torch.zeros(2, dtype=torch.int64)),
        ("a.empty", torch.zeros(0)),
        ("a.lazy", nn.UninitializedParameter()),
        ("a.big", torch.zeros(1000)),
        ("b.weight", torch.zeros(2)),
    ]
    fault = Fault("weight", steps=0, where="^a")
    spots = [draw_spot(fault, step, candidates) for step in range(2000)]
    counts = Counter(spot.name for spot in spots if spot is not None)
    assert counts.keys() == {"a.weight", "a.big"}
    assert abs(counts["a.big"] - 1000) < 5 * math.sqrt(2000 / 4)
    assert draw_spot(fault, 0, candidates[1:4]) is None
    assert draw_spot(fault, 0, []) is None


def test_draws_go_by_seed_and_step_alone() -> None:
    def element(seed: int, step: int) -> int:
        tensor = torch.zeros(10_000)
        spot = draw_spot(Fault("weight", steps=0, seed=seed), step, [("x", tensor)])
        assert spot is not None
        spot.corrupt_(math.inf)
        return int(tensor.argmax())

    drawn = {(seed, step): element(seed, step) for seed in range(5) for step in range(5)}
    assert drawn == {key: element(*key) for key in reversed(drawn)}
    assert len(set(drawn.values())) > 20


def test_an_expanded_tensor_is_multiplied_once() -> None:
    row = torch.tensor([1.0, 2.0])
    expanded = row.expand(3, 2)
    spot = draw_spot(Fault("input", 10.0, steps=0), 0, [("x", expanded)])
    assert spot is not None
    undo = spot.corrupt_(10.0)
    assert row.tolist() == [10.0, 20.0]
    undo()
    assert row.tolist() == [1.0, 2.0]


def test_complex_and_sparse_tensors_are_hit_in_their_values() -> None:
    wave = torch.randn(4, dtype=torch.complex64)
    spot = draw_spot(Fault("weight", steps=0), 0, [("wave", wave)])
    assert spot is not None
    spot.corrupt_(math.nan)
    assert int(torch.view_as_real(wave).isnan().sum()) == 1

    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 3]]), torch.tensor([1.0, 2.0, 3.0]), (5,), check_invariants=True
    )
    spot = draw_spot(Fault("gradient", "inf", steps=0), 0, [("sparse", sparse)])
    assert spot is not None
    spot.corrupt_(math.inf)
    assert int(sparse.to_dense().isinf().sum()) == 1
    empty = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0), (5,), check_invariants=True)
    assert draw_spot(Fault("gradient", steps=0), 0, [("empty", empty)]) is None


def test_a_view_of_a_data_set_is_given_back_bit_for_bit() -> None:
    data = torch.tensor([0.1, math.nan, -0.0, 3.0])
    before = data.clone()
    spot = draw_spot(Fault("input", 1e-30, steps=0), 0, [("x", data[1:])])
    assert spot is not None
    undo = spot.corrupt_(1e-30)
    assert not torch.equal(data[3:], before[3:])
    undo()
    assert torch.equal(data.view(torch.int32), before.view(torch.int32))
