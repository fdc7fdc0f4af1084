"""Lets ``LearningRateMonitor`` show the rates that are in force in steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch.callbacks import LearningRateMonitor

from stability_callbacks.engine._lightning import both, callbacks_of
from stability_callbacks.engine._training import Training

__all__ = ["RateDisplay"]

_READINGS = ("on_train_batch_start", "on_train_epoch_start")


class RateDisplay:
    """Shows a trainer's ``LearningRateMonitor`` callbacks, and nobody else, the effective rate of the next step.

    Everyone else finds the base rate in ``group["lr"]`` between steps: schedulers, callbacks that add parameter groups,
    and checkpoints read it as such.

    Args:
        training: The run.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._monitors = [
            each for each in callbacks_of(training.trainer) if isinstance(each, both(LearningRateMonitor))
        ]
        self.remove()  # one that was left after an exception
        for monitor in self._monitors:
            for name in _READINGS:
                setattr(monitor, name, self._shown(getattr(monitor, name)))

    def remove(self) -> None:
        """Give the callbacks their own methods back."""
        for monitor in self._monitors:
            for name in _READINGS:
                vars(monitor).pop(name, None)

    def _shown(self, reads: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(reads)
        def shown(*args: Any, **kwargs: Any) -> Any:
            with self._training.effective_rates():
                return reads(*args, **kwargs)

        return shown
