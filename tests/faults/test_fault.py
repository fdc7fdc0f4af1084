"""When a fault is due, what it draws, and which arguments it takes."""

from __future__ import annotations

import copy
import math
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stability_callbacks.faults import Fault, Injection

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("steps", "due"),
    [(3, [3]), ([5, 1, 5], [1, 5]), ((2,), [2]), (range(1, 8, 3), [1, 4, 7]), (range(7, 0, -3), [1, 4, 7])],
)
def test_is_due_in_the_steps_given(steps: Any, due: list[int]) -> None:
    fault = Fault("input", steps=steps)
    assert [step for step in range(10) if fault.is_due(step)] == due


@pytest.mark.parametrize("probability", [0.02, 0.3, 0.9])
def test_probability_is_the_frequency(probability: float) -> None:
    steps = 5000
    hits = sum(Fault("loss", probability=probability, seed=1).is_due(step) for step in range(steps))
    # Hoeffding: farther away than this with probability 1e-6.
    assert abs(hits / steps - probability) < math.sqrt(math.log(2e6) / (2 * steps))


def test_certain_probability_hits_every_step() -> None:
    assert all(Fault("loss", probability=1).is_due(step) for step in range(1000))


def test_hits_of_steps_and_of_different_faults_are_independent() -> None:
    steps = 4000
    kinds = [("input", "nan", 0), ("gradient", "nan", 0), ("input", "inf", 0), ("input", "nan", 1)]
    flags = torch.tensor(
        [[Fault(t, v, probability=0.5, seed=s).is_due(step) for step in range(steps)] for t, v, s in kinds]
    ).double()
    shifted = torch.cat([flags, flags[:1].roll(1, 1)])
    correlations = torch.corrcoef(shifted) - torch.eye(len(kinds) + 1)
    assert correlations.abs().max() < 5 / math.sqrt(steps)


def test_draws_are_the_same_in_another_process() -> None:
    fault = Fault("input", probability=0.3, where="x", seed=4)
    code = (
        "from stability_callbacks.faults import Fault\n"
        "fault = Fault('input', probability=0.3, where='x', seed=4)\n"
        "print([step for step in range(50) if fault.is_due(step)], fault.stream(9, 'where').random())"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    here = f"{[step for step in range(50) if fault.is_due(step)]} {fault.stream(9, 'where').random()}"
    assert ran.stdout.strip() == here


def test_draws_touch_no_global_random_state() -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]  # noqa: NPY002

    before = states()
    Fault("input", probability=0.5).is_due(3)
    assert states() == before


@pytest.mark.parametrize(
    ("given", "kept"),
    [("nan", "nan"), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (1000, 1000.0), (np.float32(-2), -2.0)],
)
def test_values_and_their_numbers(given: Any, kept: Any) -> None:
    fault = Fault("input", given, steps=0)
    assert fault.value == kept
    assert type(fault.value) is type(kept)
    assert repr(fault.factor) == repr(float(kept))


def test_rank_and_where() -> None:
    fault = Fault("weight", steps=0, where=r"head\.", rank=1)
    assert (fault.hits(0), fault.hits(1)) == (False, True)
    assert (fault.fits("net.head.weight"), fault.fits("net.header")) == (True, False)
    assert Fault("weight", steps=0).hits(7)
    assert Fault("weight", steps=0).fits("anything")


def test_representation_and_copies() -> None:
    fault = Fault("weight", -2, steps=range(3), where="head", rank=1, seed=5)
    assert repr(fault) == (
        "Fault(target='weight', value=-2.0, steps=range(0, 3), probability=None, where='head', rank=1, seed=5)"
    )
    for copied in (copy.deepcopy(fault), pickle.loads(pickle.dumps(fault)), eval(repr(fault))):
        assert vars(copied) == vars(fault)


def test_steps_are_not_those_of_the_callers_list() -> None:
    steps = [1, 2]
    fault = Fault("input", steps=steps)
    steps.append(3)
    assert fault.steps == [1, 2]


WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "`target` must be one of 'activation', 'buffer'", {"target": "weights", "steps": 0}),
    (ValueError, "`value` must be 'nan', 'inf', '-inf' or a number, got 'NaN'", {"value": "NaN", "steps": 0}),
    (TypeError, "`value` must be a number, got None", {"value": None, "steps": 0}),
    (TypeError, "`value` must be a number, got True", {"value": True, "steps": 0}),
    (ValueError, "one of `steps` and `probability` must be given, got neither", {}),
    (ValueError, "got steps=1 and probability=0.5", {"steps": 1, "probability": 0.5}),
    (ValueError, "`steps` must be an integer >= 0, got -1", {"steps": -1}),
    (TypeError, "`steps` must be an integer >= 0, got '3'", {"steps": "3"}),
    (TypeError, "`steps` must be an integer >= 0, got 1.5", {"steps": 1.5}),
    (ValueError, "`steps` must hold at least one step", {"steps": []}),
    (ValueError, "`steps` must hold at least one step", {"steps": range(0)}),
    (ValueError, "`steps` must be an integer >= 0, got -2", {"steps": range(4, -3, -1)}),
    (ValueError, "`steps[1]` must be an integer >= 0, got -1", {"steps": [0, -1]}),
    (ValueError, "`probability` must be a number > 0 and <= 1, got 0", {"probability": 0}),
    (ValueError, "`probability` must be a number > 0 and <= 1, got 1.1", {"probability": 1.1}),
    (ValueError, "`where` must be a regular expression, got '('", {"steps": 0, "where": "("}),
    (TypeError, "`where` must be a regular expression", {"steps": 0, "where": 3}),
    (ValueError, "`where` must be None for the target 'loss'", {"target": "loss", "steps": 0, "where": "x"}),
    (
        ValueError,
        "`value` must be a number > 0 for the target 'learning_rate'",
        {"target": "learning_rate", "steps": 0},
    ),
    (ValueError, "`value` must be a number > 0", {"target": "learning_rate", "value": 0, "steps": 0}),
    (ValueError, "`value` must be a finite number > 0", {"target": "learning_rate", "value": math.inf, "steps": 0}),
    (ValueError, "`rank` must be an integer >= 0, got -1", {"steps": 0, "rank": -1}),
    (TypeError, "`rank` must be an integer", {"steps": 0, "rank": "0"}),
    (ValueError, "`seed` must be an integer >= 0, got -1", {"steps": 0, "seed": -1}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
def test_wrong_arguments(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Fault(**{"target": "input", **arguments})


def test_an_injection_reads_as_a_sentence() -> None:
    assert str(Injection(3, "weight", "nan", "net.weight", 1)) == "nan into weight net.weight in step 3 on rank 1"
    assert str(Injection(0, "loss", 100.0, "")) == "factor 100 on loss in step 0"
