"""Scaling gradients in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stability_callbacks.gradient_pass import scale_each_gradient_, scale_gradients_
from tests.gradient_pass.tensors import DEVICES, LARGEST_HALF, tensors
from tests.gradients import conjugated_parameter, gradient, parameter, sparse_embedding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_are_scaled_by_an_unrounded_factor(dtype: torch.dtype, device: str) -> None:
    values = torch.linspace(-LARGEST_HALF, LARGEST_HALF, 1001, device=device).to(dtype)
    for scale in (1 / 3, 1e-8):  # the second is zero in fp16
        factor = torch.tensor(scale, device=device)
        expected = (values.float() * scale).to(dtype)
        assert not torch.equal(expected, values * factor.to(dtype))
        one, other, single = parameter(values.clone()), parameter(values.clone()), parameter(values[0].clone())
        scale_gradients_([one, single], factor)
        scale_each_gradient_([other], factor.reshape(1))
        assert torch.equal(gradient(one), expected)
        assert torch.equal(gradient(other), expected)
        assert torch.equal(gradient(single), expected[0])


@given(st.lists(tensors(), min_size=1, max_size=5), st.floats(1e-3, 1))
def test_scaling_multiplies_every_element(batch: list[Tensor], value: float) -> None:
    together, apart = [parameter(each.clone()) for each in batch], [parameter(each.clone()) for each in batch]
    scale_gradients_(together, torch.tensor(value))
    scale_each_gradient_(apart, torch.full((len(batch),), value))
    for original, one, other in zip(batch, together, apart, strict=True):
        wide = torch.complex128 if original.is_complex() else torch.float64
        expected = original.to(wide) * torch.tensor(value).double()
        tolerance = 1e-12 if original.dtype == wide else 2 * torch.finfo(original.dtype).eps
        least = torch.finfo(original.dtype).smallest_normal
        torch.testing.assert_close(gradient(one).to(wide), expected, rtol=tolerance, atol=least)
        assert torch.equal(gradient(one), gradient(other))


def test_scaling_stays_out_of_the_graph() -> None:
    for scale in (scale_gradients_, scale_each_gradient_):
        weight = nn.Parameter(torch.ones(2))
        [weight.grad] = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
        before = gradient(weight).grad_fn
        assert before is not None
        scale([weight], torch.tensor(0.5) if scale is scale_gradients_ else torch.tensor([0.5]))
        assert gradient(weight).tolist() == [1.5, 1.5]
        assert gradient(weight).grad_fn is before


def test_each_gradient_is_scaled_by_its_own_factor() -> None:
    weights = [parameter([2.0]), nn.Parameter(torch.ones(1)), parameter(torch.tensor([2.0]).half()), parameter(2.0)]
    scale_each_gradient_(weights, torch.tensor([0.5, 2.0, 4.0]))
    assert [None if each.grad is None else each.grad.item() for each in weights] == [1.0, None, 4.0, 8.0]


def test_sparse_gradients_are_scaled_as_they_are_stored() -> None:
    layer = sparse_embedding()
    before = gradient(layer.weight)
    dense = before.to_dense()
    scale_gradients_(layer.parameters(), torch.tensor(0.5))
    assert layer.weight.grad is before
    assert not before.is_coalesced()
    assert torch.equal(before.to_dense(), dense * 0.5)


def test_lazily_conjugated_gradients_are_scaled_in_place() -> None:
    weight = conjugated_parameter()
    before = gradient(weight).clone()
    scale_gradients_([weight], torch.tensor(0.5))
    assert torch.equal(gradient(weight), before * 0.5)
