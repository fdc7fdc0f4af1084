"""Keeps checkpoints of a ruined state from taking the place of good ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["CheckpointGate"]

# Where ModelCheckpoint decides on one file: what it writes, removes and remembers. Refused here, it does none of them.
_GATED = ("_save_topk_checkpoint", "_save_last_checkpoint", "_should_save_on_exception")


class CheckpointGate:
    """Stands between a trainer's ``ModelCheckpoint`` callbacks and the disk.

    Args:
        trainer: The trainer.
        refuses: Asked before each save, on every rank: whether the state of training must not be saved.
    """

    def __init__(self, trainer: pl.Trainer, refuses: Callable[[], bool]) -> None:
        self._refuses = refuses
        self._checkpoints = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint)
        ]
        self.remove()  # one that was left after an exception
        for checkpoint in self._checkpoints:
            for name in _GATED:
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
    for name in _GATED:
        vars(checkpoint).pop(name, None)
