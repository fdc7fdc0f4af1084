"""Long curves as short ones that look the same."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stability_callbacks.report._scalars import Series

__all__ = ["Bin", "bins_of", "envelope"]


class Bin(NamedTuple):
    """What a series holds in a stretch of steps.

    Attributes:
        first: First step at which something was logged.
        last: Last such step.
        least: Least finite value; NaN if there is none.
        most: Largest finite value; NaN if there is none.
        broken: How many values are not finite.
    """

    first: int
    last: int
    least: float
    most: float
    broken: int


def envelope(series: Series, span: tuple[int, int], bins: int) -> Series:
    """Leave out points, and no peak: of each bin the first, least, largest and last stay, and one that is not finite.

    At one bin a pixel the line through the points left covers the same pixels as that through all of them (Jugel et al.
    2014, "M4", VLDB). A value that is not finite breaks a line and must leave a mark, so the first in each bin stays.

    Args:
        series: The series.
        span: First and last step of the axis.
        bins: Number of bins, >= 1.

    Returns:
        The points that stay, at most ``5 * bins``.

    Example:
        >>> values = np.zeros(10_000)
        >>> values[1234] = 9.0
        >>> short = envelope(Series(np.arange(10_000), values), (0, 9_999), bins=10)
        >>> len(short.steps), float(short.values.max())
        (21, 9.0)
    """
    if len(series.steps) <= 5 * bins:
        return series
    kept: set[int] = set()
    for begin, end in _slices(series, span, bins):
        values = series.values[begin:end]
        finite = np.flatnonzero(np.isfinite(values))
        if finite.size:
            extremes = finite[values[finite].argmin()], finite[values[finite].argmax()]
            kept.update(begin + int(place) for place in (finite[0], finite[-1], *extremes))
        if finite.size < values.size:
            kept.add(begin + int(np.flatnonzero(~np.isfinite(values))[0]))
    places = sorted(kept)
    return Series(series.steps[places], series.values[places])


def bins_of(series: Series, span: tuple[int, int], bins: int) -> dict[int, Bin]:
    """What a series holds in each of some equal stretches of steps.

    Args:
        series: The series.
        span: First and last step of the axis.
        bins: Number of stretches.

    Returns:
        The bins that hold something, by their number.
    """
    found = {}
    for begin, end in _slices(series, span, bins):
        values = series.values[begin:end]
        finite = values[np.isfinite(values)]
        least, most = (float(finite.min()), float(finite.max())) if finite.size else (math.nan, math.nan)
        first, last = int(series.steps[begin]), int(series.steps[end - 1])
        place = int(bin_numbers(series.steps[begin : begin + 1], span, bins)[0])
        found[place] = Bin(first, last, least, most, values.size - finite.size)
    return found


def bin_numbers(steps: NDArray[np.int64], span: tuple[int, int], bins: int) -> NDArray[np.int64]:
    """The number of the bin in which each step lies."""
    low, high = span
    width = max(high - low + 1, 1)
    if width * bins < 2**63:
        return np.clip((steps - low) * bins // width, 0, bins - 1)
    shares = (steps.astype(np.float64) - low) / width  # too wide for integers of 64 bits
    return np.clip((shares * bins).astype(np.int64), 0, bins - 1)


def _slices(series: Series, span: tuple[int, int], bins: int) -> list[tuple[int, int]]:
    if not len(series.steps):
        return []
    numbers = bin_numbers(series.steps, span, bins)
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return list(itertools.pairwise(edges))
