"""The contract of clip rules: what every rule of `stability_callbacks.clipping`, and a user's own, keeps."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks import clipping
from stability_callbacks.clipping import (
    AGC,
    AdaGC,
    AutoClip,
    ClipResult,
    ClipRule,
    NormClip,
    PerGroup,
    ValueClip,
    ZClip,
)
from stability_callbacks.gradient_pass import GradientNorms, measure_gradients
from stability_callbacks.schedules import Scaled, WarmupLinear
from tests.contracts.contract import (
    Contract,
    Make,
    assert_stable_repr,
    mesh_of_one,
    saved_and_loaded,
    sharded,
    whole,
)
from tests.host_reads import ForbidHostReads
from tests.loops import SPIKE, STEPS, Net, Train, by_hand, learns
from tests.models import assert_same_bits

NAN, INF = math.nan, math.inf

# Warm-ups end within the steps below, and a gradient that is far too large is clipped. Patterns fit `SHAPES` and `Net`.
EXAMPLES: Mapping[type[ClipRule], list[Callable[[], ClipRule]]] = {
    NormClip: [
        lambda: NormClip(max_norm=1.0),
        lambda: NormClip(max_norm=1.0, norm_type=INF),
        lambda: NormClip(Scaled(WarmupLinear(warmup=0, end=0.5, total_steps=STEPS), factor=2.0)),
    ],
    ValueClip: [lambda: ValueClip(max_value=0.1)],
    AGC: [lambda: AGC(clip=0.1), lambda: AGC(clip=0.1, exclude_last_layer=True)],
    AutoClip: [lambda: AutoClip(percentile=50, window=20)],
    ZClip: [lambda: ZClip(warmup_steps=5, max_norm=None), lambda: ZClip(warmup_steps=5, mode="mean")],
    AdaGC: [lambda: AdaGC(warmup_steps=6), lambda: AdaGC(warmup_steps=5, warmup_max_norm=10.0)],
    PerGroup: [
        lambda: PerGroup({"^head": NormClip(0.5), "^rnn": AutoClip(50), ".*": ValueClip(0.1)}),
        lambda: PerGroup({"^head": AdaGC(warmup_steps=5), "^rnn": NormClip(0.5, INF), ".*": ZClip(warmup_steps=5)}),
    ],
}

CLIP_RULES = Contract(clipping, ClipRule, EXAMPLES, "tests/contracts/clipping.py")
law = CLIP_RULES.law

Gradients = list[Tensor | None]

# The parameters of `Net` by name, with some shapes that it has not.
SHAPES: dict[str, tuple[int, ...]] = {
    "rnn.weight_ih_l0": (32, 3),
    "rnn.bias_ih_l0": (32,),
    "scale": (),
    "table": (5, 3),
    "kernel": (4, 3, 2),
    "head.weight": (2, 8),
    "head.bias": (2,),
}
_generator = torch.Generator().manual_seed(1)
WEIGHTS = [torch.randn(shape, generator=_generator) for shape in SHAPES.values()]


def draw(step: int) -> Gradients:
    """The gradients of a step: log-normal in size, and a hundred times as large in every ninth."""
    generator = torch.Generator().manual_seed(100 + step)
    size = math.exp(torch.randn((), generator=generator).item()) * (100 if step % 9 == 8 else 1)
    return [size * torch.randn(shape, generator=generator) for shape in SHAPES.values()]


ORDINARY: list[Gradients] = [draw(step) for step in range(40)]
CUT = 23  # where a run is interrupted


def with_one(bad: float) -> Gradients:
    """Ordinary gradients, with one element that is not."""
    gradients = draw(1000)
    assert gradients[0] is not None
    gradients[0][7, 1] = bad
    return gradients


NOTHING: Gradients = [None] * len(SHAPES)
UNUSABLE: dict[str, Gradients] = {
    "NaN": with_one(NAN),
    "infinity": with_one(INF),
    "minus infinity": with_one(-INF),
    "zeros": [torch.zeros(shape) for shape in SHAPES.values()],
    "no gradients": NOTHING,
}


class Outcome(NamedTuple):
    """What a rule said and left."""

    result: ClipResult
    gradients: Gradients


def parameters(gradients: Gradients, place: Callable[[Tensor], Tensor] = torch.clone) -> list[tuple[str, Tensor]]:
    """Fresh parameters with copies of some gradients, put somewhere by a function."""
    pairs: list[tuple[str, Tensor]] = []
    for name, weight, gradient in zip(SHAPES, WEIGHTS, gradients, strict=True):
        parameter = nn.Parameter(place(weight.clone()))
        parameter.grad = None if gradient is None else place(gradient.clone())
        pairs.append((name, parameter))
    return pairs


def left_of(pairs: Iterable[tuple[str, Tensor]]) -> Gradients:
    return [None if each.grad is None else whole(each.grad).clone() for _, each in pairs]


def run(
    rule: ClipRule, steps: Iterable[Gradients], start: int = 0, place: Callable[[Tensor], Tensor] = torch.clone
) -> list[Outcome]:
    """Let a rule clip some steps in a row. It is told each step's number, as `GradientClipping` does."""
    outcomes = []
    for step, gradients in enumerate(steps, start):
        pairs = parameters(gradients, place)
        rule.set_step(step, len(ORDINARY))
        result = rule.clip_(pairs)
        outcomes.append(Outcome(ClipResult(*map(whole, result)), left_of(pairs)))
    return outcomes


