"""Is the healed variant better than the plain one, seed by seed?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest, ttest_rel

__all__ = ["PairedComparison", "compare_in_pairs"]


@dataclass(frozen=True)
class PairedComparison:
    """What the pairs say.

    Attributes:
        pairs: Number of pairs.
        better: In how many of them the second value is the better one; a finite value is better than one that is not.
        difference: Mean improvement over the pairs, positive if the second values are better; NaN if a value is not
            finite.
        interval: Its 95 % confidence interval, by Student's t; NaN where the gains have no spread to measure it by.
        t_test: One-sided p-value of the paired t-test; NaN where ``interval`` is.
        sign_test: One-sided p-value of the exact sign test, which asks nothing of the distribution; ties count against.
    """

    pairs: int
    better: int
    difference: float
    interval: tuple[float, float]
    t_test: float
    sign_test: float


def compare_in_pairs(
    first: Sequence[float], second: Sequence[float], mode: Literal["max", "min"] = "max"
) -> PairedComparison:
    """Compare two series of values in which equal places belong together, as those of one seed do.

    Args:
        first: Values without the cure.
        second: Values with it, in the same order.
        mode: Whether larger ("max") or smaller ("min") values are better.

    Raises:
        ValueError: If there is no pair, or the numbers of values differ.

    Example:
        >>> pairs = compare_in_pairs([0.10, 0.12, 0.11], [0.90, 0.94, 0.92])
        >>> pairs.better, round(pairs.difference, 3), pairs.sign_test
        (3, 0.81, 0.125)
    """
    if not first or len(first) != len(second):
        raise ValueError(f"`first` and `second` must hold as many values, and at least 1: {len(first)}, {len(second)}")
    sign = 1.0 if mode == "max" else -1.0
    before, after = (sign * np.asarray(values, dtype=np.float64) for values in (first, second))
    better = int(np.sum(np.where(np.isfinite(after), ~np.isfinite(before) | (after > before), False)))
    sign_test = float(binomtest(better, len(first), alternative="greater").pvalue)
    gains = after - before
    mean = float(gains.mean()) if np.isfinite(gains).all() else math.nan
    if math.isnan(mean) or len(gains) < 2 or gains.std() <= 1e-9 * np.abs(gains).max():  # nothing for a t-test
        return PairedComparison(len(gains), better, mean, (math.nan, math.nan), math.nan, sign_test)
    test = ttest_rel(after, before, alternative="greater")
    # The interval is two-sided, whatever the test asks.
    low, high = ttest_rel(after, before).confidence_interval(0.95)
    return PairedComparison(len(gains), better, mean, (float(low), float(high)), float(test.pvalue), sign_test)
