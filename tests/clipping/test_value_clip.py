"""ValueClip against torch's own function, and what it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stability_callbacks.clipping import ValueClip
from tests.gradients import conjugated_parameter, gradient, parameter, sparse_embedding

NAN, INF = math.nan, math.inf
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("max_value", [0.1, 1e-9, 6e4])
def test_equals_torch_to_the_bit(max_value: float, dtype: torch.dtype, foreach: bool | None, device: str) -> None:
    gradients = [torch.randn(shape, device=device).to(dtype) for shape in [(), (1,), (0,), (40,), (3, 5)]]
    gradients.append(torch.randn(6, 4, device=device).to(dtype).t())
    ours = [parameter(each.clone()) for each in gradients]
    theirs = [parameter(each.clone()) for each in gradients]
    torch.nn.utils.clip_grad_value_(theirs, max_value, foreach=foreach)
    ValueClip(max_value).clip_([*ours, nn.Parameter(torch.zeros(2, device=device))])
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(gradient(mine), gradient(other))


def test_a_bound_beyond_the_dtype_is_none() -> None:  # where torch's own function raises
    weight = parameter(torch.tensor([-65504.0, 1.0], dtype=torch.float16))
    assert ValueClip(1e6).clip_([weight]).coefficient == 1
    assert gradient(weight).tolist() == [-65504.0, 1.0]


def test_dtypes_may_be_mixed() -> None:
    weights = [parameter(torch.tensor([-3.0, 0.5], dtype=dtype)) for dtype in FLOATS]
    ValueClip(1.0).clip_(weights)
    assert [gradient(weight).tolist() for weight in weights] == [[-1.0, 0.5]] * len(FLOATS)


def test_the_result_says_what_was_done() -> None:
    result = ValueClip(3.0).clip_([parameter([3.0, 4.0]), parameter([0.0])])
    assert result.norm == 5.0
    torch.testing.assert_close(result.clipped_norm, torch.tensor(18.0).sqrt())
    torch.testing.assert_close(result.coefficient, torch.tensor(18.0).sqrt() / 5)
    assert ValueClip(4.0).clip_([parameter([3.0, 4.0])]) == (5.0, 5.0, 1.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_norm_leaves_every_bit_alone(bad: float, dtype: torch.dtype) -> None:
    weights = [parameter(torch.tensor([bad, 1e4, -0.0], dtype=dtype)), parameter(torch.tensor([-50.0], dtype=dtype))]
    before = [gradient(weight).clone().view(torch.uint8) for weight in weights]
    result = ValueClip(1.0).clip_(weights)
    assert result.coefficient == 1
    assert not result.norm.isfinite()
    assert not result.clipped_norm.isfinite()
    assert all(torch.equal(gradient(one).view(torch.uint8), old) for one, old in zip(weights, before, strict=True))


def test_complex_gradients_are_clamped_in_both_parts() -> None:
    weight = conjugated_parameter()  # grouped operations can't write through the conjugation
    expected = torch.view_as_real(gradient(weight).resolve_conj()).clamp(-1, 1)
    ValueClip(1.0).clip_([weight])
    assert torch.equal(torch.view_as_real(gradient(weight).resolve_conj()), expected)


def test_sparse_gradients_are_clamped_by_their_sums() -> None:
    layer = sparse_embedding()
    expected = gradient(layer.weight).to_dense().clamp(-1.5, 1.5)
    result = ValueClip(1.5).clip_(layer.parameters())
    assert torch.equal(gradient(layer.weight).to_dense(), expected)
    torch.testing.assert_close(result.clipped_norm, expected.norm())


@pytest.mark.parametrize("weights", [[], [nn.Parameter(torch.ones(2))], [parameter(torch.zeros(3))]])
def test_nothing_to_clip_is_fine(weights: list[nn.Parameter]) -> None:
    assert ValueClip(1.0).clip_(weights) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF])
def test_max_value_must_be_positive_and_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"`max_value` must be a .*number > 0"):
        ValueClip(value)


def test_is_a_plain_value() -> None:
    rule = ValueClip(0.5)
    assert repr(rule) == "ValueClip(max_value=0.5)"
    assert (rule.threshold, rule.linear, rule.state_dict()) == (0.5, False, {})
