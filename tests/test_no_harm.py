"""What the benchmark of sound runs concludes from its figures, and that one of its runs is what it says."""

from __future__ import annotations

import pytest

from benchmarks.no_harm import compare, train


def test_equal_scores_are_no_worse() -> None:
    result = compare([0.9, 0.8, 0.95], [0.9, 0.8, 0.95], higher_is_better=True)
    assert (result.effect, result.low, result.high) == (0, 0, 0)
    assert result.verdict == "no worse"


def test_the_interval_is_that_of_paired_differences() -> None:
    result = compare([1.0, 2.0, 3.0, 4.0, 5.0], [1.1, 2.3, 3.2, 4.4, 5.0], higher_is_better=True)
    assert result.effect == pytest.approx(0.2)
    assert result.high - result.effect == pytest.approx(2.776445 * 0.158114 / 5**0.5, rel=1e-5)
    assert result.noise == pytest.approx(2.5**0.5)


@pytest.mark.parametrize("higher", [True, False])
def test_harm_is_told(higher: bool) -> None:
    sign = 1 if higher else -1
    plain = [0.9, 0.91, 0.92, 0.93, 0.94]
    assert compare(plain, [x - sign * 0.5 for x in plain], higher).verdict == "**worse**"
    small = [x - sign * (0.005 + 0.0001 * i) for i, x in enumerate(plain)]
    assert compare(plain, small, higher).verdict == "worse, within the noise"
    assert compare(plain, [x + sign * 0.5 for x in plain], higher).verdict == "no worse"


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_arms_of_a_run_that_nothing_acts_on_end_equal() -> None:
    plain, suite, observers, former = (
        train("CNN, batch norm, SGD 0.001, low rate", 0, arm) for arm in ("plain", "suite", "observers", "former")
    )
    assert plain.weights == suite.weights == observers.weights
    assert suite.clipped == suite.skipped == suite.rollbacks == suite.incidents == observers.incidents == 0
    assert former.score < plain.score - 0.2
