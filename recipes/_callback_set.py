"""The callbacks of one variant, each under a name, so that one of them can be changed or left out."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from lightning.pytorch.callbacks import Callback

__all__ = ["CallbackSet"]


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
        named = (self.monitor, self.initialization, self.schedule, self.clipping, self.guard)
        return copy.deepcopy([*(callback for callback in named if callback is not None), *self.more])
