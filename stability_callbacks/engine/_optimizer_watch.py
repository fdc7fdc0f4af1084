"""Looks at a trainer's optimizers right before each of their steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning.pytorch as pl

__all__ = ["OptimizerWatch"]

_FUNNEL = "optimizer_step"


class OptimizerWatch:
    """Calls a function before each optimizer step, before the optimizer's own hooks, the forward and backward pass.

    Automatic and manual optimization step optimizers through the strategy alone. Who replaces them does so anywhere
    (``trainer.strategy.setup_optimizers`` in a callback's hook), so this is the last place where a new one can still be
    reached into before it steps.

    Args:
        trainer: The trainer.
        look: Called before each step.
    """

    def __init__(self, trainer: pl.Trainer, look: Callable[[], None]) -> None:
        self._strategy = trainer.strategy
        self.remove()  # one that was left after an exception
        steps = getattr(self._strategy, _FUNNEL)

        @wraps(steps)
        def watched(*args: Any, **kwargs: Any) -> Any:
            look()
            return steps(*args, **kwargs)

        setattr(self._strategy, _FUNNEL, watched)

    def remove(self) -> None:
        """Give the strategy its own method back."""
        vars(self._strategy).pop(_FUNNEL, None)
