"""A setting over all its seeds: medians, extremes, and the verdict of most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from recipes.gradient_flow._measurement import Measurement
from recipes.gradient_flow._study import Observation, Setting
from recipes.gradient_flow._verdict import VERDICTS, Verdict

__all__ = ["Spread", "Summary", "spread", "summarize"]


class Spread(NamedTuple):
    """Smallest, median and largest of some numbers, each of them one of these numbers."""

    low: float
    median: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Order numbers; NaN, which is 0 / 0 here, counts as the smallest.

    Example:
        >>> spread([3.0, math.nan, 0.0])
        Spread(low=nan, median=0.0, high=3.0)
    """
    ordered = sorted(values, key=lambda value: -1.0 if math.isnan(value) else value)
    return Spread(ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1])


class Summary(NamedTuple):
    """The observations of a setting, one a seed."""

    setting: Setting
    observations: Sequence[Observation]

    def of(self, quantity: Callable[[Measurement], float]) -> Spread:
        """The spread of a quantity over the seeds."""
        return spread(quantity(observation.measurement) for observation in self.observations)

    def by_layer(self, quantity: Callable[[Measurement], Sequence[float]]) -> list[Spread]:
        """The spread of a quantity in each layer over the seeds."""
        return [
            spread(values)
            for values in zip(*(quantity(observation.measurement) for observation in self.observations), strict=True)
        ]

    @property
    def verdict(self) -> Verdict:
        """The verdict on most seeds; of two with as many, the graver."""
        counts = Counter(observation.verdict for observation in self.observations)
        return max(VERDICTS, key=lambda each: counts[each])

    @property
    def agreeing(self) -> int:
        """How many seeds have this verdict."""
        return sum(observation.verdict == self.verdict for observation in self.observations)


def summarize(observations: Iterable[Observation]) -> list[Summary]:
    """Summarize observations, of which those of a setting follow each other.

    A setting that an interruption left with fewer seeds than others is left out.
    """
    summaries = [Summary(setting, list(group)) for setting, group in groupby(observations, lambda each: each.setting)]
    seeds = max((len(each.observations) for each in summaries), default=0)
    return [each for each in summaries if len(each.observations) == seeds]
