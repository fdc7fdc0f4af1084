"""Tensors in nested dictionaries and sequences, as optimizers keep their state in."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["flatten", "leaves", "map_leaves", "put_back"]

_SEQUENCES = (list, tuple, deque)
_END = object()


def flatten(value: Any, structure: list[Any], others: list[Any]) -> None:
    """Take something nested apart, quickly: this runs at every snapshot.

    Args:
        value: Something nested.
        structure: Its containers' types and keys, and its tensors, are appended to this. So nothing but ``others`` has
            changed since the last time where each item is the same object.
        others: What else lies in it is appended to this.
    """
    if isinstance(value, Tensor):
        structure.append(value)
    elif isinstance(value, dict):
        structure.append(dict)
        structure.extend(value)
        for each in value.values():
            if isinstance(each, Tensor):
                structure.append(each)
            else:
                flatten(each, structure, others)
    elif isinstance(value, _SEQUENCES):
        structure.append(type(value))
        for each in value:
            flatten(each, structure, others)
        structure.append(_END)
    else:
        structure.append(None)
        others.append(value)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What lies in something nested, in the same order, each with the keys and positions that lead to it.

    Example:
        >>> list(leaves({"step": 3, "history": [1.0, 2.0]}))
        [(('step',), 3), (('history', 0), 1.0), (('history', 1), 2.0)]
    """
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, _SEQUENCES):
        for position, each in enumerate(value):
            yield from leaves(each, (*path, position))
    else:
        yield path, value


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The result of a function of each of them, in the same order, in containers like those of the original.

    Example:
        >>> map_leaves(float, {"step": 3, "history": (1, 2)})
        {'step': 3.0, 'history': (1.0, 2.0)}
    """
    if isinstance(value, dict):
        twin = copy.copy(value)
        twin.update((key, map_leaves(function, each)) for key, each in value.items())
        return twin
    if isinstance(value, _SEQUENCES):
        items = [map_leaves(function, each) for each in value]
        if isinstance(value, deque):
            return deque(items, value.maxlen)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return function(value)


def put_back(live: dict[Any, Any], content: dict[Any, Any], closed: bool) -> None:
    """Give a dictionary, and the dictionaries in it, the content they had, in place.

    Args:
        live: The dictionary as it is now.
        content: The content that it had.
        closed: Whether other keys are removed.
    """
    merged = {}
    for key, value in content.items():
        current = live.get(key)
        if isinstance(current, dict) and isinstance(value, dict):
            put_back(current, value, closed=True)
            merged[key] = current
        else:
            merged[key] = value
    if closed:
        live.clear()
    live.update(merged)
