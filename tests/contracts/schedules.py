"""The contract of schedules: what every schedule of `stability_callbacks.schedules`, and a user's own, keeps."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch

from stability_callbacks import schedules
from stability_callbacks.schedules import (
    Scaled,
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupStableDecay,
)
from tests.contracts.contract import Contract, Make, assert_stable_repr
from tests.loops import STEPS, Net, Train, by_hand, clip, learns
from tests.models import assert_same_bits

# With and without a warm-up, with shares and integers, with a total of their own and without one.
EXAMPLES: Mapping[type[Schedule], list[Callable[[], Schedule]]] = {
    WarmupCosine: [
        WarmupCosine,
        lambda: WarmupCosine(warmup=5, cycles=2),
        lambda: WarmupCosine(warmup=0, total_steps=STEPS, end=0.1),
    ],
    WarmupLinear: [WarmupLinear, lambda: WarmupLinear(warmup=0.2, start=0.5, end=0.1)],
    WarmupStableDecay: [WarmupStableDecay, lambda: WarmupStableDecay(warmup=0.1, decay=5, shape="linear")],
    WarmupInverseSqrt: [lambda: WarmupInverseSqrt(warmup=0.25), lambda: WarmupInverseSqrt(warmup=5)],
    WarmupConstant: [lambda: WarmupConstant(warmup=0.25), lambda: WarmupConstant(warmup=5)],
    Scaled: [
        lambda: Scaled(WarmupConstant(warmup=5), factor=2.0),
        lambda: Scaled(WarmupCosine(warmup=2, end=0.1, total_steps=STEPS), factor=0.5),
    ],
}

SCHEDULES = Contract(schedules, Schedule, EXAMPLES, "tests/contracts/schedules.py")
law = SCHEDULES.law


def curve(schedule: Schedule, total: int = STEPS, beyond: int = 5) -> list[float]:
    return [schedule(step, total) for step in range(total + beyond)]


@law
def gives_numbers_that_multiply(make: Make[Schedule], total: int = STEPS) -> None:
    for value in curve(make(), total):
        assert type(value) is float
        assert 0 <= value < math.inf


@law
def depends_on_the_step_alone(make: Make[Schedule], total: int = STEPS) -> None:
    """A pure function: in any order, as often as wanted, by any object made alike, the same."""
    schedule = make()
    before = copy.deepcopy(vars(schedule))
    forwards = curve(schedule, total)
    backwards = [schedule(step, total) for step in reversed(range(total + 5))]
    assert backwards[::-1] == forwards == curve(make(), total)
    assert repr(vars(schedule)) == repr(before)


@law
def peaks_where_its_warmup_ends(make: Make[Schedule], total: int = STEPS) -> None:
    """It never falls in the warm-up, and is never higher than at the end of it."""
    schedule = make()
    warmup = schedule.warmup_steps(total)
    assert 0 <= warmup <= total
    if warmup < total:
        values = curve(schedule, total)
        assert values[warmup] == max(values)
        assert all(later >= earlier for earlier, later in pairwise(values[: warmup + 1]))


@law
def starts_and_ends_where_it_says(make: Make[Schedule], total: int = STEPS) -> None:
    """`start` at step 0 where there is a warm-up, `end` from the total on, both as shares of the peak."""
    schedule, shape = make(), make()
    factor = 1.0
    if isinstance(shape, Scaled):
        factor, shape = shape.factor, shape.schedule
    if hasattr(shape, "start") and schedule.warmup_steps(total) > 0:
        assert schedule(0, total) == factor * shape.start
    if hasattr(shape, "end"):
        assert [schedule(step, total) for step in (total, total + 1, 10 * total)] == [factor * shape.end] * 3


@law
def falls_after_its_warmup(make: Make[Schedule], total: int = STEPS) -> None:
    """Only a restart rises, and never more often than asked for."""
    schedule = make()
    after = curve(schedule, total)[schedule.warmup_steps(total) :]
    rises = sum(later > earlier + 1e-12 for earlier, later in pairwise(after))
    assert rises <= getattr(schedule, "cycles", 1) - 1


@law
def says_whether_it_needs_a_total(make: Make[Schedule], total: int = STEPS) -> None:
    schedule = make()
    for unknown in (None, math.inf):
        if schedule.needs_total:
            assert schedule.total_steps is None
            with pytest.raises(ValueError, match="total"):
                schedule(0, unknown)  # type: ignore[arg-type]
        else:
            assert all(schedule(step, unknown) >= 0 for step in range(total))  # type: ignore[arg-type]
    if schedule.total_steps is not None:
        assert not schedule.needs_total
        expected = curve(schedule, schedule.total_steps)
        for other in (None, 1, 7 * total):
            assert [schedule(step, other) for step in range(len(expected))] == expected


@law
def survives_copies_and_pickles(make: Make[Schedule], total: int = STEPS) -> None:
    schedule = make()
    for twin in (copy.copy(schedule), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert type(twin) is type(schedule)
        assert repr(twin) == repr(schedule)
        assert curve(twin, total) == curve(schedule, total)


@law
def has_a_stable_repr(make: Make[Schedule], total: int = STEPS) -> None:
    assert_stable_repr(make, lambda schedule: curve(schedule, total))


@law
def can_be_drawn(make: Make[Schedule], total: int = STEPS) -> None:
    schedule = make()
    (line,) = schedule.plot(total).axes[0].lines
    drawn = schedule.total_steps or total
    assert line.get_xdata().tolist() == list(range(drawn + 1))
    assert line.get_ydata().tolist() == curve(schedule, drawn, beyond=1)


@law
def drives_a_learning_rate_in_a_loop(make: Make[Schedule], train: Train = by_hand) -> None:
    """In a loop that knows nothing of Lightning; the reference is torch's own scheduler around the same function."""
    schedule, schedulers = make(), list[torch.optim.lr_scheduler.LambdaLR]()

    def make_scheduled(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=0.03)
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, STEPS)))
        return optimizer

    def set_rate(step: int, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * schedule(step, STEPS)

    torch.manual_seed(0)
    net, reference = Net(), Net()
    reference.load_state_dict(net.state_dict())
    assert learns(train(net, before_step=lambda *step: (clip(net), set_rate(*step))))
    train(reference, make_scheduled, lambda *_: clip(reference), lambda: [scheduler.step() for scheduler in schedulers])
    assert_same_bits(net.state_dict(), reference.state_dict())
