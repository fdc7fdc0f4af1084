"""NormClip against torch's own function and float64 references, and what it must leave alone."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.clipping import NormClip
from stability_callbacks.clipping._norm_clip import norm_clip_coefficient
from stability_callbacks.gradient_pass import GradientNorms
from stability_callbacks.schedules import Scaled, Schedule, WarmupConstant, WarmupCosine, WarmupLinear
from tests.gradients import gradient, parameter, sparse_embedding

NAN, INF = math.nan, math.inf
NORM_TYPES = [1.0, 2.0, 3.5, INF]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.contiguous().reshape(-1).view(torch.uint8)


def random_parameters(dtype: torch.dtype, device: str = "cpu", scale: float = 1.0) -> list[nn.Parameter]:
    """Parameters of all sorts of shapes; one has no gradient, one is not contiguous."""
    shapes = [(), (1,), (7,), (3, 5), (2, 3, 4)]
    gradients = [scale * torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    gradients.append(torch.randn(6, 4, dtype=dtype, device=device).t())
    return [*map(parameter, gradients), nn.Parameter(torch.zeros(3, dtype=dtype, device=device))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_equals_torch_to_the_bit(
    max_norm: float, norm_type: float, dtype: torch.dtype, foreach: bool | None, device: str
) -> None:
    ours = random_parameters(dtype, device)
    theirs = copy.deepcopy(ours)
    for mine, other in zip(ours, theirs, strict=True):
        other.grad = None if mine.grad is None else mine.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type, foreach=foreach)
    result = NormClip(max_norm, norm_type).clip_(ours)
    assert torch.equal(result.norm, expected)
    assert all(
        mine.grad is other.grad is None or torch.equal(gradient(mine), gradient(other))
        for mine, other in zip(ours, theirs, strict=True)
    )
    assert (result.coefficient == 1) == (max_norm == 1e3)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_mixed_dtypes_share_one_norm(norm_type: float) -> None:
    weights = [parameter(torch.randn(50).to(dtype)) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    exact = torch.cat([gradient(weight).double() for weight in weights])
    norm = torch.linalg.vector_norm(exact, norm_type)
    result = NormClip(0.1, norm_type).clip_(weights)
    torch.testing.assert_close(result.norm.double(), norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.coefficient.double(), 0.1 / (norm + 1e-6), rtol=1e-5, atol=0)
    clipped = torch.cat([gradient(weight).double() for weight in weights])
    torch.testing.assert_close(clipped, exact * 0.1 / norm, rtol=1e-2, atol=1e-6)


def test_the_result_says_what_was_done() -> None:
    result = NormClip(1.0).clip_([parameter([3.0, 4.0])])
    assert result.norm == 5.0
    assert result.clipped_norm.item() == pytest.approx(1.0)
    assert result.coefficient.item() == pytest.approx(0.2)
    assert NormClip(6.0).clip_([parameter([3.0, 4.0])]) == (5.0, 5.0, 1.0)


def test_half_gradients_near_their_largest_value_are_clipped() -> None:
    weight = parameter(torch.full((100,), 65504.0, dtype=torch.float16))
    result = NormClip(1.0).clip_([weight])
    assert result.norm.item() == pytest.approx(655040, rel=1e-5)
    assert gradient(weight).float().norm().item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_norm_leaves_every_bit_alone(bad: float, norm_type: float, dtype: torch.dtype) -> None:
    poisoned, healthy = torch.randn(9).to(dtype), 100 * torch.randn(9).to(dtype)
    poisoned[4], poisoned[5], healthy[0] = bad, 1e4, -0.0
    weights = [parameter(poisoned), parameter(healthy)]
    before = [bits(gradient(weight)).clone() for weight in weights]
    result = NormClip(0.5, norm_type).clip_(weights)
    assert result.coefficient == 1
    assert not result.norm.isfinite()
    assert not result.clipped_norm.isfinite()
    assert all(torch.equal(bits(gradient(weight)), old) for weight, old in zip(weights, before, strict=True))


def test_known_norms_are_taken_as_they_are() -> None:
    weight = parameter([3.0, 4.0])
    known = GradientNorms(("0",), torch.tensor([10.0]), torch.tensor(10.0), 2.0)
    assert NormClip(1.0).clip_([weight], known).coefficient.item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"`norms` must be of norm_type inf for NormClip\(.*\), got 2"):
        NormClip(1.0, norm_type=INF).clip_([weight], known)


def test_sparse_gradients_count_by_their_sums() -> None:
    layer = sparse_embedding()
    dense = gradient(layer.weight).to_dense()
    result = NormClip(1.0).clip_(layer.parameters())
    assert torch.equal(result.norm, dense.norm())
    torch.testing.assert_close(gradient(layer.weight).to_dense(), dense / dense.norm())


def test_tied_parameters_are_clipped_once() -> None:
    weight = parameter([3.0, 4.0])
    NormClip(2.5).clip_([("encoder", weight), ("decoder", weight)])
    torch.testing.assert_close(gradient(weight), torch.tensor([1.5, 2.0]))


@pytest.mark.parametrize("weights", [[], [nn.Parameter(torch.ones(2))], [parameter(torch.zeros(0))]])
def test_nothing_to_clip_is_fine(weights: list[nn.Parameter]) -> None:
    assert NormClip(1.0).clip_(weights) == (0.0, 0.0, 1.0)


def test_a_zero_gradient_stays_zero() -> None:
    weight = parameter(torch.zeros(3))
    assert NormClip(1.0).clip_([weight]) == (0.0, 0.0, 1.0)
    assert torch.equal(gradient(weight), torch.zeros(3))


def test_a_single_parameter_and_a_generator_are_welcome() -> None:
    for form in (lambda weight: weight, lambda weight: (each for each in [weight])):
        weight = parameter([3.0, 4.0])
        assert NormClip(1.0).clip_(form(weight)).norm == 5.0
        assert gradient(weight).norm().item() == pytest.approx(1.0)


def test_the_coefficient_takes_a_threshold_on_the_device() -> None:
    norms = torch.tensor([4.0, 0.5, NAN, INF])
    expected = torch.tensor([2 / 4.000001, 1, 1, 1])
    torch.testing.assert_close(norm_clip_coefficient(norms, torch.tensor(2.0)), expected)


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF])
def test_max_norm_must_be_positive_and_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"`max_norm` must be a .*number > 0"):
        NormClip(value)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="`norm_type` must be a number > 0, got 0"):
        NormClip(norm_type=0)
    with pytest.raises(TypeError, match=r"`max_norm` must be a number > 0, got '1' of type str"):
        NormClip("1")  # type: ignore[arg-type]


def test_is_a_plain_value() -> None:
    rule = NormClip(0.5, INF)
    assert repr(rule) == "NormClip(max_norm=0.5, norm_type=inf)"
    assert (rule.threshold, rule.linear, rule.state_dict()) == (0.5, True, {})


# ---- a threshold that follows a schedule


def thresholds(rule: NormClip, steps: int) -> list[float]:
    """What a rule leaves of gradients with norm 100, step by step."""
    left = []
    for _ in range(steps):
        weight = parameter([60.0, 80.0])
        rule.clip_([weight])
        left.append(gradient(weight).norm().item())
        assert rule.threshold == pytest.approx(left[-1], rel=1e-5)
    return left


DECAY = WarmupCosine(warmup=0, end=0.1, total_steps=10)


def test_the_threshold_follows_a_schedule() -> None:
    expected = [DECAY(step) for step in range(12)]
    assert len(set(expected)) == 11
    assert thresholds(NormClip(DECAY), 12) == pytest.approx(expected, rel=1e-5)
    assert thresholds(NormClip(Scaled(DECAY, 30.0)), 12) == pytest.approx([30 * e for e in expected], rel=1e-5)


def test_a_scheduled_threshold_clips_as_a_constant_one() -> None:
    for step in (0, 3, 9):
        rule, one, other = NormClip(DECAY), parameter([60.0, 80.0]), parameter([60.0, 80.0])
        rule.set_step(step)
        assert rule.clip_([one]) == NormClip(DECAY(step)).clip_([other])
        assert torch.equal(gradient(one), gradient(other))


def test_the_step_can_be_told_and_else_is_counted() -> None:
    rule = NormClip(WarmupLinear(warmup=0, end=0.5))
    rule.set_step(8, 10)
    assert thresholds(rule, 3) == pytest.approx([0.6, 0.55, 0.5], rel=1e-5)
    rule.set_step(8, 20)
    assert thresholds(rule, 1) == pytest.approx([0.8], rel=1e-5)
    constant = NormClip(2.0)
    constant.set_step(8, 20)
    assert thresholds(constant, 1) == pytest.approx([2.0], rel=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF, 0.0])
def test_a_step_that_clips_nothing_is_a_step_of_the_schedule(bad: float) -> None:
    rule = NormClip(DECAY)
    rule.clip_([parameter([bad])])
    assert thresholds(rule, 1) == pytest.approx([DECAY(1)], rel=1e-5)


def test_a_schedule_resumes_where_it_was() -> None:
    rule, file = NormClip(DECAY), io.BytesIO()
    whole = thresholds(NormClip(DECAY), 9)
    thresholds(rule, 4)
    torch.save(rule.state_dict(), file)
    file.seek(0)
    other = NormClip(DECAY)
    other.load_state_dict(torch.load(file, weights_only=True))
    for copied in (other, copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert thresholds(copied, 5) == whole[4:]


class Vanishes(Schedule):
    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return max(0.0, 1.0 - step / 2)


def test_a_schedule_must_stay_above_zero() -> None:
    match = r"`max_norm` must be a schedule whose values are numbers > 0, got .*, which is 0 at step "
    with pytest.raises(ValueError, match=match + "0"):
        NormClip(WarmupConstant(warmup=5))
    with pytest.raises(ValueError, match=match + "7"):
        NormClip(WarmupLinear(warmup=0, total_steps=7))
    late = NormClip(WarmupLinear(warmup=0))  # its end is known when the total is
    with pytest.raises(ValueError, match=match + "9"):
        late.set_step(0, 9)
    rule = NormClip(Vanishes())
    assert thresholds(rule, 2) == pytest.approx([1.0, 0.5], rel=1e-5)
    with pytest.raises(ValueError, match=match + "2"):
        thresholds(rule, 1)


def test_a_total_that_nobody_knows_is_asked_for() -> None:
    with pytest.raises(ValueError, match="pass `total_steps` to WarmupCosine"):
        thresholds(NormClip(WarmupCosine(warmup=0, end=0.1)), 1)


def test_a_scheduled_rule_is_a_plain_value() -> None:
    rule = NormClip(Scaled(DECAY, 2.0))
    assert repr(rule) == f"NormClip(max_norm=Scaled(schedule={DECAY!r}, factor=2.0), norm_type=2)"
    assert (rule.threshold, rule.state_dict(), rule.schedules) == (None, {"step": 0}, [rule.max_norm])
    assert NormClip().schedules == []
