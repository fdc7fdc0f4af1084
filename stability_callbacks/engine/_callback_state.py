"""The states of callbacks in checkpoints, which outlive the version that wrote them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["STATE_VERSION", "load_in_place"]

STATE_VERSION = 2
"""Of states that hold a number; the first ones held none, nor do those of ``StepGuard`` and ``LRSchedule`` now.

What a state lacks is as in a new object, and what a callback does not know is left alone, so that older and later
states can be read.
"""


def load_in_place(live: list[Any], states: Sequence[Sequence[Any]], make: Callable[[], Any]) -> None:
    """Load what clip rules or detectors have learnt, of each optimizer, into the objects that are in use.

    A ring of snapshots knows these objects, and a state may be loaded in the middle of training, as a learning rate
    finder does at a milestone.

    Args:
        live: For each optimizer a list of objects; what the states lack is added or as new.
        states: For each optimizer the states of its objects.
        make: Makes an optimizer's list of new objects.
    """
    live.extend(make() for _ in range(len(states) - len(live)))
    for index, own in enumerate(live):
        fresh = make()
        known = states[index] if index < len(states) else ()
        for position, item in enumerate(own):
            item.load_state_dict(known[position] if position < len(known) else fresh[position].state_dict())
