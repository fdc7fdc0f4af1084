"""A picture of the runs: loss and gradient norm of every step, one column a scenario."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes._run import GRADIENT_NORM, LOSS, Run

__all__ = ["draw_curves"]

COLORS = {"plain": "#d55e00", "healed": "#0072b2"}  # told apart with every kind of colour vision
ROWS = ((LOSS, "training loss"), (GRADIENT_NORM, "gradient norm before clipping"))


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Save the curves of the runs as a PNG, on logarithmic axes.

    A dotted line marks the step from which a run's loss is not finite any more, a triangle at the upper edge a step
    that the guard skipped.
    """
    scenarios = {name: list(group) for name, group in groupby(runs, key=lambda run: run.scenario)}
    scenarios = {name: group for name, group in scenarios.items() if len(group) > 1}  # a lone run is only a reference
    figure = Figure(figsize=(6.4 * len(scenarios), 7), layout="constrained")
    axes = figure.subplots(len(ROWS), len(scenarios), sharex="col", sharey="row", squeeze=False)
    for column, (scenario, group) in zip(axes.T, scenarios.items(), strict=True):
        for axis, (metric, label) in zip(column, ROWS, strict=True):
            for run in group:
                _draw_run(axis, run, metric)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.25, which="major")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_ylabel(label)
            axis.label_outer()
        column[0].set_title(f"{scenario}, seed {group[0].seed}", loc="left", fontweight="bold")
        column[0].legend(loc="lower left", framealpha=0.9, edgecolor="none")
        column[-1].set_xlabel("step")
    figure.savefig(path, dpi=130)


def _draw_run(axis: Axes, run: Run, metric: str) -> None:
    series = run.history.get(metric, [])
    color = COLORS[run.variant]
    steps = [step for step, _ in series]
    values = [value if math.isfinite(value) else math.nan for _, value in series]
    label = f"{run.variant}: {run.metric} {run.value:.2f}"
    axis.plot(steps, values, color=color, linewidth=1, alpha=0.85, label=label)

    # Where the curve breaks off or has a gap, say why.
    top = axis.get_xaxis_transform()  # x in steps, y in shares of the axis
    if run.died_at is not None:
        axis.axvline(run.died_at, color=color, linestyle=":", linewidth=1.2)
        axis.annotate(
            f" not finite\n from step {run.died_at}", (run.died_at, 0.97), xycoords=top, color=color, va="top"
        )
    if run.skipped_at:
        axis.plot(
            run.skipped_at,
            [1.0] * len(run.skipped_at),
            linestyle="none",
            marker="v",
            color=color,
            transform=top,
            clip_on=False,
            label=f"{len(run.skipped_at)} steps skipped",
        )