def assert_same(one: list[Outcome], other: list[Outcome], what: str) -> None:
    assert_same_bits([list(map(list, each)) for each in one], [list(map(list, each)) for each in other], what)


# ---- what a rule does to gradients


@law
def says_what_it_did(make: Make[ClipRule]) -> None:
    """Norm before and after, and a coefficient in (0, 1]; no element grows, and gradients stay the same objects."""
    rule, clipped = make(), 0
    small = [[1e-6 * each for each in draw(step) if each is not None] for step in range(500, 520)]
    for step, gradients in enumerate([*ORDINARY, *small]):
        pairs = parameters(gradients)
        before = measure_gradients(pairs, rule.norm_type).total
        objects = [parameter.grad for _, parameter in pairs]
        rule.set_step(step, len(ORDINARY))
        norm, clipped_norm, coefficient = rule.clip_(pairs)
        after = measure_gradients(pairs, rule.norm_type).total
        assert norm.shape == clipped_norm.shape == coefficient.shape == ()
        torch.testing.assert_close(norm, before, rtol=0, atol=0)
        torch.testing.assert_close(clipped_norm, after, rtol=1e-5, atol=0)
        torch.testing.assert_close(coefficient, after / before, rtol=1e-4, atol=0)
        assert 0 < coefficient <= 1
        for old, new, (_, parameter) in zip(gradients, objects, pairs, strict=True):
            assert parameter.grad is new
            assert old is not None
            assert new is not None
            assert (new.abs() <= old.abs()).all()
        if all(torch.equal(old, new) for old, new in zip(gradients, objects, strict=True)):  # type: ignore[arg-type]
            assert coefficient == 1, "nothing was clipped, but the coefficient is not 1"
        clipped += int(coefficient < 1)
    assert clipped, "no gradient of the example is clipped, not even one that is a hundred times too large"


@law
def takes_known_norms(make: Make[ClipRule]) -> None:
    """Norms that were measured before serve as well, and those of another type are refused."""
    rule, other = make(), make()
    for step, gradients in enumerate(ORDINARY):
        measured, known = parameters(gradients), parameters(gradients)
        for each in (rule, other):
            each.set_step(step, len(ORDINARY))
        assert_same_bits(
            list(rule.clip_(measured)), list(other.clip_(known, measure_gradients(known, other.norm_type)))
        )
        assert_same_bits(left_of(measured), left_of(known))
    pairs = parameters(ORDINARY[0])
    with pytest.raises(ValueError, match="`norms` must be of norm_type"):
        rule.clip_(pairs, measure_gradients(pairs, 3.0))


