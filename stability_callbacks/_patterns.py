"""Mappings from name patterns to policies: the first pattern found in a name decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from stability_callbacks._validation import check_instance, check_pattern

T = TypeVar("T")

__all__ = ["check_patterns", "first_matches"]


def check_patterns(name: str, value: Any, kind: type[T], policy: str, allowed: str) -> dict[str, T | None]:
    """Return ``value`` as a dictionary if it maps regular expressions to policies or None, and is not empty.

    Args:
        name: The argument's name, for the message.
        value: What the caller passed.
        kind: What a policy is an instance of.
        policy: The same in words: "a clip rule".
        allowed: What the whole argument may be, in words.

    Raises:
        TypeError: If it is not a mapping, or maps to something else.
        ValueError: If it is empty, or a pattern is not a regular expression.
    """
    check_instance(name, value, Mapping, allowed)  # type: ignore[type-abstract]
    if not value:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}")
    for pattern, item in value.items():
        check_pattern(name, pattern)
        if item is not None:
            check_instance(f"{name}[{pattern!r}]", item, kind, f"{policy} or None")
    return dict(value)


def first_matches(patterns: Iterable[str], names: Iterable[str], owner: str, kind: str) -> dict[str, str]:
    """Find the first pattern that each name holds.

    Args:
        patterns: Regular expressions, in order.
        names: Names to search in.
        owner: Whose patterns they are, for the message.
        kind: What the names are the names of, for the message.

    Returns:
        The pattern of each name.

    Raises:
        ValueError: If a name holds no pattern, or a pattern is found in no name.

    Example:
        >>> first_matches(["bias", ".*"], ["head.bias", "head.weight"], "PerGroup", "parameter")
        {'head.bias': 'bias', 'head.weight': '.*'}
        >>> first_matches(["bias"], ["head.bias", "head.weight"], "PerGroup", "parameter")
        Traceback (most recent call last):
        ...
        ValueError: no pattern of PerGroup matches 'head.weight'; patterns: 'bias'
    """
    names = list(names)
    compiled = {pattern: check_pattern("patterns", pattern) for pattern in patterns}
    found = {name: next((text for text, regex in compiled.items() if regex.search(name)), None) for name in names}
    unmatched = [name for name, pattern in found.items() if pattern is None]
    if unmatched:
        raise ValueError(f"no pattern of {owner} matches {_few(unmatched)}; patterns: {_few(list(compiled))}")
    idle = [text for text, regex in compiled.items() if not any(map(regex.search, names))]
    if idle:
        raise ValueError(f"{owner}'s patterns {_few(idle)} match no {kind}; there are: {_few(names)}")
    return {name: pattern for name, pattern in found.items() if pattern is not None}


def _few(names: list[str], most: int = 10) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
