"""Checks of constructor arguments: each names the argument, the value it got, and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

__all__ = [
    "check_bool",
    "check_choice",
    "check_instance",
    "check_integer",
    "check_number",
    "check_path",
    "check_pattern",
]


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    allow_inf: bool = False,
) -> float:
    """Return ``value`` as a float if it is a real number inside the bounds.

    Args:
        name: The argument's name, for the message.
        value: What the caller passed.
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.
        allow_inf: Whether infinity is a legal value. NaN never is.

    Returns:
        The value as ``float``.

    Raises:
        TypeError: If ``value`` is not a real number (booleans are not).
        ValueError: If ``value`` lies outside the bounds.

    Example:
        >>> check_number("max_norm", 1, above=0)
        1.0
        >>> check_number("max_norm", -1, above=0)
        Traceback (most recent call last):
        ...
        ValueError: `max_norm` must be a number > 0, got -1
    """
    bounds = _bounds(above, at_least, below, at_most)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number{bounds}, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if math.isinf(number) and not allow_inf:
        raise ValueError(f"`{name}` must be a finite number{bounds}, got {value!r}")
    inside = (
        not math.isnan(number)
        and (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (below is None or number < below)
        and (at_most is None or number <= at_most)
    )
    if not inside:
        raise ValueError(f"`{name}` must be a number{bounds}, got {value!r}")
    return number


def check_integer(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """Return ``value`` as an int if it is an integer inside the bounds.

    Raises:
        TypeError: If ``value`` is not an integer (booleans are not).
        ValueError: If ``value`` lies outside the bounds.

    Example:
        >>> check_integer("window", 0, at_least=1)
        Traceback (most recent call last):
        ...
        ValueError: `window` must be an integer >= 1, got 0
    """
    allowed = "an integer" + _bounds(None, at_least, None, at_most)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be {allowed}, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` if it is a boolean.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r} of type {type(value).__name__}")
    return value


def check_choice(name: str, value: Any, choices: Iterable[T]) -> T:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: If it is not; the message lists the choices.

    Example:
        >>> check_choice("per", "tensor", ("total", "layer"))
        Traceback (most recent call last):
        ...
        ValueError: `per` must be one of 'total', 'layer', got 'tensor'
    """
    options = tuple(choices)
    for option in options:
        if type(option) is type(value) and option == value:
            return option
    raise ValueError(f"`{name}` must be one of {', '.join(map(repr, options))}, got {value!r}")


def check_instance(name: str, value: Any, kind: type[T], allowed: str) -> T:
    """Return ``value`` if it is an instance of ``kind``; ``allowed`` says in words what is.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, kind):
        hint = " (a class was passed: call it to make an instance)" if isinstance(value, type) else ""
        raise TypeError(f"`{name}` must be {allowed}, got {value!r} of type {type(value).__name__}{hint}")
    return value


def check_pattern(name: str, value: Any) -> re.Pattern[str]:
    """Return ``value`` compiled as a regular expression.

    Raises:
        TypeError: If ``value`` is not a string.
        ValueError: If it is not a regular expression.
    """
    if not isinstance(value, str):
        raise TypeError(
            f"`{name}` must be a regular expression (a string), got {value!r} of type {type(value).__name__}"
        )
    try:
        return re.compile(value)
    except re.error as error:
        raise ValueError(f"`{name}` must be a regular expression, got {value!r}: {error}") from error


def check_path(name: str, value: Any) -> Path | None:
    """Return ``value`` as a path, or None if it is None.

    Args:
        name: The argument's name.
        value: What the user gave.

    Raises:
        TypeError: If it is neither a string, nor a path, nor None.

    Example:
        >>> check_path("dirpath", None)
    """
    if value is None or isinstance(value, Path):
        return value
    return Path(check_instance(name, value, str, "a path or None"))


def _bounds(above: float | None, at_least: float | None, below: float | None, at_most: float | None) -> str:
    symbols = ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
    limits = [f"{symbol} {limit:g}" for symbol, limit in symbols if limit is not None]
    return f" {' and '.join(limits)}" if limits else ""
