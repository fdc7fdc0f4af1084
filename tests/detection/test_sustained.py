"""A row of losses that stand out, and what does not count as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_callbacks.detection import Spike, StepEvidence, SustainedRise
from stability_callbacks.gradient_pass import GradientNorms

NORMS = GradientNorms(("weight",), torch.ones(1), torch.ones(()), 2.0)
ARGUMENTS: dict[str, int] = {"patience": 3, "window": 8, "min_history": 4}


def evidence(loss: float | None) -> StepEvidence:
    return StepEvidence(None if loss is None else torch.tensor(loss), NORMS)


def fires(rise: SustainedRise, losses: Sequence[float | None], accepted: bool = True) -> list[bool]:
    flags = []
    for loss in losses:
        step = evidence(loss)
        flags.append(bool(rise(step)))
        rise.update(step, torch.tensor(accepted))
    return flags


SETTLED = [1.0, 1.1, 0.9, 1.0]


def test_fires_from_the_step_that_completes_the_row_until_it_ends() -> None:
    losses = [*SETTLED, 9.0, 9.0, 9.0, 9.0, 1.0, 9.0]
    assert fires(SustainedRise(**ARGUMENTS), losses) == [False] * 6 + [True, True, False, False]


def test_losses_that_stand_out_do_not_become_the_rule() -> None:
    assert fires(SustainedRise(**ARGUMENTS), [*SETTLED, *[9.0] * 50])[-1]


def test_a_step_without_gradients_neither_adds_to_the_row_nor_ends_it() -> None:
    rise = SustainedRise(**ARGUMENTS)
    fires(rise, [*SETTLED, 9.0, 9.0])
    for loss in (1.0, 9.0, 9.0):
        empty = StepEvidence(torch.tensor(loss), GradientNorms((), torch.ones(0), torch.zeros(()), 2.0))
        rise(empty)
        rise.update(empty, torch.tensor(True))
    assert fires(rise, [9.0]) == [True]
    assert int(rise.state_dict()["row"]) == 3


@pytest.mark.parametrize("gap", [math.nan, math.inf, None])
def test_a_loss_that_says_nothing_neither_adds_to_the_row_nor_ends_it(gap: float | None) -> None:
    losses = [*SETTLED, 9.0, gap, gap, 9.0, gap, 9.0]
    assert fires(SustainedRise(**ARGUMENTS), losses) == [False] * 9 + [True]


def test_skipped_steps_count() -> None:
    rise = SustainedRise(**ARGUMENTS)
    fires(rise, SETTLED)
    assert fires(rise, [9.0, 9.0, 9.0], accepted=False) == [False, False, True]


def test_silent_without_history() -> None:
    assert not any(fires(SustainedRise(**ARGUMENTS), [1.0, 9.0, 9.0, 9.0, 9.0]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.9, 1.0, 1.1, 9.0, math.nan]), min_size=8, max_size=40), st.data())
def test_equals_a_count_of_spikes_and_resumes_anywhere(losses: list[float], data: Any) -> None:
    spike, row, expected = Spike(8, 6.0, 4, on="loss"), 0, []
    for loss in losses:
        step = evidence(loss)
        stands_out = bool(spike(step))
        if math.isfinite(loss):
            row = row + 1 if stands_out else 0
        expected.append(row >= 3)
        spike.update(step, torch.tensor(not stands_out))
    cut = data.draw(st.integers(0, len(losses)))
    first, second = SustainedRise(**ARGUMENTS), SustainedRise(**ARGUMENTS)
    flags = fires(first, losses[:cut])
    second.load_state_dict(first.state_dict())
    assert flags + fires(second, losses[cut:]) == expected


def test_shows_its_settings() -> None:
    assert repr(SustainedRise(**ARGUMENTS)) == "SustainedRise(patience=3, window=8, threshold=6, min_history=4)"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"patience": 0}, ValueError), ({"patience": 1.5}, TypeError), ({"window": 1}, ValueError)],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        SustainedRise(**arguments)
