"""The curves of a whole run: which of its metrics to draw, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from stability_callbacks.report._chart import Curve, Mark, chart, timeline
from stability_callbacks.report._heat_map import heat_map
from stability_callbacks.report._run import Run
from stability_callbacks.report._scalars import Series
from stability_callbacks.report._templates import Markup

__all__ = ["largest", "largest_gradient_norm", "overview", "span_of"]

_MOST_CURVES = 5

_RAW = "grad_norm/total"
_TOTAL = re.compile(r"grad_norm(?:_clipped)?/total(?:/|$)")
_OF_LAYER = re.compile(r"grad_norm/(?!total(?:/|$))(.+)")
_LOSS = re.compile(r"loss", re.IGNORECASE)
_RATE = re.compile(r"(?:lr|lr-.*|lr/.*|learning_rate)$")
_OF_MONITOR = re.compile(r"lr-(?P<optimizer>.*)")


def overview(run: Run, span: tuple[int, int], marks: Sequence[Mark]) -> list[Markup]:
    """Draw a run: its incidents, loss, gradient norms, learning rates, loss scale, and the norms of its layers.

    Loggers see some steps only, and seldom those that went wrong; what the record tells of these is drawn as dots.

    Args:
        run: The run.
        span: First and last step of the axis.
        marks: The incidents.

    Returns:
        The figures; none if there is nothing to draw.
    """
    curves = run.scalars.series
    figures = [timeline(marks, span)] if marks else []
    for title, series, evidence, logarithmic in (
        ("Loss", _losses(curves), "loss", None),
        ("Gradient norm", _norms(curves), "grad_norm", True),
        ("Learning rate", _rates(curves), None, False),
        ("Loss scale", {name: each for name, each in curves.items() if name == "stability/loss_scale"}, None, True),
    ):
        shown = [Curve(name, each) for name, each in list(series.items())[:_MOST_CURVES]]
        more = f" ({len(shown)} of {len(series)})" if len(series) > len(shown) else ""
        if evidence is not None and len((at_incidents := _at_incidents(run, evidence)).steps):
            shown.append(Curve("at incidents", at_incidents, dots=True))
        if shown:
            figures.append(chart(title + more, shown, span, marks, logarithmic))
    layers = {match[1]: series for name, series in curves.items() if (match := _OF_LAYER.match(name))}
    if layers:
        figures.append(heat_map(layers, span, marks))
    return figures


def span_of(run: Run) -> tuple[int, int]:
    """First and last step of a run; at least one apart."""
    ends = [int(end) for series in run.scalars.series.values() for end in series.steps[[0, -1]]]
    steps = [*ends, *(each.step for each in run.incidents)] or [0]
    return min(steps), max(*steps, min(steps) + 1)


def largest_gradient_norm(run: Run) -> float:
    """The largest finite raw norm that was logged or recorded; NaN if there is none."""
    recorded = _at_incidents(run, "grad_norm")
    known = [largest(series) for series in (recorded, run.scalars.series.get(_RAW, recorded))]
    return max((each for each in known if not math.isnan(each)), default=math.nan)


def largest(series: Series) -> float:
    """The largest finite value; NaN if there is none."""
    finite = series.values[np.isfinite(series.values)]
    return float(finite.max()) if finite.size else math.nan


def _at_incidents(run: Run, name: str) -> Series:
    evidence = ((each.step, each.evidence.get(name)) for each in run.incidents)
    return Series.of((step, value) for step, value in evidence if isinstance(value, float | int))


def _losses(curves: Mapping[str, Series]) -> dict[str, Series]:
    """Metrics that seem to be losses; those of training first, and a curve of steps before that of epochs."""
    names = [name for name in curves if _LOSS.search(name) and not name.startswith("stability/")]
    names.sort(key=lambda name: ("train" not in name and name != "loss", name.endswith("_epoch")))
    return {name: curves[name] for name in names}


def _norms(curves: Mapping[str, Series]) -> dict[str, Series]:
    """Total norms; that of all raw gradients first."""
    names = sorted((name for name in curves if _TOTAL.match(name)), key=lambda name: (name != _RAW, "clipped" in name))
    return {name: curves[name] for name in names}


def _rates(curves: Mapping[str, Series]) -> dict[str, Series]:
    """Learning rates; where `LRSchedule` and `LearningRateMonitor` both logged one, that of the former."""
    names = [name for name in curves if _RATE.match(name)]
    twice = {name for name in names if (match := _OF_MONITOR.match(name)) and f"lr/{match['optimizer']}" in curves}
    return {name: curves[name] for name in names if name not in twice}
