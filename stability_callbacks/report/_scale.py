"""From values to places on an axis, and the numbers written along it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scale", "number"]

_LOGARITHMIC_FROM = 30.0
_LARGEST = 1e300  # beyond it, and below its inverse, the arithmetic of axes leaves the range of floats


class Scale(NamedTuple):
    """An axis of values.

    Attributes:
        low: The value at its lower end.
        high: The value at its upper end.
        logarithmic: Whether it is logarithmic.
    """

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def fitting(cls, values: NDArray[np.float64], logarithmic: bool | None = None) -> Scale:
        """The scale on which some values fill an axis, with a margin.

        Args:
            values: The values, any shape. Those that are not finite do not count.
            logarithmic: Whether it shall be logarithmic, if there is a positive value. None: if all are positive and
                the largest is more than 30 times the smallest.

        Returns:
            The scale.

        Example:
            >>> Scale.fitting(np.array([1.0, 1000.0, math.nan]))
            Scale(low=0.7..., high=1412.5..., logarithmic=True)
        """
        values = np.clip(values[np.isfinite(values)], -_LARGEST, _LARGEST)
        positive = values[values > 1 / _LARGEST]
        if logarithmic is None:
            least, most = (values.min(), values.max()) if values.size else (0.0, 0.0)
            logarithmic = bool(least > 1 / _LARGEST and most > _LOGARITHMIC_FROM * least)
        if logarithmic and positive.size:
            low, high = np.log10(positive.min()), np.log10(positive.max())
            margin = max(0.05 * (high - low), 0.05)
            return cls(float(10.0 ** (low - margin)), float(10.0 ** min(high + margin, 308)), True)
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        margin = 0.06 * (high - low)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # too close to each other for ticks in between
            margin = 0.1 * abs(high)
        if margin < 1 / _LARGEST:
            margin = 1.0
        return cls(0.0 if 0 <= low <= 2 * margin else low - margin, high + margin)

    def place(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Places on the axis, from 0 at its lower end to 1; NaN where a value is. What is beyond it is at its end."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.logarithmic:
                low, high = math.log10(self.low), math.log10(self.high)
                values = np.log10(np.maximum(values, self.low))
            else:
                low, high = self.low, self.high
            return (np.clip(values, low, high) - low) / (high - low)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Round values along the axis: their places, and how they are written.

        Args:
            most: How many there may be, >= 2.

        Example:
            >>> Scale(0.0, 10.0).ticks()
            [(0.0, '0'), (0.5, '5'), (1.0, '10')]
        """
        values = self._decades(most) if self.logarithmic else []
        if len(values) < 2:
            values = self._steps(most)
        places = self.place(np.array(values, np.float64))
        return [(float(place), number(value)) for place, value in zip(places, values, strict=True)]

    def _decades(self, most: int) -> list[float]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = max(math.ceil((last - first + 1) / most), 1)
        return [10.0**exponent for exponent in range(first, last + 1) if exponent % every == 0]

    def _steps(self, most: int) -> list[float]:
        span = self.high - self.low
        unit = 10.0 ** math.floor(math.log10(span / most))
        step = next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= most - 1)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number as short as it can be read.

    Example:
        >>> [number(each) for each in (0.0001, 0.25, 12345.678, 2e6, math.nan)]
        ['1e-4', '0.25', '12,346', '2e6', 'NaN']
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
