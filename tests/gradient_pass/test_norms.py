"""Norms of tensors and groups against float64 references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stability_callbacks.gradient_pass import GradientNorms, combine_norms, group_norms, tensor_norms
from tests.gradient_pass.tensors import DEVICES, INF, LARGEST_HALF, NORM_TYPES, NORMS, norm_reference, tensors
from tests.gradients import conjugated_parameter, gradient, sparse_embedding


@given(st.lists(tensors(), min_size=1, max_size=5), st.sampled_from(NORM_TYPES))
@settings(max_examples=150)
def test_norms_equal_float64_references(batch: list[Tensor], norm_type: float) -> None:
    norms = tensor_norms(batch, norm_type)
    double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in batch)
    assert norms.dtype == (torch.float64 if double else torch.float32)
    expected = [norm_reference(tensor, norm_type) for tensor in batch]
    np.testing.assert_allclose(norms.numpy(), expected, rtol=1e-5)
    whole = np.array(expected)
    total = whole.max() if norm_type == INF else (whole**norm_type).sum() ** (1 / norm_type)
    np.testing.assert_allclose(float(combine_norms(norms, norm_type)), total, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_half_precision_does_not_overflow(norm_type: float, device: str) -> None:
    large = torch.full((10,), LARGEST_HALF, dtype=torch.float16, device=device)
    expected = LARGEST_HALF * (1.0 if norm_type == INF else 10 ** (1 / norm_type))
    assert float(tensor_norms([large], norm_type)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_tensors_and_no_tensors_have_norm_zero(device: str) -> None:
    empty = torch.zeros(0, 3, device=device)
    for norm_type in NORM_TYPES:
        assert tensor_norms([empty, torch.tensor(-2.0, device=device)], norm_type).tolist() == [0.0, 2.0]
        assert tensor_norms([empty], norm_type).tolist() == [0.0]
        assert tensor_norms([], norm_type).shape == (0,)
        assert combine_norms(torch.zeros(0), norm_type).item() == 0.0


def test_sparse_gradients_are_summed_before_they_are_measured() -> None:
    for tokens in ((1, 3, 1), ()):
        summed = gradient(sparse_embedding(tokens).weight)
        for norm_type in NORM_TYPES:
            expected = norm_reference(summed.to_dense(), norm_type)
            assert tensor_norms([summed], norm_type).item() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_compressed_sparse_tensors_are_measured() -> None:
    compressed = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).to_sparse_csr()
    assert tensor_norms([compressed]).tolist() == [5.0]


def test_lazily_conjugated_tensors_are_measured() -> None:
    lazy = gradient(conjugated_parameter())
    assert tensor_norms([lazy]).item() == pytest.approx(norm_reference(lazy, 2.0))


def test_weights_are_measured_outside_the_graph() -> None:
    assert not tensor_norms([nn.Parameter(torch.ones(2))]).requires_grad


def test_norms_equal_those_of_torch_to_the_bit() -> None:
    gradients = [torch.randn(5000) - 1, torch.randn(30, 30), torch.randn(())]
    for norm_type in NORM_TYPES:
        expected = torch.nn.utils.get_total_norm(gradients, norm_type)
        assert torch.equal(combine_norms(tensor_norms(gradients, norm_type), norm_type), expected)


@given(st.lists(st.tuples(st.sampled_from("abc"), NORMS), max_size=8), st.sampled_from(NORM_TYPES))
def test_group_norms_equal_those_of_the_groups_tensors(items: list[tuple[str, float]], norm_type: float) -> None:
    names = [f"{group}.{position}" for position, (group, _) in enumerate(items)]
    groups, norms = group_norms(names, torch.tensor([norm for _, norm in items]), norm_type)
    assert groups == list(dict.fromkeys(group for group, _ in items))
    for group, norm in zip(groups, norms, strict=True):
        members = torch.tensor([each for name, each in items if name == group], dtype=torch.float64)
        np.testing.assert_allclose(float(norm), norm_reference(members, norm_type), rtol=1e-5)


def test_groups_may_be_named_at_will() -> None:
    norms = GradientNorms(("a.x", "b.x", "a.y"), torch.tensor([3.0, 1.0, 4.0]), torch.tensor(0.0), 2.0)
    groups, values = group_norms(norms.names, norms.per_tensor, group_of=lambda name: name[0])
    assert (groups, values.tolist()) == (["a", "b"], [5.0, 1.0])
