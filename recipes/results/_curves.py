"""A picture of the runs: loss and gradient norm of every step, one column a scenario."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullFormatter

from recipes.results._comparison import number
from recipes.results._run import GRADIENT_NORM, LOSS, Run
from stability_callbacks._atomic import atomic_path

__all__ = ["draw_curves"]

COLORS = {"plain": "#d55e00", "healed": "#0072b2"}  # told apart with every kind of color vision
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
BEYOND = 1000  # times the largest value of a run that lives: more is told in words
WIDEST = 3  # scenarios side by side
ROWS = ((LOSS, "training loss"), (GRADIENT_NORM, "gradient norm before clipping"))


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Save the curves of the runs as a PNG, on logarithmic axes; those of an ablation are left out.

    A dotted line marks the step from which a run's loss is not finite any more; with a single seed, a triangle at the
    upper edge marks a step that the guard skipped.
    """
    whole = [run for run in runs if run.without is None]
    scenarios = {name: list(group) for name, group in groupby(whole, key=lambda run: run.scenario)}
    lines = math.ceil(len(scenarios) / WIDEST)
    columns = math.ceil(len(scenarios) / lines)
    figure = Figure(figsize=(5.2 * columns, 6.4 * lines), layout="constrained")
    panels = figure.subfigures(lines, columns, squeeze=False).flat
    for panel, (scenario, group) in zip(panels, scenarios.items(), strict=False):
        _draw_scenario(panel, scenario, group)
    with atomic_path(path) as part:
        figure.savefig(part, dpi=110)


def _draw_scenario(panel: SubFigure, scenario: str, runs: Sequence[Run]) -> None:
    axes = panel.subplots(len(ROWS), 1, sharex=True)
    for axis, (metric, label) in zip(axes, ROWS, strict=True):
        for variant in COLORS:
            _draw_variant(axis, [run for run in runs if run.variant == variant], metric)
        _scale(axis, runs, metric)
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel(label)
    seeds = sorted({run.seed for run in runs})
    axes[0].set_title(f"{scenario}, seed{_span(seeds)}", loc="left", fontweight="bold")
    axes[0].legend(loc="best", framealpha=0.9, edgecolor="none")
    axes[-1].set_xlabel("step")


def _scale(axis: Axes, runs: Sequence[Run], metric: str) -> None:
    """Choose a logarithmic axis on which the healed curves can be read, however far the plain ones explode."""
    shown = [value for run in runs for value in _positive(run, metric) if math.isfinite(value)]
    if not shown:  # a logarithmic axis needs something to show
        return
    axis.set_yscale("log")
    sound = [value for run in runs if run.died_at is None for value in _positive(run, metric) if math.isfinite(value)]
    if sound and max(shown) > BEYOND * max(sound):
        axis.set_ylim(top=BEYOND * max(sound))
        axis.annotate(f"up to {max(shown):.0e} ", (1, 0.9), xycoords="axes fraction", ha="right", color=COLORS["plain"])
    low, high = axis.get_ylim()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())


def _draw_variant(axis: Axes, runs: Sequence[Run], metric: str) -> None:
    """Draw the runs that differ only in their seed."""
    if not runs:
        return
    color, single = COLORS[runs[0].variant], len(runs) == 1
    value = statistics.fmean(run.value for run in runs)
    label = f"{runs[0].variant}: {runs[0].goal.metric} {number(value)}"
    top = axis.get_xaxis_transform()  # x in steps, y in shares of the axis
    for index, run in enumerate(runs):
        values = _positive(run, metric)
        width, alpha = (1.0, 0.85) if single else (0.7, 0.5)
        steps = [step for step, _ in run.history.get(metric, [])]
        axis.plot(steps, values, color=color, label=None if index else label, linewidth=width, alpha=alpha)
        # A curve of a step or two would not be seen.
        if 0 < sum(map(math.isfinite, values)) < 5:
            axis.plot(steps, values, color=color, marker="o", markersize=3, linestyle="none")
        if run.died_at is not None:
            axis.axvline(run.died_at, color=color, linestyle=":", linewidth=1.2)
    deaths = [run.died_at for run in runs if run.died_at is not None]
    if deaths:
        text = f" not finite\n from step{_span(deaths)}"
        axis.annotate(text, (min(deaths), 0.97), xycoords=top, color=color, va="top", bbox=PAPER)
    if single and runs[0].skipped_at:
        skipped = runs[0].skipped_at
        axis.plot(
            skipped,
            [1.0] * len(skipped),
            linestyle="none",
            marker="v",
            color=color,
            transform=top,
            clip_on=False,
            label=f"{len(skipped)} step{'s' * (len(skipped) > 1)} skipped",
        )


def _positive(run: Run, metric: str) -> list[float]:
    """The values that a logarithmic axis can show, with NaN in place of the others."""
    return [value if 0 < value < math.inf else math.nan for _, value in run.history.get(metric, [])]


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f" {low}" if low == high else f"s {low} to {high}"
