"""The callbacks of one variant, each under a name, so that one of them can be changed or left out."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields

from lightning.pytorch.callbacks import Callback

__all__ = ["CallbackSet"]

WATCHING = "monitor"


@dataclass
class CallbackSet:
    """Callbacks by their task; null leaves one out.

    Attributes:
        monitor: Watches the gradients.
        initialization: Sets the weights before training.
        schedule: Moves the learning rate.
        clipping: Bounds the gradients.
        guard: Skips steps that would do harm.
        more: Further callbacks.
    """

    monitor: Callback | None = None
    initialization: Callback | None = None
    schedule: Callback | None = None
    clipping: Callback | None = None
    guard: Callback | None = None
    more: list[Callback] = field(default_factory=list)

    def fresh(self) -> list[Callback]:
        """Copies of the callbacks in use: what one run leaves in them does not reach the next."""
        return copy.deepcopy([*self._named().values(), *self.more])

    def ablations(self) -> dict[str, CallbackSet]:
        """For each callback that acts on training, by its name, the set without it."""
        return {name: self._without(name) for name in self._named() if name != WATCHING}

    def _without(self, name: str) -> CallbackSet:
        rest = copy.copy(self)
        setattr(rest, name, None)
        return rest

    def _named(self) -> dict[str, Callback]:
        named = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: callback for name, callback in named.items() if isinstance(callback, Callback)}
