"""Statistics of activations against float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stability_callbacks.activations import Moments, measure_moments, precise
from tests.host_reads import ForbidHostReads

SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def tensor(shape: tuple[int, ...], seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + 0.5 * scale).to(dtype)


@given(SHAPES, st.integers(0, 99), st.sampled_from([1e-25, 1.0, 1e25]))
@settings(max_examples=60)
def test_moments_equal_float64_references(shape: tuple[int, ...], seed: int, scale: float) -> None:
    values = tensor(shape, seed, scale)
    moments, reference = Moments.of(values), values.double().numpy()
    signal = reference.var(0).mean() if shape and shape[0] > 1 else reference.var()
    assert moments.elements == reference.size
    for found, expected in [
        (moments.mean, reference.mean()),
        (moments.variance, reference.var()),
        (moments.std, reference.std()),
        (moments.signal, np.sqrt(signal)),
    ]:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)
    assert measure_moments(values).tolist() == list(moments[1:])


@given(st.lists(st.tuples(SHAPES, st.integers(0, 99)), min_size=1, max_size=4))
@settings(max_examples=40)
def test_pooled_moments_are_those_of_all_elements_together(parts: list[tuple[tuple[int, ...], int]]) -> None:
    tensors = [tensor(shape, seed) for shape, seed in parts]
    pooled = Moments.pooled([Moments(), *map(Moments.of, tensors)])
    together = torch.cat([each.flatten() for each in tensors]).double().numpy()
    assert pooled.elements == together.size
    assert pooled.mean == pytest.approx(together.mean(), abs=1e-9)
    assert pooled.std == pytest.approx(together.std(), abs=1e-9)
    weighted = sum(each.numel() * Moments.of(each).signal_variance for each in tensors) / together.size
    assert pooled.signal == pytest.approx(math.sqrt(weighted), abs=1e-9)


def test_nothing_has_no_moments() -> None:
    for nothing in (Moments(), Moments.of(torch.zeros(0, 3)), Moments.pooled([])):
        assert nothing.elements == 0
        assert math.isnan(nothing.mean)
        assert math.isnan(nothing.std)
        assert math.isnan(nothing.signal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    values = torch.tensor([6e4, -6e4], dtype=dtype)
    assert Moments.of(values).std == float(values[0])


def test_non_finite_values_show() -> None:
    assert math.isnan(Moments.of(torch.tensor([1.0, math.nan])).mean)
    assert Moments.of(torch.tensor([1.0, math.inf])).mean == math.inf


def test_measuring_waits_for_nothing_and_stays_out_of_the_graph() -> None:
    values = torch.ones(2, 3, requires_grad=True) * 2
    with ForbidHostReads():
        moments = measure_moments(values)
    assert not moments.requires_grad
    assert moments.dtype == torch.float64


def test_sparse_and_complex_tensors_give_their_numbers() -> None:
    assert precise(torch.tensor([0.0, 3.0]).to_sparse()).tolist() == [3.0]
    assert precise(torch.tensor([1 + 2j])).tolist() == [[1.0, 2.0]]
