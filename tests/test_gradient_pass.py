"""The measurement of gradients against float64 references, and what it must not do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stability_callbacks.gradient_pass import (
    GradientNorms,
    GradientPass,
    combine_norms,
    group_norms,
    layer_of,
    local_values,
    measure_gradients,
    named_gradients,
    named_parameters,
    scale_each_gradient_,
    scale_gradients_,
    tensor_norms,
    writable_values,
)
from tests.gradients import conjugated_parameter, gradient, parameter, sparse_embedding
from tests.host_reads import ForbidHostReads

NAN, INF = math.nan, math.inf
NORM_TYPES = [1.0, 2.0, 3.5, INF]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
LARGEST_HALF = torch.finfo(torch.float16).max
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def norm_reference(tensor: Tensor, norm_type: float) -> float:
    magnitudes = np.abs(tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).resolve_conj().numpy())
    if magnitudes.size == 0:
        return 0.0
    return float(magnitudes.max() if norm_type == INF else (magnitudes**norm_type).sum() ** (1 / norm_type))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([*FLOATS, *COMPLEX]))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    exact = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64, generator=generator)
    exact = exact * draw(st.sampled_from([1e-4, 1.0, 1e4]))
    tensor = (exact if dtype.is_complex else exact.clamp(-LARGEST_HALF, LARGEST_HALF)).to(dtype)
    return tensor.permute(tuple(reversed(range(tensor.dim())))) if draw(st.booleans()) else tensor


# ---- norms


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


# ---- which parameters are measured


def test_tied_parameters_count_once_and_missing_gradients_not_at_all() -> None:
    tied, without = parameter([3.0, 4.0]), nn.Parameter(torch.zeros(2))
    norms = measure_gradients([("encoder", tied), ("frozen", without), ("decoder", tied)])
    assert norms.names == ("encoder",)
    assert norms.total == 5.0


def test_tied_parameters_of_a_module_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model(torch.ones(2, 3)).sum().backward()
    expected = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    assert torch.equal(measure_gradients(model.named_parameters(remove_duplicate=False)).total, expected)


@pytest.mark.parametrize("parameters", [[], [nn.Parameter(torch.ones(2))]], ids=["none", "without gradient"])
def test_no_gradients_have_norm_zero(parameters: list[nn.Parameter]) -> None:
    norms = measure_gradients(parameters)
    assert norms.names == ()
    assert norms.per_tensor.shape == (0,)
    assert (norms.total, norms.finite) == (0.0, True)
    scale_gradients_(parameters, torch.tensor(0.5))
    assert not GradientPass(parameters)


def test_generators_and_single_parameters_are_welcome() -> None:
    weight = parameter([3.0, 4.0])
    assert measure_gradients(each for each in [weight]).total == 5.0
    assert measure_gradients(weight).total == 5.0
    assert [name for name, _ in named_gradients(weight)] == ["0"]


@pytest.mark.parametrize(
    "wrong", [nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)), {"weight": torch.ones(1)}, [("weight", None)], None]
)
def test_what_holds_no_parameters_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"`parameters` must be parameters or \(name, parameter\) pairs"):
        named_parameters(wrong)


@pytest.mark.parametrize("norm_type", [0, -1, NAN])
def test_norm_types_must_be_positive(norm_type: float) -> None:
    with pytest.raises(ValueError, match="`norm_type` must be a number > 0"):
        measure_gradients([], norm_type)


def test_a_loss_scale_is_taken_out_of_the_norms() -> None:
    weight = parameter(torch.tensor([3.0, 4.0]) * 1024)
    norms = GradientPass([weight], inverse_scale=torch.tensor(1 / 1024)).norms()
    assert (norms.total, norms.per_tensor.tolist()) == (5.0, [5.0])


# ---- scaling


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


def test_views_read_and_write_what_they_should() -> None:
    sparse = gradient(sparse_embedding().weight)
    assert local_values(sparse).shape == (2, 2)
    assert writable_values(sparse).shape == (3, 2)
    lazy = gradient(conjugated_parameter())
    assert torch.equal(local_values(lazy), lazy.resolve_conj())
    assert writable_values(lazy).shape == (2, 2)
    dense = torch.ones(2)
    assert local_values(dense) is dense
    assert writable_values(dense) is dense


# ---- a pass


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


# ---- groups


def test_parameters_belong_to_the_module_that_owns_them() -> None:
    assert [layer_of(name) for name in ("net.0.weight", "head.bias", "scale")] == ["net.0", "head", "scale"]


NORMS = st.just(0.0) | st.floats(0.0625, 100, width=32)


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
