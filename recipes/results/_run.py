"""What is known of a finished training run, and how it is kept on disk."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from recipes.results._history import History, as_history
from stability_callbacks._atomic import atomic_path

__all__ = ["GRADIENT_NORM", "LOSS", "SKIPPED_STEPS", "Goal", "Run", "Variant"]

Variant = Literal["plain", "healed"]

LOSS = "train/loss"
GRADIENT_NORM = "grad_norm/total"
SKIPPED_STEPS = "stability/skipped_steps"


@dataclass(frozen=True)
class Goal:
    """What a run must reach to be called a success.

    Attributes:
        metric: Name of the metric, without the split it is evaluated on.
        threshold: The value to reach.
        mode: Whether the metric must be at least ("max") or at most ("min") the threshold.
    """

    metric: str
    threshold: float
    mode: Literal["max", "min"] = "max"

    def reached(self, value: float) -> bool:
        """Whether ``value`` is as good as the threshold; NaN never is."""
        return value >= self.threshold if self.mode == "max" else value <= self.threshold


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        scenario: What went wrong in the data or the set-up.
        variant: Whether the callbacks were there to help.
        seed: Seed of the weights, the batches and the poison.
        goal: What it had to reach.
        value: What it reached on the evaluated split.
        skipped_steps: Steps that the guards refused.
        seconds: Wall time of the training, without the evaluation.
        history: Every scalar logged, step by step.
        stopped: Why a guard ended the run early; None if it did not.
        without: The callback that an ablation left out; None if all were there.
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
    without: str | None = None

    def save(self, path: Path) -> None:
        """Write the run to a file, whole or not at all."""
        with atomic_path(path) as part:
            part.write_text(json.dumps(asdict(self)))  # with NaN and Infinity, which only load() has to understand

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is damaged.
        """
        try:
            fields = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; remove it, and its run will be made again") from error
        return cls(**{**fields, "goal": Goal(**fields["goal"]), "history": as_history(fields["history"])})

    @property
    def name(self) -> str:
        """Scenario, variant and what was left out: the same for every seed."""
        return f"{self.scenario}-{self.variant}" + (f"-without-{self.without}" if self.without else "")

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
