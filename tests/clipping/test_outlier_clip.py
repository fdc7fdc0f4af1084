"""OutlierClip: what it leaves alone, what it bounds, and how soon it follows."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks import stress
from stability_callbacks.clipping import OutlierClip
from tests.clipping import references
from tests.clipping.references import BAD, assert_close, feed, series

E = math.e


def shares(norms: np.ndarray, rule: OutlierClip | None = None, skip: int = 16) -> tuple[float, float]:
    """The share of norms that are clipped after the first ones, and the smallest factor."""
    rule = OutlierClip(warmup_ratio=1e30) if rule is None else rule
    factors = np.array(feed(rule, norms.tolist()))[skip:] / norms.astype("float32")[skip:]
    return float((factors < 1).mean()), float(factors.min())


@given(
    series(longest=80),
    st.integers(2, 40),
    st.floats(0.5, 8),
    st.integers(2, 20),
    st.floats(0.5, 100),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([None, 25]),
)
@settings(max_examples=80)
def test_it_equals_the_reference(
    norms: list[float], window: int, z: float, warmup: int, ratio: float, least: float, learn: int | None
) -> None:
    warmup = min(warmup, window)
    ours = feed(OutlierClip(window, z, warmup, ratio, least, learn), norms)
    theirs = references.outlier_clip(norms, window, z, warmup, ratio, least, math.inf if learn is None else learn)
    assert_close(ours, theirs, relative=1e-5)


@pytest.mark.parametrize("spread", [0.05, 0.2, 0.5, 1.0, 2.0])
def test_ordinary_fluctuations_are_left_alone(spread: float) -> None:
    """Log-normal norms, from nearly constant ones to those of small batches near a loss of zero."""
    clipped, smallest = shares(np.random.default_rng(0).lognormal(sigma=spread, size=3000))
    assert clipped < 0.005
    assert smallest > 0.3


@pytest.mark.parametrize("per_step", [-0.05, 0.01, 0.05])
def test_norms_that_drift_by_orders_of_magnitude_are_left_alone(per_step: float) -> None:
    steps = np.arange(400)
    noise = np.random.default_rng(1).normal(scale=0.2, size=400)
    clipped, _ = shares(np.exp(per_step * steps + noise))
    assert clipped < 0.01


def test_a_warm_up_of_the_learning_rate_that_raises_the_norm_is_left_alone() -> None:
    noise = np.random.default_rng(2).normal(scale=0.2, size=400)
    norms = np.exp(noise) * (0.1 + np.minimum(np.arange(400) / 100, 1.0))
    assert shares(norms)[0] < 0.01


@pytest.mark.parametrize("step", [0, 1, 10, 16, 40, 300])
@pytest.mark.parametrize("times", [30.0, 1e3, 1e6])
def test_an_explosion_is_bounded_at_once(step: int, times: float) -> None:
    norms = np.random.default_rng(3).lognormal(sigma=0.2, size=400)
    norms[step] *= times
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    rule, clipped = OutlierClip(), []
    for norm in norms:
        weight.grad = torch.tensor([0.0, norm], dtype=torch.float32)
        clipped.append(float(rule.clip_([weight]).clipped_norm))
    assert clipped[step] <= 5.001  # the norm of the weights, or a few times the median
    others = [k for k in range(400) if k != step]
    np.testing.assert_allclose(np.array(clipped)[others], norms[others], rtol=1e-5)


def test_a_burst_does_not_become_ordinary() -> None:
    norms = [1.0] * 130 + [1e4] * 20 + [1.0] * 130
    clipped = feed(OutlierClip(), norms)
    assert max(clipped[130:]) == pytest.approx(E, rel=1e-3)
    assert min(clipped[150:]) == 1.0


@pytest.mark.parametrize("times", [4.0, 1e3, 1e6])
def test_a_lasting_rise_is_followed(times: float) -> None:
    noise = np.exp(np.random.default_rng(4).normal(scale=0.2, size=800))
    norms = noise * np.where(np.arange(800) < 200, 1.0, times)
    clipped = np.array(feed(OutlierClip(warmup_ratio=1e3), norms.tolist()))
    passes = np.isclose(clipped, norms.astype("float32"), rtol=1e-5)
    assert passes[200 + (64 if times == 4.0 else 256) :].all()
    assert passes[200:230].mean() < 0.1


def test_a_fall_is_never_clipped() -> None:
    norms = [100.0] * 50 + [0.125] * 50
    assert feed(OutlierClip(warmup_ratio=1e3), norms) == norms


def test_the_weights_give_the_first_threshold() -> None:
    weights = [nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.full((4,), 1.0))]
    frozen = nn.Parameter(torch.full((1,), 100.0))  # has no gradient
    for weight in weights:
        weight.grad = torch.full_like(weight, 1000.0)
    result = OutlierClip(warmup_ratio=0.5).clip_([*weights, frozen])
    assert float(result.clipped_norm) == pytest.approx(0.5 * 4.0)


def test_it_is_that_of_the_first_step() -> None:
    weight, rule = nn.Parameter(torch.full((1,), 4.0)), OutlierClip()
    for size in (4.0, 400.0):
        with torch.no_grad():
            weight.fill_(size)
        weight.grad = torch.tensor([1e5])
        rule.clip_([weight])
        assert float(weight.grad) == pytest.approx(4.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_no_threshold(bad: float) -> None:
    weight, rule = nn.Parameter(torch.tensor([bad])), OutlierClip()
    weight.grad = torch.tensor([7.0])
    assert float(rule.clip_([weight]).coefficient) == 1.0
    assert weight.grad.item() == 7.0


def test_large_units_are_ordinary_after_the_warm_up() -> None:
    """A loss in another unit: the weights are small, the gradients are not."""
    norms = (500 * np.random.default_rng(5).lognormal(sigma=0.3, size=200)).tolist()
    clipped = feed(OutlierClip(), norms)
    assert clipped[:16] == pytest.approx([1.0] * 16)
    assert clipped[16:] == pytest.approx(norms[16:], rel=1e-6)


@pytest.mark.parametrize("bad", BAD)
def test_bad_norms_at_the_start_leave_no_trace(bad: float) -> None:
    rule, other = OutlierClip(warmup_steps=3), OutlierClip(warmup_steps=3)
    norms = [2.0, 0.5, 0.7, 9.0, 1.0]
    assert feed(rule, [bad, bad, *norms])[2:] == feed(other, norms)
    assert {name: str(value) for name, value in rule.state_dict().items()} == {
        name: str(value) for name, value in other.state_dict().items()
    }


def test_with_learn_steps_the_threshold_stays() -> None:
    rule = OutlierClip(min_threshold=1.0, warmup_steps=4, learn_steps=4)
    feed(rule, [1.0, 1.0, 1.0, 1.0])
    assert feed(rule, [1.5, *[2.5] * 200, 100.0])[-2:] == pytest.approx([2.5, E], rel=1e-5)
    small = OutlierClip(min_threshold=1.0, warmup_steps=4, learn_steps=4)
    assert feed(small, [0.01] * 4 + [0.9, 5.0])[-2:] == pytest.approx([0.9, 1.0], rel=1e-5)


def test_a_stress_run_hardly_changes_it() -> None:
    """Spikes of x100, a NaN, an infinity and fifty zeros in a row."""
    outcome = stress.stress(OutlierClip, stress.draw())
    assert outcome.largest < 7
    assert outcome.after_effect == 0
    assert outcome.altered == 0


def test_a_state_of_another_window_is_refused() -> None:
    rule = OutlierClip(window=20)
    feed(rule, [1.0])
    with pytest.raises(ValueError, match=r"holds 20 norms, but OutlierClip.* keeps 30"):
        OutlierClip(window=30).load_state_dict(rule.state_dict())


def test_a_copy_that_has_seen_nothing_resumes_nothing() -> None:
    rule = OutlierClip()
    other = copy.deepcopy(rule)
    other.load_state_dict(rule.state_dict())
    assert feed(other, [3.0, 1.0]) == feed(rule, [3.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"window": 1}, "window"),
        ({"z_threshold": 0.0}, "z_threshold"),
        ({"warmup_steps": 1}, "warmup_steps"),
        ({"warmup_steps": 200}, "warmup_steps"),
        ({"warmup_ratio": 0.0}, "warmup_ratio"),
        ({"min_threshold": -1.0}, "min_threshold"),
        ({"learn_steps": 15}, "learn_steps"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}`"):
        OutlierClip(**arguments)  # type: ignore[arg-type]
