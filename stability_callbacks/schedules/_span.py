"""A span of training: so many steps if an integer, a share of the total if a float."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

__all__ = ["check_span", "is_share", "span_steps"]


def check_span(name: str, value: Any) -> int | float:
    """Return ``value`` if it is a number of steps (an integer >= 0) or a share of the total (a float in [0, 1]).

    Raises:
        TypeError: If ``value`` is no real number (booleans are not).
        ValueError: If it is out of bounds.

    Example:
        >>> check_span("warmup", 1), check_span("warmup", 1.0)
        (1, 1.0)
        >>> check_span("warmup", 1.5)
        Traceback (most recent call last):
        ...
        ValueError: `warmup` must be steps (an integer >= 0) or a share of the total (a float in [0, 1]), got 1.5
    """
    allowed = "steps (an integer >= 0) or a share of the total (a float in [0, 1])"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be {allowed}, got {value!r} of type {type(value).__name__}")
    span: int | float = int(value) if isinstance(value, Integral) else float(value)
    # Written so that NaN fails.
    if not (span >= 0 and (isinstance(span, int) or span <= 1)):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}")
    return span


def is_share(span: int | float) -> bool:
    """Whether the span has a length only once the total is known; a share of 0 has none, whatever the total."""
    return isinstance(span, float) and span > 0


def span_steps(span: int | float, total_steps: int | None) -> int:
    """Return the length of a span in steps.

    Args:
        span: A number of steps, or a share.
        total_steps: What a share is a share of; ``None`` is allowed where ``is_share`` says no.

    Returns:
        A share to the nearest step (halves go up), a number of steps as it is.

    Example:
        >>> span_steps(0.05, 1000), span_steps(0.05, 50), span_steps(30, None)
        (50, 3, 30)
    """
    if isinstance(span, int) or total_steps is None:
        return int(span)
    return math.floor(span * total_steps + 0.5)
