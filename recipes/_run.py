"""Train one variant of a recipe and keep what the comparison needs."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console

from recipes._history import History, HistoryLogger
from recipes._progress import StepProgressBar
from stability_callbacks import StepGuard, TrainingDivergedError

__all__ = ["GRADIENT_NORM", "LOSS", "Goal", "Run", "TrainerFactory", "Variant", "train"]

Variant = Literal["plain", "healed"]

LOSS = "train/loss"
GRADIENT_NORM = "grad_norm/total"
SKIPPED_STEPS = "stability/skipped_steps"


class TrainerFactory(Protocol):
    """Makes a Trainer with every option set except the callbacks and loggers, which each run brings along."""

    def __call__(self, *, callbacks: list[Callback], logger: list[Logger]) -> L.Trainer: ...


@dataclass(frozen=True)
class Goal:
    """What a run must reach to be called a success.

    Attributes:
        metric: Name of the test metric, as the model logs it.
        threshold: The value to reach.
    """

    metric: str
    threshold: float

    def reached(self, value: float) -> bool:
        """Whether ``value`` is at least the threshold; NaN never is."""
        return value >= self.threshold


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        scenario: What went wrong in the data or the set-up.
        variant: Whether the callbacks were there to help.
        seed: Seed of the weights, the batches and the poison.
        goal: What it had to reach.
        value: What it reached on the test set.
        skipped_steps: Steps that the guards refused.
        seconds: Wall time of the training, without the test.
        history: Every scalar logged, step by step.
        stopped: Why a guard ended the run early; None if it did not.
    """

    scenario: str
    variant: Variant
    seed: int
    goal: Goal
    value: float
    skipped_steps: int
    seconds: float
    history: History
    stopped: str | None = None

    @property
    def metric(self) -> str:
        """The metric without the stage it was logged in."""
        return self.goal.metric.rpartition("/")[-1]

    @property
    def success(self) -> bool:
        """Whether the goal was reached."""
        return self.goal.reached(self.value)

    @property
    def gradient_norms(self) -> list[float]:
        """The finite total gradient norms, before any clipping."""
        return [norm for _, norm in self.history.get(GRADIENT_NORM, []) if math.isfinite(norm)]

    @property
    def largest_gradient_norm(self) -> float:
        """NaN if there was no finite one."""
        return max(self.gradient_norms, default=math.nan)

    @property
    def median_gradient_norm(self) -> float:
        """NaN if there was no finite one."""
        return statistics.median(self.gradient_norms or [math.nan])

    @property
    def skipped_at(self) -> list[int]:
        """The steps at which the count of skipped steps went up."""
        counts = [(-1, 0.0), *self.history.get(SKIPPED_STEPS, [])]
        return [step for (_, before), (step, count) in pairwise(counts) if count > before]

    @property
    def died_at(self) -> int | None:
        """The step from which no loss was finite any more, skipped steps aside; None if the last one was finite."""
        skipped = set(self.skipped_at)
        death = None
        for step, loss in self.history.get(LOSS, []):
            if math.isfinite(loss):
                death = None
            elif death is None and step not in skipped:
                death = step
        return death


def train(
    model: L.LightningModule,
    data: L.LightningDataModule,
    *,
    scenario: str,
    variant: Variant,
    seed: int,
    goal: Goal,
    callbacks: list[Callback],
    make_trainer: TrainerFactory,
    output: Path,
    console: Console,
) -> Run:
    """Train ``model``, test it, and return what was seen.

    TensorBoard's files go to ``output/<scenario>-<variant>``; those of an earlier run of that name are removed, so that
    curves never mix.
    """
    name = f"{scenario}-{variant}"
    for old in (output / name).glob("events.out.tfevents.*"):
        old.unlink()
    memory = HistoryLogger()
    trainer = make_trainer(callbacks=callbacks, logger=[TensorBoardLogger(output, name="", version=name), memory])
    _replace_progress_bar(trainer, StepProgressBar(f"{scenario:>9} · {variant:<6}", console))

    stopped = None
    started = time.perf_counter()
    try:
        trainer.fit(model, data)
    except TrainingDivergedError as error:
        stopped = str(error)
    seconds = time.perf_counter() - started
    (scores,) = trainer.test(model, data, verbose=False)
    return Run(
        scenario=scenario,
        variant=variant,
        seed=seed,
        goal=goal,
        value=scores[goal.metric],
        skipped_steps=sum(callback.skipped_steps for callback in callbacks if isinstance(callback, StepGuard)),
        seconds=seconds,
        history=memory.history,
        stopped=stopped,
    )


def _replace_progress_bar(trainer: Any, bar: StepProgressBar) -> None:
    # Only where Lightning put one, so that `--trainer.enable_progress_bar false` still has its meaning.
    if trainer.progress_bar_callback is not None:
        trainer.callbacks[trainer.callbacks.index(trainer.progress_bar_callback)] = bar