@law
def may_be_assigned_its_parameters(make: Make[ClipRule]) -> None:
    """`GradientClipping` tells a rule of all parameters before training."""
    told = make()
    told.assign(parameters(ORDINARY[0]))
    assert_same(run(told, ORDINARY), run(make(), ORDINARY), "assigned")


@law
def leaves_missing_gradients_missing(make: Make[ClipRule]) -> None:
    rule = make()
    for missing in range(len(SHAPES)):
        gradients = [None if index == missing else each for index, each in enumerate(ORDINARY[missing])]
        [outcome] = run(rule, [gradients])
        assert outcome.gradients[missing] is None
        assert outcome.result.norm.isfinite()
    [outcome] = run(rule, [NOTHING])
    assert tuple(outcome.result) == (0.0, 0.0, 1.0)


@law
def leaves_bad_gradients_alone(make: Make[ClipRule]) -> None:
    """Every bit of every gradient stays where one element is NaN or infinite, or where the norms are masked by NaN."""
    for history in (0, 30):
        for name in ("NaN", "infinity", "minus infinity", "zeros"):
            rule = make()
            run(rule, ORDINARY[:history])
            [outcome] = run(rule, [UNUSABLE[name]], history)
            assert_same_bits(outcome.gradients, UNUSABLE[name], name)
            assert outcome.result.coefficient == 1
            assert outcome.result.clipped_norm.isfinite() == (name == "zeros")
        rule = make()
        run(rule, ORDINARY[:history])
        gradients = draw(1001)
        pairs = parameters(gradients)
        rule.set_step(history, len(ORDINARY))
        assert rule.clip_(pairs, masked(measure_gradients(pairs, rule.norm_type))).coefficient == 1
        assert_same_bits(left_of(pairs), gradients, "masked")


def masked(norms: GradientNorms) -> GradientNorms:
    """How a step that is skipped on the device reaches a rule: its gradients are finite, its norms are not."""
    return norms._replace(per_tensor=norms.per_tensor * NAN, total=norms.total * NAN)


@law
def works_under_a_loss_scale_if_linear(make: Make[ClipRule]) -> None:
    """A linear rule multiplies by factors found from the norms, so gradients may still carry a loss scale."""
    if not make().linear:
        return
    scale = 1024.0
    plain, scaling = make(), make()
    for step, gradients in enumerate(ORDINARY):
        pairs = parameters(gradients)
        larger = parameters([None if each is None else scale * each for each in gradients])
        for each in (plain, scaling):
            each.set_step(step, len(ORDINARY))
        norms = measure_gradients(pairs, scaling.norm_type)
        assert_same_bits(list(plain.clip_(pairs)), list(scaling.clip_(larger, norms)), f"step {step}")
        assert_same_bits([scale * each for each in left_of(pairs) if each is not None], left_of(larger), f"step {step}")


# ---- what it remembers


@law
def learns_nothing_from_bad_steps(make: Make[ClipRule]) -> None:
    """NaN, infinity, zeros and steps without gradients enter no statistic, whenever they come."""
    for history in (0, 3, 30):
        for name, bad in UNUSABLE.items():
            clean, tried = make(), make()
            run(clean, ORDINARY[:history])
            run(tried, ORDINARY[:history])
            run(tried, [bad, bad], history)
            probe = ORDINARY[history : history + 5]
            assert_same(run(clean, probe, history), run(tried, probe, history), f"after {history} steps and {name}")
            assert_same_bits(clean.state_dict(), tried.state_dict(), name)


