"""Different rules for different parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stability_callbacks.clipping import AGC, AutoClip, NormClip, PerGroup, ValueClip
from stability_callbacks.gradient_pass import measure_gradients
from stability_callbacks.schedules import WarmupLinear


def parameters(*names: str, gradient: float = 3.0) -> list[tuple[str, nn.Parameter]]:
    pairs = [(name, nn.Parameter(torch.zeros(4))) for name in names]
    for _, parameter in pairs:
        parameter.grad = torch.full((4,), gradient)
    return pairs


def test_the_first_match_wins_and_none_leaves_alone() -> None:
    pairs = parameters("embedding.weight", "body.0.weight", "body.1.weight", "head.weight")
    result = PerGroup({"embedding": NormClip(1.0), "^body": NormClip(2.0), r"\.weight$": None}).clip_(pairs)
    norms = measure_gradients(pairs).per_tensor
    assert norms[0].item() == pytest.approx(1.0, rel=1e-5)
    assert norms[1:3].norm().item() == pytest.approx(2.0, rel=1e-5)
    assert norms[3].item() == 6.0
    assert result.clipped_norm.item() == pytest.approx(norms.norm().item(), rel=1e-6)
    assert result.norm.item() == pytest.approx(12.0)


def test_rules_with_other_norms_and_without_linearity() -> None:
    pairs = parameters("a", "b")
    rule = PerGroup({"a": NormClip(1.5, norm_type=float("inf")), "b": ValueClip(0.5)})
    rule.clip_(pairs)
    assert pairs[0][1].grad.tolist() == pytest.approx([1.5] * 4)  # type: ignore[union-attr]
    assert pairs[1][1].grad.tolist() == [0.5] * 4  # type: ignore[union-attr]
    assert not rule.linear
    assert PerGroup({".*": NormClip()}).linear


def test_a_bad_gradient_in_one_group_leaves_the_others_alone_too() -> None:
    pairs = parameters("a", "b")
    pairs[0][1].grad[0] = float("nan")  # type: ignore[index]
    PerGroup({"a": NormClip(1.0), "b": NormClip(1.0, norm_type=1.0)}).clip_(pairs)
    assert pairs[1][1].grad.tolist() == [3.0] * 4  # type: ignore[union-attr]


def test_parameters_without_a_gradient_still_count_as_matched() -> None:
    pairs = parameters("a", "b")
    pairs[0][1].grad = None
    PerGroup({"a": NormClip(1.0), "b": NormClip(1.0)}).clip_(pairs)
    assert pairs[1][1].grad.norm().item() == pytest.approx(1.0, rel=1e-5)  # type: ignore[union-attr]


def test_an_unmatched_parameter_and_an_idle_pattern_are_errors_that_list_names() -> None:
    with pytest.raises(ValueError, match=r"matches 'head\.weight'"):
        PerGroup({"body": NormClip()}).clip_(parameters("body.weight", "head.weight"))
    with pytest.raises(ValueError, match="'tail' match no parameter"):
        PerGroup({"tail": NormClip(), ".*": None}).clip_(parameters("head.weight"))


def test_state_belongs_to_the_pattern() -> None:
    rule = PerGroup({"a": AutoClip(50), "b": NormClip(1.0)})
    rule.clip_(parameters("a", "b"))
    other = PerGroup({"a": AutoClip(50), "b": NormClip(1.0)})
    other.load_state_dict(rule.state_dict())
    assert float(other.state_dict()["a"]["position"]) == 1.0


def test_a_scheduled_threshold_counts_the_steps_in_which_its_group_has_no_gradient() -> None:
    rule = PerGroup({"a": NormClip(WarmupLinear(warmup=0, end=0.5, total_steps=4)), "b": NormClip(2.0)})
    thresholds = []
    for step in range(5):
        pairs = parameters("a", "b")
        if step in (1, 2):
            pairs[0][1].grad = None
        rule.clip_(pairs)
        thresholds.append(None if pairs[0][1].grad is None else pairs[0][1].grad.norm().item())
    assert thresholds[1:3] == [None, None]
    assert [thresholds[step] for step in (0, 3, 4)] == pytest.approx([1.0, 0.625, 0.5], rel=1e-5)
    assert len(rule.schedules) == 1
    rule.set_step(0)
    pairs = parameters("a", "b")
    rule.clip_(pairs)
    assert pairs[0][1].grad.norm().item() == pytest.approx(1.0, rel=1e-5)  # type: ignore[union-attr]


def test_the_rules_of_groups_learn_which_parameters_are_theirs() -> None:
    rule = PerGroup({"encoder": AGC(exclude_last_layer=True), ".*": None})
    pairs = [(name, nn.Parameter(torch.ones(2, 2))) for name in ("encoder.0.w", "encoder.1.w", "head.w")]
    for _, weight in pairs:
        weight.grad = torch.full((2, 2), 100.0)
    rule.clip_(pairs)
    assert [weight.grad.max().item() < 1 for _, weight in pairs] == [True, False, False]  # type: ignore[union-attr]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="`rules`"):
        PerGroup([NormClip()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`rules`"):
        PerGroup({})
    with pytest.raises(ValueError, match="regular expression"):
        PerGroup({"(": NormClip()})
    with pytest.raises(TypeError, match="clip rule or None"):
        PerGroup({"a": 1.0})  # type: ignore[dict-item]
