"""Safe functions: equal to the plain ones inside, finite with finite gradients at and beyond the boundary."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stability_callbacks.numerics import log1mexp, safe_acos, safe_div, safe_log, safe_norm, safe_pow, safe_sqrt

Function = Callable[[Tensor], Tensor]

# name: safe function, plain function, a point range inside the domain, points at and beyond the boundary
CASES: dict[str, tuple[Function, Function, tuple[float, float], list[float]]] = {
    "sqrt": (safe_sqrt, torch.sqrt, (1e-3, 1e3), [0.0, -0.0, -1.0, -1e4]),
    "log": (safe_log, torch.log, (1e-3, 1e3), [0.0, -1.0, -1e4]),
    "div": (lambda x: safe_div(torch.ones_like(x), x), torch.reciprocal, (0.1, 1e3), [0.0, -0.0]),
    "acos": (safe_acos, torch.acos, (-0.99, 0.99), [1.0, -1.0, 1.5, -7.0]),
    "pow": (lambda x: safe_pow(x, 0.3), lambda x: x**0.3, (1e-3, 1e3), [0.0, -1.0]),
    "negative pow": (lambda x: safe_pow(x, -0.5), lambda x: x**-0.5, (0.1, 1e3), [0.0, -1.0]),
    "log1mexp": (log1mexp, lambda x: torch.log(1 - torch.exp(-x.abs())), (0.1, 5.0), [0.0, -0.0]),
    "norm": (lambda x: safe_norm(x.unsqueeze(-1), -1), torch.abs, (1e-3, 1e2), [0.0]),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("name", CASES)
@given(share=st.floats(0, 1))
def test_equals_the_plain_function_inside(name: str, share: float) -> None:
    safe, plain, (low, high), _ = CASES[name]
    x = torch.tensor([low + share * (high - low)], dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = safe(x), plain(y)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_finite_at_and_beyond_the_boundary(name: str, dtype: torch.dtype) -> None:
    safe, plain, _, points = CASES[name]
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    value = safe(x)
    value.sum().backward()
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))
    # The plain function is no such thing, or this test would show nothing.
    y = torch.tensor(points, dtype=dtype, requires_grad=True)
    plain(y).sum().backward()
    assert y.grad is not None
    if name != "norm":
        assert not (plain(y).isfinite().all() and y.grad.isfinite().all())


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    safe, _, (low, high), _ = CASES[name]
    x = torch.linspace(low + 0.05 * (high - low), high, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(safe, x)
    assert torch.autograd.gradgradcheck(safe, x)


@pytest.mark.parametrize("name", CASES)
def test_works_under_func_transforms(name: str) -> None:
    safe, _, (low, high), points = CASES[name]
    x = torch.tensor([points[0], (low + high) / 2])
    gradients = torch.func.vmap(torch.func.grad(lambda v: safe(v.reshape(1)).sum()))(x)
    assert gradients.isfinite().all()
    assert gradients[0] == 0


def test_compiles() -> None:
    x = torch.tensor([0.0, 0.5], requires_grad=True)

    def everything(x: Tensor) -> Tensor:
        return sum(safe(x).sum() for safe, *_ in CASES.values())  # type: ignore[return-value]

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), everything(x))
    compiled(x).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_broadcasting() -> None:
    assert safe_div(torch.ones(3, 1), torch.tensor([0.0, 2.0]), default=7.0).tolist() == [[7.0, 0.5]] * 3
    assert safe_pow(torch.tensor([[0.0], [4.0]]), torch.tensor([0.5, 2.0])).shape == (2, 2)


def test_the_exponent_gets_a_gradient_too() -> None:
    exponent = torch.tensor(0.5, requires_grad=True)
    safe_pow(torch.tensor([0.0, math.e]), exponent).sum().backward()
    assert exponent.grad is not None
    assert exponent.grad.item() == pytest.approx(math.sqrt(math.e))


def test_norm_reduces_as_the_plain_one_and_does_not_overflow() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for dim in (None, 0, -1, (0, 2)):
        for keepdim in (False, True):
            plain = torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
            torch.testing.assert_close(safe_norm(x, dim, keepdim), plain)
    assert safe_norm(torch.full((4,), 1e30)).item() == pytest.approx(2e30)
    assert safe_norm(torch.full((4,), 1e-30)).item() == pytest.approx(2e-30)
    assert safe_norm(torch.tensor(-3.0)).item() == 3.0


def test_log1mexp_is_accurate_at_both_ends() -> None:
    assert log1mexp(torch.tensor(1e-30)).item() == pytest.approx(math.log(1e-30), rel=1e-6)
    assert log1mexp(torch.tensor(50.0)).item() == pytest.approx(-math.exp(-50.0), rel=1e-5)


def test_eps_moves_the_boundary() -> None:
    assert safe_log(torch.tensor(0.0), eps=1e-3).item() == pytest.approx(math.log(1e-3))
    assert safe_sqrt(torch.tensor(0.5), eps=1.0).item() == 0.0
