"""The adaptive rules against float64 references, and on the inputs that break the published code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks import stress
from stability_callbacks.clipping import AdaGC, AutoClip, OutlierClip, ZClip
from stability_callbacks.clipping._adaptive import AdaptiveNormClip
from tests.clipping import references
from tests.clipping.references import assert_close, feed, series

RULES = {
    "auto": lambda: AutoClip(percentile=50, window=20),
    "z": lambda: ZClip(warmup_steps=5, max_norm=None),
    "z-mean": lambda: ZClip(warmup_steps=5, mode="mean"),
    "outlier": lambda: OutlierClip(window=20, warmup_steps=5, warmup_ratio=10.0),
    "ada": lambda: AdaGC(warmup_steps=5, warmup_max_norm=10.0),
}


@given(series(), st.floats(0, 100), st.integers(1, 30))
@settings(max_examples=60)
def test_auto_clip_equals_the_reference(norms: list[float], percentile: float, window: int) -> None:
    assert_close(feed(AutoClip(percentile, window), norms), references.auto_clip(norms, percentile, window))


@given(
    series(),
    st.floats(0.5, 0.99),
    st.floats(0.5, 4),
    st.integers(1, 10),
    st.one_of(st.none(), st.floats(0.1, 10)),
    st.sampled_from(["adaptive", "mean"]),
)
@settings(max_examples=80)
def test_z_clip_equals_the_reference(
    norms: list[float], alpha: float, z_threshold: float, warmup: int, max_norm: float | None, mode: str
) -> None:
    rule = ZClip(alpha, z_threshold, warmup, max_norm, mode)
    assert_close(feed(rule, norms), references.z_clip(norms, alpha, z_threshold, warmup, max_norm, mode))


@given(
    st.lists(
        st.tuples(*[st.one_of(st.floats(2.0**-10, 2.0**10, width=32), st.sampled_from(references.BAD))] * 3),
        min_size=1,
        max_size=40,
    ),
    st.floats(0.5, 0.99),
    st.floats(1, 2),
    st.integers(1, 10),
)
@settings(max_examples=60)
def test_ada_gc_equals_the_reference(steps: list[tuple[float, ...]], beta: float, ratio: float, warmup: int) -> None:
    rule = AdaGC(beta, ratio, warmup, warmup_max_norm=5.0)
    weights = [(f"w{i}", nn.Parameter(torch.zeros(1))) for i in range(3)]
    ours = []
    for norms in steps:
        for (_, weight), norm in zip(weights, norms, strict=True):
            weight.grad = torch.tensor([norm])
        rule.clip_(weights)
        ours.append([float(weight.grad) for _, weight in weights])  # type: ignore[arg-type]
    for one, other in zip(ours, references.ada_gc(steps, beta, ratio, warmup, 5.0), strict=True):
        assert_close(one, other)


def test_auto_clip_gives_the_published_thresholds() -> None:
    rule, thresholds = AutoClip(percentile=10), []
    for norm in (1.0, 2.0, 3.0, 100.0):
        feed(rule, [norm])
        thresholds.append(float(rule.threshold))  # type: ignore[arg-type]
    assert_close(thresholds, [1.0, 1.1, 1.2, 1.3])


def test_z_clip_gives_the_published_example() -> None:
    rule = ZClip(z_threshold=2.0, warmup_steps=2, max_norm=None)
    assert feed(rule, [0.5, 1.5, 3.0])[-1] == pytest.approx(1.5, rel=1e-6)
    assert float(rule.state_dict()["mean"]) == pytest.approx(1.015)
    assert float(rule.state_dict()["variance"]) == pytest.approx(0.24955675)


@pytest.mark.parametrize("name", RULES)
def test_an_all_zero_start_does_not_freeze_training(name: str) -> None:
    rule = RULES[name]()
    clipped = feed(rule, [0.0] * 50 + [1.0] * 50)
    assert min(clipped[50:]) > 0.9


def test_constant_norms_do_not_lock_z_clip() -> None:
    """After a constant warm-up the norm doubles for good: the threshold must follow."""
    clipped = feed(ZClip(max_norm=None), [1.0] * 30 + [2.0] * 200)
    assert clipped[30] < 1.1
    assert clipped[-1] == pytest.approx(2.0)


def test_ada_gc_keeps_the_statistics_of_tensors_that_have_no_gradient() -> None:
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    pairs = [("one", one), ("two", two)]
    rule = AdaGC(ratio=1.0, warmup_steps=1, warmup_max_norm=100.0)
    one.grad, two.grad = torch.tensor([2.0]), torch.tensor([3.0])
    rule.clip_(pairs)
    one.grad, two.grad = None, torch.tensor([6.0])
    rule.clip_(pairs)
    assert two.grad.item() == pytest.approx(3.0)
    one.grad, two.grad = torch.tensor([6.0]), None
    rule.clip_(pairs)
    assert one.grad.item() == pytest.approx(2.0)


def test_a_state_with_other_names_first_is_told_apart_from_what_was_known() -> None:
    def steps(rule: AdaGC, order: str) -> list[float]:
        weights = [(name, nn.Parameter(torch.zeros(1))) for name in order]
        for name, weight in weights:
            weight.grad = torch.tensor([{"a": 2.0, "b": 200.0}[name]])
        rule.clip_(weights)
        return [float(weight.grad) for _, weight in weights]  # type: ignore[arg-type]

    one, other = (AdaGC(ratio=1.0, warmup_steps=1, warmup_max_norm=1e3) for _ in range(2))
    steps(one, "ab")
    steps(other, "ba")
    other.load_state_dict(one.state_dict())
    assert steps(other, "ba") == [200.0, 2.0]


@pytest.mark.parametrize("name", stress.RULES)
def test_a_stress_run_leaves_little_trace(name: str) -> None:
    """Spikes of x100, a NaN, an infinity and zeros: ten ordinary steps later they are forgotten."""
    outcome = stress.stress(stress.RULES[name], stress.draw(steps=400))
    assert outcome.largest < 7
    assert outcome.after_effect <= 10
    assert outcome.altered < 0.05
    # Fifty zeros make a window reach further back: other norms, of which the spread is only an estimate.
    tolerance = 0.25 if name == "OutlierClip" else 0.05
    assert outcome.threshold == pytest.approx(outcome.calm_threshold, rel=tolerance, nan_ok=True)


def test_a_stress_run_tells_rules_that_suffer() -> None:
    """A rule whose threshold is the mean of all norms, without a bound on the spikes it learns from."""

    class Naive(AdaptiveNormClip):
        def _update(self, norm: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
            total, count = self._state.on(norm.device, total=0, count=0)
            total.add_(torch.where(valid, norm, 0.0))
            count.add_(valid)
            return total / count

    outcome = stress.stress(Naive, stress.draw(steps=400))
    assert outcome.altered > 0.1
    assert outcome.threshold > 1.5 * outcome.calm_threshold


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: AutoClip(percentile=101), "percentile"),
        (lambda: AutoClip(window=0), "window"),
        (lambda: ZClip(alpha=1.0), "alpha"),
        (lambda: ZClip(z_threshold=0), "z_threshold"),
        (lambda: ZClip(warmup_steps=0), "warmup_steps"),
        (lambda: ZClip(max_norm=-1.0), "max_norm"),
        (lambda: ZClip(mode="median"), "mode"),
        (lambda: AdaGC(beta=0.0), "beta"),
        (lambda: AdaGC(ratio=0.9), "ratio"),
        (lambda: AdaGC(warmup_steps=0), "warmup_steps"),
        (lambda: AdaGC(warmup_max_norm=0.0), "warmup_max_norm"),
    ],
)
def test_bad_arguments_are_named(make: references.Rule, argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}`"):
        make()
