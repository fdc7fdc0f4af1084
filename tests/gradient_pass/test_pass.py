"""The one measurement of a step: its total, its loss scale, and what it notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.gradient_pass import (
    GradientPass,
    group_norms,
    measure_gradients,
    scale_each_gradient_,
    scale_gradients_,
)
from tests.gradient_pass.tensors import COMPLEX, DEVICES, FLOATS, INF, NAN, NORM_TYPES
from tests.gradients import gradient, parameter, sparse_embedding
from tests.host_reads import ForbidHostReads


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_element_makes_norm_and_total_non_finite(
    bad: float, dtype: torch.dtype, norm_type: float, device: str
) -> None:
    for size in (1, 40, 4000):
        good, poisoned = torch.ones(size, dtype=dtype, device=device), torch.ones(size, dtype=dtype, device=device)
        poisoned[size // 3] = bad
        norms = measure_gradients([parameter(good), parameter(poisoned)], norm_type)
        assert torch.isfinite(norms.per_tensor).tolist() == [True, False]
        assert not norms.finite
        assert measure_gradients([parameter(good)], norm_type).finite


@pytest.mark.parametrize("parameters", [[], [nn.Parameter(torch.ones(2))]], ids=["none", "without gradient"])
def test_no_gradients_have_norm_zero(parameters: list[nn.Parameter]) -> None:
    norms = measure_gradients(parameters)
    assert norms.names == ()
    assert norms.per_tensor.shape == (0,)
    assert (norms.total, norms.finite) == (0.0, True)
    scale_gradients_(parameters, torch.tensor(0.5))
    assert not GradientPass(parameters)


@pytest.mark.parametrize("norm_type", [0, -1, NAN])
def test_norm_types_must_be_positive(norm_type: float) -> None:
    with pytest.raises(ValueError, match="`norm_type` must be a number > 0"):
        measure_gradients([], norm_type)


def test_a_loss_scale_is_taken_out_of_the_norms() -> None:
    weight = parameter(torch.tensor([3.0, 4.0]) * 1024)
    norms = GradientPass([weight], inverse_scale=torch.tensor(1 / 1024)).norms()
    assert (norms.total, norms.per_tensor.tolist()) == (5.0, [5.0])


def test_a_pass_measures_once_per_norm_type() -> None:
    weight = parameter([3.0, 4.0])
    gradients = GradientPass([weight])
    first = gradients.norms()
    gradient(weight).mul_(2)
    assert gradients.norms() is first
    assert gradients.norms(INF).total == 8.0
    assert gradients.norms(INF).norm_type == INF


def replace(weight: nn.Parameter) -> None:
    weight.grad = gradient(weight).clone()


def remove(weight: nn.Parameter) -> None:
    weight.grad = None


CHANGES = {
    "in place": lambda weight: weight.grad.mul_(0.5),
    "grouped": lambda weight: torch._foreach_mul_([weight.grad], 0.5),
    "through a view": lambda weight: weight.grad.view(-1)[:1].zero_(),
    "clip_grad_norm_": lambda weight: torch.nn.utils.clip_grad_norm_([weight], 0.1),
    "clip_grad_norm_, grouped": lambda weight: torch.nn.utils.clip_grad_norm_([weight], 0.1, foreach=True),
    "clip_grad_value_": lambda weight: torch.nn.utils.clip_grad_value_([weight], 0.1),
    "scale_gradients_": lambda weight: scale_gradients_([weight], torch.tensor(0.5)),
    "accumulated": lambda weight: (weight * 2).sum().backward(),
    "replaced": replace,
    "removed": remove,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_pass_notices_changed_gradients(change: Any) -> None:
    untouched, weight = parameter([1.0]), parameter([3.0, 4.0])
    gradients = GradientPass([untouched, weight])
    gradients.norms()
    assert not gradients.changed()
    change(weight)
    assert gradients.changed()


@pytest.mark.parametrize("coalesced", [False, True])
def test_a_pass_notices_changed_sparse_gradients(coalesced: bool) -> None:
    layer = sparse_embedding((1, 3))
    if coalesced:
        layer.weight.grad = gradient(layer.weight).coalesce()
    gradients = GradientPass(layer.parameters())
    gradients.norms()
    assert not gradients.changed()
    scale_gradients_(layer.parameters(), torch.tensor(0.5))
    assert gradients.changed()


def test_the_host_reads_nothing() -> None:
    weights = [parameter(torch.randn(3)), parameter(torch.randn(2).half()), parameter(torch.randn(()).double())]
    with ForbidHostReads():
        gradients = GradientPass(weights, inverse_scale=torch.tensor(0.5))
        norms = gradients.norms()
        assert isinstance(norms.finite, Tensor)
        gradients.changed()
        group_norms(norms.names, norms.per_tensor)
        scale_gradients_(weights, norms.total)
        scale_each_gradient_(weights, norms.per_tensor)
        with pytest.raises(AssertionError, match="the host reads a tensor"):
            bool(norms.finite)
