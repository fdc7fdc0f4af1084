"""Faults of all kinds in one run, which ends as if there had been none; ``benchmarks/soak.py`` is the long version."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.soak import KINDS, draw_faults, has_healed, train

STEPS = 340
FAULTS = 3 * len(KINDS)

# The faults undo about half of the steps; sound runs of this length, from different seeds, differ by 0.01.
TOLERANCE = 0.05


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More do not pay for networks so small, and are slow where other processes are at work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["MLP", "ResNet"])
def test_a_run_with_faults_of_all_kinds_ends_like_one_without(name: str) -> None:
    faults = draw_faults(FAULTS, STEPS)
    assert faults.keys() == KINDS.keys()
    clean = train(name, STEPS, seed=0)
    soaked = train(name, STEPS, seed=0, faults=list(faults.values()))
    assert clean.accuracy > 0.95
    assert (clean.faults, clean.skipped_steps, clean.rollbacks) == (0, 0, 0)
    assert soaked.faults == FAULTS
    assert soaked.skipped_steps >= FAULTS // 2
    assert soaked.rollbacks >= FAULTS // 4
    assert has_healed(soaked, clean.accuracy - TOLERANCE), soaked


@pytest.mark.parametrize(
    "kind", ["activation inf", "buffer nan", "gradient nan", "input nan", "loss nan", "weight nan"]
)
def test_one_fault_ruins_a_run_without_the_callbacks(kind: str) -> None:
    run = train("MLP", STEPS, seed=0, faults=[draw_faults(FAULTS, STEPS)[kind]], protected=False)
    assert run.faults == 1
    assert run.died_at is not None
    assert run.accuracy < 0.2
    assert run.nonfinite
    assert not has_healed(run, 0.0)


def test_faults_are_drawn_evenly_and_never_two_in_a_step() -> None:
    faults = draw_faults(200, 1200, seed=1)
    steps = [step for fault in faults.values() for step in fault.steps]  # type: ignore[union-attr]
    assert len(steps) == len(set(steps)) == 210
    assert {len(fault.steps) for fault in faults.values()} == {14}  # type: ignore[arg-type]
    assert min(steps) >= 100
    assert max(steps) < 1160
