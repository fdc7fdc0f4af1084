"""Ctrl-C ends a recipe after the step in hand, with a checkpoint from which it goes on bit for bit."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from recipes.results import HistoryLogger, as_history
from stability_callbacks.snapshots import RandomState

__all__ = ["InterruptCheckpoint", "Interrupted", "Interruption", "interruption"]


class Interrupted(Exception):  # noqa: N818 - what happened, not an error
    """The user asked to stop; what was under way can be resumed."""


class Interruption:
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Note the first Ctrl-C instead of raising; a second one has its usual effect."""
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        asked.requested = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class InterruptCheckpoint(Checkpoint):
    """Ends training with a checkpoint once the user has asked to stop; Lightning calls a Checkpoint last of all.

    The checkpoint also carries what Lightning's own lack: the random states, the scalars logged and the time spent.

    Args:
        path: Where the checkpoint goes.
        asked: Tells whether the user asked to stop.
        history: The scalars logged so far.

    Attributes:
        stopped: Whether training was ended so.
    """

    def __init__(self, path: Path, asked: Interruption, history: HistoryLogger) -> None:
        self.path = path
        self.asked = asked
        self.history = history
        self.stopped = False
        self._seconds = 0.0
        self._started_at: float | None = None
        self._last_step = 0
        self._random_state: RandomState | None = None

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._seconds + (0.0 if self._started_at is None else time.perf_counter() - self._started_at)

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": {name: list(series) for name, series in self.history.history.items()},
            "random_state": RandomState.capture()._asdict(),
            "seconds": self.elapsed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.history.history:  # else it was read from a file that has the last step, too
            self.history.history = as_history(state_dict["history"])
        self._random_state = RandomState(**state_dict["random_state"])
        self._seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started_at = time.perf_counter()
        self._last_step = trainer.global_step
        if self._random_state is not None:
            self._random_state.restore()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds, self._started_at = self.elapsed, None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, self._last_step = self._last_step, trainer.global_step
        if self._last_step == step or self.stopped:  # in the midst of an accumulation, gradients would be lost
            return
        # Signals do not reach all processes in the same step, and a checkpoint needs all of them.
        asked = self.asked.requested
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            trainer.save_checkpoint(self.path)
            self.stopped = trainer.should_stop = True
            if not trainer.is_last_batch:
                trainer.limit_val_batches = 0  # Lightning would validate now, and again where the epoch ends
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None  # which would go on all the same
