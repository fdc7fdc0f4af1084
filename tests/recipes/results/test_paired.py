from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from recipes.results._paired import compare_in_pairs

NAN, INF = math.nan, math.inf
VALUES = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=8)


def test_against_the_formula_of_the_paired_t_test() -> None:
    first, second = [0.1, 0.2, 0.15, 0.12], [0.9, 0.8, 0.95, 0.7]
    gains = np.subtract(second, first)
    error = gains.std(ddof=1) / math.sqrt(4)
    pairs = compare_in_pairs(first, second)
    assert pairs.difference == pytest.approx(gains.mean(), rel=1e-12)
    assert pairs.t_test == pytest.approx(student.sf(gains.mean() / error, df=3), rel=1e-9)
    reach = student.ppf(0.975, df=3) * error
    assert pairs.interval == pytest.approx((gains.mean() - reach, gains.mean() + reach), rel=1e-9)
    assert (pairs.better, pairs.pairs, pairs.sign_test) == (4, 4, 1 / 16)


def test_smaller_is_better_where_it_is_said_so() -> None:
    up, down = compare_in_pairs([1.0, 2.0], [3.0, 5.0]), compare_in_pairs([3.0, 5.0], [1.0, 2.0], "min")
    assert up == down
    assert up.difference == 2.5
    assert compare_in_pairs([1.0, 2.0], [3.0, 5.0], "min").better == 0


@pytest.mark.parametrize(
    ("first", "second", "better"),
    [([NAN], [0.1], 1), ([INF], [0.1], 1), ([0.1], [NAN], 0), ([NAN], [NAN], 0), ([0.1], [INF], 0), ([0.5], [0.5], 0)],
)
def test_a_finite_value_is_better_than_none(first: list[float], second: list[float], better: int) -> None:
    for mode in ("max", "min"):
        pairs = compare_in_pairs(first, second, mode)  # type: ignore[arg-type]
        assert pairs.better == better
        assert math.isnan(pairs.t_test)
        assert pairs.sign_test == (0.5 if better else 1.0)


@pytest.mark.parametrize(("first", "second"), [([0.0, 0.0], [1.0, 1.0]), ([0.1, 0.2], [0.4, 0.5])])
def test_constant_gains_have_no_spread_to_test_by(first: list[float], second: list[float]) -> None:
    pairs = compare_in_pairs(first, second)
    assert pairs.difference == pytest.approx(second[0] - first[0])
    assert math.isnan(pairs.t_test)
    assert math.isnan(pairs.interval[0])
    assert (pairs.better, pairs.sign_test) == (2, 0.25)


@given(VALUES)
def test_exchanging_the_sides_turns_the_difference_round(values: list[tuple[float, float]]) -> None:
    first, second = [one for one, _ in values], [two for _, two in values]
    one, other = compare_in_pairs(first, second), compare_in_pairs(second, first)
    assert one.difference == pytest.approx(-other.difference)
    if not math.isnan(one.t_test):
        assert one.interval[0] <= one.difference <= one.interval[1]
    ties = sum(a == b for a, b in values)
    assert one.better + other.better + ties == len(values)


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0])])
def test_series_must_pair_up(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match="must hold as many values"):
        compare_in_pairs(first, second)
