"""How many steps each optimizer has attempted, and how many there will be: what schedules go by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from stability_callbacks.engine._lightning import MisconfigurationException, both, callbacks_of
from stability_callbacks.engine._training import Training
from stability_callbacks.schedules import Schedule

__all__ = ["StepClock"]


class StepClock:
    """Counts the steps that each optimizer attempted, skipped ones included.

    Attributes:
        attempted: Number of steps attempted, for each optimizer.
        total_steps: Number of steps that each optimizer will make; None where no schedule needs to know.
    """

    def __init__(self) -> None:
        self.attempted: list[int] = []
        self.total_steps: int | None = None

    def prepare(self, training: Training, schedules: Sequence[Schedule]) -> None:
        """Find out where training stands and, if a schedule needs it, how long it is.

        Args:
            training: The run.
            schedules: The schedules that go by this clock.

        Raises:
            MisconfigurationException: If a schedule needs a total that can't be known.
        """
        trainer, optimizers = training.trainer, len(training.steps)
        if len(self.attempted) != optimizers:
            # A checkpoint without this callback: Lightning's count of steps is that of all optimizers together.
            self.attempted = [trainer.global_step // max(optimizers, 1)] * optimizers
        needing = [schedule for schedule in schedules if schedule.needs_total]
        self.total_steps = _total_steps(trainer, needing[0], optimizers) if needing else None

    def make_room(self, training: Training) -> None:
        """Optimizers came during training: count their steps from 0."""
        self.attempted += [0] * (len(training.steps) - len(self.attempted))

    def total_for(self, schedule: Schedule) -> int | None:
        """The number of steps that a schedule goes by; None where it can do without."""
        return self.total_steps if schedule.needs_total else schedule.total_steps


def _total_steps(trainer: pl.Trainer, schedule: Schedule, optimizers: int) -> int:
    total = _estimated_steps(trainer)
    if total < 0 or math.isinf(total):
        raise MisconfigurationException(
            f"{schedule!r} needs to know how many steps training has, and the Trainer can't tell (it has no limit, or "
            "the data set has no length). Say it: the schedule's `total_steps`, or Trainer(max_steps=...)."
        )
    if optimizers > 1 and trainer.max_steps > 0:
        # `max_steps` counts the steps of all optimizers.
        total = min(total, math.ceil(trainer.max_steps / optimizers))
    return max(int(total), 1)


def _estimated_steps(trainer: pl.Trainer) -> int | float:
    """The trainer's estimate of its steps, mended where accumulation changes between epochs; < 0 or inf if unknown."""
    total, epochs = trainer.estimated_stepping_batches, trainer.max_epochs or 0
    for callback in callbacks_of(trainer):
        if isinstance(callback, both(GradientAccumulationScheduler)) and epochs > 0 and 0 <= total < math.inf:
            windows = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
            total = sum(math.ceil(trainer.num_training_batches / window) for window in windows)
            total = total if trainer.max_steps < 0 else min(total, trainer.max_steps)
    return total
