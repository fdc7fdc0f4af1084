"""How each clip rule takes spikes, NaN, infinities and zeros: ``python -m benchmarks.stress --help``.

Norms are drawn log-normal; one step in a hundred is a spike of a hundred times its norm, one norm is NaN, one infinite,
and fifty in a row are zero. What a rule makes of the ordinary steps is compared with a calm run: the same draws without
faults. An after-effect is a step right after a fault, or after another after-effect, that comes out differently.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from stability_callbacks.clipping import AGC, AdaGC, AutoClip, ClipRule, NormClip, OutlierClip, ValueClip, ZClip

__all__ = ["RULES", "Outcome", "Series", "draw", "stress"]

_TOLERANCE = 0.05
_FIRST_STEPS = 100  # all warm-ups are over: nothing before is judged

RULES: dict[str, Callable[[], ClipRule]] = {
    "NormClip": NormClip,
    "ValueClip": lambda: ValueClip(max_value=1.0),
    "AGC": AGC,
    "AutoClip": AutoClip,
    "AutoClip, median of 100": lambda: AutoClip(percentile=50, window=100),
    "ZClip": ZClip,
    "ZClip, no cap": lambda: ZClip(max_norm=None),
    "ZClip, mean, no cap": lambda: ZClip(max_norm=None, mode="mean"),
    "OutlierClip": OutlierClip,
    "AdaGC": AdaGC,
}


class Series(NamedTuple):
    """Norms of successive gradients, with faults and without, and where the faults are."""

    stressed: list[float]
    calm: list[float]
    faulty: list[bool]


class Outcome(NamedTuple):
    """What a rule made of a series, after its first hundred steps.

    Attributes:
        largest: The largest finite norm that it let through.
        after_effect: The most ordinary steps in a row, right after a fault, that came out more than 5 % differently
            than in the calm run.
        altered: Share of all ordinary steps that did.
        threshold: Median threshold of the last hundred steps; NaN where the rule has none.
        calm_threshold: The same in the calm run.
    """

    largest: float
    after_effect: int
    altered: float
    threshold: float
    calm_threshold: float


def draw(steps: int = 1000, seed: int = 1) -> Series:
    """Draw a series of norms; NaN, infinity and zeros come after half, 60 % and 70 % of it.

    Args:
        steps: Length of the series, at least 200.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    calm = generator.lognormal(sigma=0.3, size=steps)
    spikes = generator.random(steps) < 0.01
    stressed = np.where(spikes, 100 * calm, calm)
    stressed[steps * 5 // 10] = np.nan
    stressed[steps * 6 // 10] = np.inf
    stressed[steps * 7 // 10 : steps * 7 // 10 + 50] = 0.0
    return Series(stressed.tolist(), calm.tolist(), (stressed != calm).tolist())


def stress(make: Callable[[], ClipRule], series: Series) -> Outcome:
    """Feed a series to a rule, and its calm twin to another copy of the rule."""
    clipped, thresholds = _feed(make(), series.stressed)
    calm, calm_thresholds = _feed(make(), series.calm)
    ordinary = altered = streak = longest = 0
    for step in range(_FIRST_STEPS, len(clipped)):
        if series.faulty[step]:
            streak = 1
            continue
        differs = abs(clipped[step] - calm[step]) > _TOLERANCE * calm[step]
        ordinary, altered = ordinary + 1, altered + differs
        streak = streak + 1 if streak and differs else 0
        longest = max(longest, streak - 1)
    return Outcome(
        largest=max(norm for norm in clipped[_FIRST_STEPS:] if math.isfinite(norm)),
        after_effect=longest,
        altered=altered / ordinary,
        threshold=statistics.median(thresholds[-100:]),
        calm_threshold=statistics.median(calm_thresholds[-100:]),
    )


def _feed(rule: ClipRule, norms: list[float]) -> tuple[list[float], list[float]]:
    """The norms that a rule leaves of gradients with the given norms, and its thresholds."""
    weight = nn.Parameter(torch.tensor([60.0, 80.0]))  # norm 100, by which AGC judges the gradients
    clipped, thresholds = [], []
    for norm in norms:
        weight.grad = torch.tensor([norm, 0.0])
        clipped.append(float(rule.clip_([("weight", weight)]).clipped_norm))
        thresholds.append(math.nan if rule.threshold is None else float(rule.threshold))
    return clipped, thresholds


def main() -> None:
    """Print what each rule made of several series: the worst, or the mean where it says so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("``")[0].strip(" :"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"{arguments.seeds} series of {arguments.steps} steps")
    table.add_column("rule")
    for column in ("largest norm", "after-effect", "altered (mean)", "threshold (mean)", "calm (mean)"):
        table.add_column(column, justify="right")
    for name, make in RULES.items():
        outcomes = [stress(make, draw(arguments.steps, seed)) for seed in range(1, arguments.seeds + 1)]
        largest, after_effects, altered, *thresholds = zip(*outcomes, strict=True)
        table.add_row(
            name,
            f"{max(largest):.2f}",
            f"{max(after_effects)}",
            f"{statistics.fmean(altered):.1%}",
            *(f"{statistics.fmean(values):.2f}" for values in thresholds),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
