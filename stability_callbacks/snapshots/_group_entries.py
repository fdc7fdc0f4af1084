"""State that optimizers keep outside of ``optimizer.state``: in parameter groups, or in attributes of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from stability_callbacks._optimizers import is_of_torch
from stability_callbacks.snapshots._nested import map_leaves

__all__ = ["GroupEntries", "GroupWrites", "entries_of", "optimizers_within"]

# Parameter groups share their keys as a rule, and there may be hundreds of them.
_WATCHED_GROUPS = 8

# Never those of `step()`: parameters, learning rates, which belong to the clock, and what torch writes around it.
_NEVER = frozenset({"params", "lr", "initial_lr", "found_inf", "grad_scale", "_opt_called", "_step_count"})


class GroupWrites:
    """Finds out what an optimizer's arithmetic writes outside of ``optimizer.state``.

    Schedule-free optimizers keep ``k`` and ``weight_sum`` in parameter groups, Prodigy ``d``, many a step count. They
    stand beside hyper-parameters that schedulers and users write. What tells them apart is when they change: compared
    right before and right after the arithmetic, in ordinary steps. Numbers are compared on the host, tensors by
    identity and version. Torch's own optimizers write nothing there and are not looked at.

    Args:
        optimizer: The optimizer.
        written: The keys and attributes that were seen to change are added to this.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> type(optimizer).__module__  # what it does is known
        'torch.optim.sgd'
        >>> GroupWrites(optimizer, set()).look()
    """

    def __init__(self, optimizer: Any, written: set[str]) -> None:
        self._optimizer = optimizer
        self._written = written
        self._known = is_of_torch(optimizer)
        self._before: list[dict[str, Any]] = []

    def look(self) -> None:
        """The arithmetic is about to run."""
        if not self._known:
            self._before = [{key: _mark(value) for key, value in each.items()} for each in self._watched()]

    def compare(self) -> None:
        """The arithmetic has run."""
        if not self._before:
            return
        for before, now in zip(self._before, self._watched(), strict=False):
            for key, value in now.items():
                if key not in self._written and key not in _NEVER and before.get(key, _MISSING) != _mark(value):
                    self._written.add(key)
        self._before = []

    def _watched(self) -> list[dict[str, Any]]:
        attributes = [_simple_attributes(each) for each in optimizers_within(self._optimizer)]
        return [*attributes, *self._optimizer.param_groups[:_WATCHED_GROUPS]]


class GroupEntries:
    """Copies of what an optimizer keeps in its parameter groups and in simple attributes.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._groups = [
            {key: map_leaves(_copy, value) for key, value in group.items() if key not in _NEVER}
            for group in optimizer.param_groups
        ]
        self._attributes = [
            (each, {name: _copy(value) for name, value in _simple_attributes(each).items() if name not in _NEVER})
            for each in optimizers_within(optimizer)
        ]

    def restore(self, written: AbstractSet[str]) -> None:
        """Put back the entries with these keys, and remove those that did not exist; groups that came later stay.

        Args:
            written: The keys that the optimizer's arithmetic writes.
        """
        for group, entries in zip(self._optimizer.param_groups, self._groups, strict=False):
            for key in written - entries.keys():
                group.pop(key, None)
            _put_back(group, entries, written)
        for owner, entries in self._attributes:
            _put_back(vars(owner), entries, written)


def optimizers_within(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it wraps, as Lookahead does, of each once.

    Args:
        optimizer: The optimizer.

    Yields:
        Objects with ``param_groups``, ``state`` and ``step``.
    """
    seen: set[int] = set()
    waiting = [optimizer]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [inner for inner in vars(each).values() if _is_optimizer(inner)]


def entries_of(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """The numbers and tensors in an optimizer's parameter groups, and those that are attributes.

    Args:
        optimizer: The optimizer.

    Yields:
        Name and value.
    """
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, (float, Tensor)):
                yield f"param_groups.{index}.{key}", value
    for owner in optimizers_within(optimizer):
        for name, value in _simple_attributes(owner).items():
            if name not in _NEVER and isinstance(value, (float, Tensor)):
                yield name, value


_MISSING = object()


def _is_optimizer(value: Any) -> bool:
    return not isinstance(value, (type, Tensor)) and all(
        hasattr(value, name) for name in ("param_groups", "state", "step", "zero_grad")
    )


def _simple_attributes(owner: Any) -> dict[str, Any]:
    """Numbers and tensors; what else an object holds is no state of its arithmetic, or can't be told from it."""
    return {name: value for name, value in vars(owner).items() if isinstance(value, (int, float, complex, Tensor))}


def _mark(value: Any) -> Any:
    """What differs once a value was written to."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, (list, tuple)):
        return [_mark(each) for each in value]
    if isinstance(value, dict):
        return {key: _mark(each) for key, each in value.items()}
    return value if isinstance(value, (int, float, complex, str, bytes, type(None))) else id(value)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@torch.no_grad()
def _put_back(live: dict[str, Any], entries: dict[str, Any], written: AbstractSet[str]) -> None:
    for key in written & entries.keys():
        now, then = live.get(key), entries[key]
        if isinstance(now, Tensor) and isinstance(then, Tensor) and _alike(now, then):
            now.copy_(then)  # a compiled optimizer reads from the very tensor that it was given
        else:
            live[key] = map_leaves(_copy, then)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
