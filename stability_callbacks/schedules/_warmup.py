"""The common frame: a linear warm-up, then a shape; and the shapes that decay to an end."""

from __future__ import annotations

import math
from abc import abstractmethod

from stability_callbacks._validation import check_integer, check_number
from stability_callbacks.schedules._schedule import Schedule
from stability_callbacks.schedules._span import check_span, is_share, span_steps


class WarmupSchedule(Schedule):
    """A linear warm-up from ``start`` to 1, then the shape that the subclass draws."""

    def __init__(self, warmup: int | float, total_steps: int | None, start: float) -> None:
        self.warmup = check_span("warmup", warmup)
        self.total_steps = None if total_steps is None else check_integer("total_steps", total_steps, at_least=1)
        self.start = check_number("start", start, at_least=0, at_most=1)
        if self.total_steps is not None and isinstance(self.warmup, int) and self.warmup > self.total_steps:
            raise ValueError(f"`warmup` must be at most `total_steps` = {self.total_steps}, got {warmup!r}")

    @property
    def needs_total(self) -> bool:
        """Whether a call without ``total_steps`` is an error."""
        return self.total_steps is None and is_share(self.warmup)

    def warmup_steps(self, total_steps: int | None = None) -> int:
        """Return the length of the warm-up.

        Args:
            total_steps: Number of steps of the whole training; the constructor's overrides it.

        Returns:
            The number of steps before the peak. A warm-up longer than the training is shortened to it: less than an
            integer ``warmup`` says so.

        Raises:
            ValueError: If the total is needed and not known.

        Example:
            >>> from stability_callbacks.schedules import WarmupCosine
            >>> WarmupCosine(warmup=0.05).warmup_steps(1000), WarmupCosine(warmup=30).warmup_steps(10)
            (50, 10)
        """
        total = self._total(total_steps)
        steps = span_steps(self.warmup, total)
        return steps if total is None else min(steps, total)

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """Return the multiplier at ``step``.

        Args:
            step: Number of steps attempted before this one, from 0.
            total_steps: Number of steps of the whole training; ``None`` or infinity where it is not known. The
                constructor's overrides it.

        Returns:
            A number in [0, 1]; 1 is the peak.

        Raises:
            TypeError: If ``step`` or ``total_steps`` is not an integer.
            ValueError: If ``step`` is negative, or if the total is needed and not known.
        """
        step = check_integer("step", step, at_least=0)
        total = self._total(total_steps)
        warmup = self.warmup_steps(total)
        if step < warmup:
            return interpolate(self.start, 1.0, step / warmup)
        return self._after_warmup(step, warmup, total)

    @abstractmethod
    def _after_warmup(self, step: int, warmup: int, total: int | None) -> float:
        """Return the multiplier at ``step`` >= ``warmup``, continuing from 1."""

    def _total(self, total_steps: int | None) -> int | None:
        if self.total_steps is not None:
            return self.total_steps
        if total_steps is None or total_steps == math.inf:
            if self.needs_total:
                raise ValueError(
                    f"{self!r} needs the number of training steps, which is not known here: "
                    f"pass `total_steps` to {type(self).__name__}"
                )
            return None
        return check_integer("total_steps", total_steps, at_least=0)


class WarmupDecay(WarmupSchedule):
    """A warm-up, then a decay that reaches ``end`` at the total and stays there."""

    def __init__(self, warmup: int | float, total_steps: int | None, start: float, end: float) -> None:
        super().__init__(warmup, total_steps, start)
        self.end = check_number("end", end, at_least=0, at_most=1)

    @property
    def needs_total(self) -> bool:
        """Whether a call without ``total_steps`` is an error."""
        return self.total_steps is None

    def _after_warmup(self, step: int, warmup: int, total: int | None) -> float:
        # A decay always knows its total: `_total` has seen to it.
        if total is None or step >= total:
            return self.end
        return interpolate(1.0, self.end, self._decayed(step, warmup, total))

    @abstractmethod
    def _decayed(self, step: int, warmup: int, total: int) -> float:
        """Return how much of the way from 1 to ``end`` is done at a step in [``warmup``, ``total``)."""


def interpolate(first: float, last: float, fraction: float) -> float:
    """Return the point that lies ``fraction`` of the way, exact at both ends.

    Example:
        >>> interpolate(1.0, 0.1, 0.0), interpolate(1.0, 0.1, 1.0), interpolate(1.0, 0.0, 0.25)
        (1.0, 0.1, 0.75)
    """
    return (1.0 - fraction) * first + fraction * last