@law
def learns_nothing_from_masked_norms(make: Make[ClipRule]) -> None:
    for history in (3, 30):
        clean, tried = make(), make()
        run(clean, ORDINARY[:history])
        run(tried, ORDINARY[:history])
        pairs = parameters(draw(1001))
        tried.clip_(pairs, masked(measure_gradients(pairs, tried.norm_type)))
        probe = ORDINARY[history : history + 5]
        assert_same(run(clean, probe, history), run(tried, probe, history), f"after {history} steps")


@law
def resumes_bit_for_bit(make: Make[ClipRule]) -> None:
    """Interrupted and resumed equals uninterrupted, also in a rule that knew something else before."""
    uninterrupted = make()
    expected = run(uninterrupted, ORDINARY)
    first = make()
    run(first, ORDINARY[:CUT])
    state = first.state_dict()
    kept = saved_and_loaded(state)
    run(first, ORDINARY[:5])
    assert_same_bits(state, kept, "a state that was taken before")
    for known in (0, 7):
        second = make()
        run(second, [draw(2000 + step) for step in range(known)])
        second.load_state_dict(saved_and_loaded(kept))
        assert_same(run(second, ORDINARY[CUT:], CUT), expected[CUT:], "resumed")
        assert_same_bits(second.state_dict(), uninterrupted.state_dict())


@law
def starts_afresh_from_an_empty_state(make: Make[ClipRule]) -> None:
    rule, fresh = make(), make()
    run(rule, ORDINARY[:CUT])
    rule.load_state_dict(make().state_dict())
    assert_same(run(rule, ORDINARY), run(fresh, ORDINARY), "afresh")
    assert_same_bits(rule.state_dict(), fresh.state_dict())


@law
def survives_copies_and_pickles(make: Make[ClipRule]) -> None:
    """A copy goes on as the original would, and neither knows of the other."""
    expected = run(make(), ORDINARY)
    rule = make()
    run(rule, ORDINARY[:CUT])
    for twin in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert type(twin) is type(rule)
        assert repr(twin) == repr(rule)
        state = saved_and_loaded(rule.state_dict())
        assert_same(run(twin, ORDINARY[CUT:], CUT), expected[CUT:], "copied")
        assert_same_bits(rule.state_dict(), state, "the original")


@law
def has_a_stable_repr(make: Make[ClipRule]) -> None:
    assert_stable_repr(make, lambda rule: run(rule, ORDINARY[:10]))


# ---- where it runs


@law
def never_waits_for_the_device(make: Make[ClipRule]) -> None:
    rule = make()
    for step, gradients in enumerate([*ORDINARY, *UNUSABLE.values()]):
        pairs = parameters(gradients)
        with ForbidHostReads():
            rule.set_step(step, len(ORDINARY))
            rule.clip_(pairs)


@law
def clips_shards_as_it_clips_the_whole(make: Make[ClipRule]) -> None:
    with mesh_of_one() as mesh:
        found = run(make(), ORDINARY, place=lambda tensor: sharded(tensor, mesh))
    assert_close(found, run(make(), ORDINARY))


def assert_close(ours: list[Outcome], expected: list[Outcome]) -> None:
    torch.testing.assert_close(
        [tuple(each.result) for each in ours], [tuple(each.result) for each in expected], rtol=1e-5, atol=1e-7
    )
    for one, other in zip(ours, expected, strict=True):
        for mine, theirs in zip(one.gradients, other.gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@law
def tames_a_spike_in_a_loop(make: Make[ClipRule], train: Train = by_hand) -> None:
    """In a loop that knows nothing of Lightning, which without a rule is thrown off by one batch."""
    net, rule, results = Net(), make(), list[ClipResult]()
    losses = train(net, before_step=lambda *_: results.append(rule.clip_(net.named_parameters())))
    assert learns(losses)
    assert results[SPIKE].norm > 100
    assert results[SPIKE].clipped_norm < 0.1 * results[SPIKE].norm
