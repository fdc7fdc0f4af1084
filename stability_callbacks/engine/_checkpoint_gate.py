"""Keeps checkpoints of a ruined state from taking the place of good ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from stability_callbacks.engine._lightning import both, callbacks_of, checkpoint_decisions

__all__ = ["CheckpointGate"]


class CheckpointGate:
    """Stands between a trainer's ``ModelCheckpoint`` callbacks and the disk.

    Refused where it decides on a file, ``ModelCheckpoint`` neither writes, nor removes, nor remembers any.

    Args:
        trainer: The trainer.
        refuses: Asked before each save, on every rank: whether the state of training must not be saved.
    """

    def __init__(self, trainer: pl.Trainer, refuses: Callable[[], bool]) -> None:
        self._refuses = refuses
        self._checkpoints = [each for each in callbacks_of(trainer) if isinstance(each, both(ModelCheckpoint))]
        self.remove()  # one that was left after an exception
        for checkpoint in self._checkpoints:
            for name in checkpoint_decisions:
                if hasattr(checkpoint, name):
                    setattr(checkpoint, name, self._gated(checkpoint, getattr(checkpoint, name)))

    def remove(self) -> None:
        """Give the callbacks their own methods back."""
        for checkpoint in self._checkpoints:
            _restore_methods(checkpoint)

    def _gated(self, checkpoint: ModelCheckpoint, method: Callable[..., Any]) -> Callable[..., Any]:
        decides = method.__name__ == "_should_save_on_exception"

        @wraps(method)
        def gated(*args: Any, **kwargs: Any) -> Any:
            if not decides:
                return None if self._refuses() else method(*args, **kwargs)
            saves = method(*args, **kwargs) and not self._refuses()
            _restore_methods(checkpoint)  # after an exception no other hook follows that could do it
            return saves

        return gated


def _restore_methods(checkpoint: ModelCheckpoint) -> None:
    for name in checkpoint_decisions:
        vars(checkpoint).pop(name, None)
