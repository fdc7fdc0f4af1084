"""Comparing collections by the identity of what is in them."""

from __future__ import annotations

from collections.abc import Collection
from operator import is_

__all__ = ["same_objects"]


def same_objects(some: Collection[object], others: Collection[object]) -> bool:
    """Whether two collections hold the very same objects in the same order.

    By living objects: an ``id`` may be given to another one once its owner is gone.

    Example:
        >>> one, other = [1], [1]
        >>> same_objects([one], [one]), same_objects([one], [other]), same_objects([one], [])
        (True, False, False)
    """
    return len(some) == len(others) and all(map(is_, some, others))
