"""Finished runs for tests that train nothing."""

from __future__ import annotations

import math
from typing import Any

from recipes.results._history import History
from recipes.results._run import GRADIENT_NORM, LOSS, SKIPPED_STEPS, Goal, Run

NAN, INF = math.nan, math.inf


def history(losses: list[float], norms: list[float] | None = None, skips: list[float] | None = None) -> History:
    series = {LOSS: losses, GRADIENT_NORM: norms or losses, SKIPPED_STEPS: skips or []}
    return {name: list(enumerate(values)) for name, values in series.items()}


def run(variant: Any = "healed", value: float = 0.9, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "scenario": "exploding",
        "seed": 3,
        "goal": Goal("accuracy", 0.8),
        "skipped_steps": 0,
        "seconds": 1.23456,
        "history": history([2.0, 1.0, 0.5]),
    }
    return Run(variant=variant, value=value, **{**fields, **changes})
