"""The figures: gradients and signals on logarithmic axes, with what no logarithm shows on the axes' edges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from recipes.gradient_flow._summary import Spread, Summary
from recipes.gradient_flow._verdict import EXPLODING_LEVEL, EXPLODING_RATIO, VANISHING_LEVEL, VANISHING_RATIO
from stability_callbacks._atomic import atomic_path

__all__ = ["draw_depths", "draw_initializations"]

# Okabe and Ito's colors, told apart with every kind of color vision, and a marker of its own for each.
COLORS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#cc79a7", "#d55e00")
MARKERS = ("o", "s", "D", "P", "X", "*", "h")
# What has one look in both figures; others take the next that is free.
LOOKS = {"default": 0, "normal": 1, "lecun": 2, "xavier": 3, "he": 4, "auto": 4, "orthogonal": 5, "lsuv": 6}

FLOOR, CEILING = 1e-45, 1e9  # the least number that float32 holds; ten million times what is sound
EDGES = (
    (0.0, "exactly 0, or 0/0"),
    (FLOOR / 2, f"below {FLOOR:g}"),
    (CEILING * 2, f"above {CEILING:g}, or not finite"),
)

AxesGrid = np.ndarray[tuple[int, int], np.dtype[np.object_]]


class _Style(NamedTuple):
    color: str
    marker: str


class _Line(NamedTuple):
    """A line in a band.

    Attributes:
        style: Its look.
        xs: Where its points are.
        values: Median, smallest and largest there.
    """

    style: _Style
    xs: Sequence[int]
    values: Sequence[Spread]


def draw_initializations(summaries: Sequence[Summary], path: Path) -> None:
    """Save the study of initializations as a PNG: one column an activation, one line an initialization.

    The upper row has the gradient norm of each layer, the lower one its signal: medians over the seeds, in a band from
    the smallest to the largest.
    """
    styles, columns = _styles(summaries), _by_activation(summaries)
    figure, axes = _panels(columns)

    def lines(column: Sequence[Summary], row: int) -> list[_Line]:
        return [
            _Line(
                styles[each.setting.initialization],
                range(1, each.setting.depth + 1),
                each.by_layer(lambda m: m.signal_stds if row else m.gradient_norms),
            )
            for each in column
        ]

    for row, label in enumerate(("gradient norm of the weights", "std of the output over the batch")):
        _draw_row(axes[row], label, [lines(column, row) for column in columns.values()])
    for axis in axes[-1]:
        axis.set_xlabel("layer, from the input to the output")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, styles, path)


def draw_depths(summaries: Sequence[Summary], path: Path) -> None:
    """Save the study of depths as a PNG: one column an activation, one line an initialization.

    The upper row has the first layer's gradient norm against the depth, the lower one its ratio to the last layer's.
    Dotted lines are the bounds of the verdicts.
    """
    styles, columns = _styles(summaries), _by_activation(summaries)
    depths = sorted({each.setting.depth for each in summaries})
    figure, axes = _panels(columns)

    def lines(column: Sequence[Summary], row: int) -> list[_Line]:
        by_name = {name: [each for each in column if each.setting.initialization == name] for name in styles}
        return [
            _Line(
                styles[name],
                [each.setting.depth for each in line],
                [each.of(lambda m: m.ratio if row else m.first) for each in line],
            )
            for name, line in by_name.items()
            if line
        ]

    rows = (
        ("gradient norm, first layer", VANISHING_LEVEL, EXPLODING_LEVEL),
        ("ratio, first to last layer", VANISHING_RATIO, EXPLODING_RATIO),
    )
    for row, (label, *bounds) in enumerate(rows):
        _draw_row(axes[row], label, [lines(column, row) for column in columns.values()])
        for axis in axes[row]:
            for bound in bounds:
                axis.axhline(bound, color="gray", linestyle=":", linewidth=1)
    for axis in axes[-1]:
        axis.set_xscale("log")
        axis.set_xticks(depths, [str(depth) for depth in depths])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("linear layers")
    _save(figure, styles, path)


def _by_activation(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    columns: dict[str, list[Summary]] = {}
    for each in summaries:
        columns.setdefault(each.setting.activation, []).append(each)
    return columns


def _styles(summaries: Sequence[Summary]) -> dict[str, _Style]:
    names = list(dict.fromkeys(each.setting.initialization for each in summaries))
    taken = {LOOKS[name] for name in names if name in LOOKS}
    free = cycle([look for look in range(len(COLORS)) if look not in taken] or range(len(COLORS)))
    looks = {name: LOOKS[name] if name in LOOKS else next(free) for name in names}
    return {name: _Style(COLORS[look], MARKERS[look]) for name, look in looks.items()}


def _panels(columns: Iterable[str]) -> tuple[Figure, AxesGrid]:
    titles = list(columns)
    figure = Figure(figsize=(3.6 * len(titles) + 0.6, 7.2), layout="constrained")
    axes: AxesGrid = figure.subplots(2, len(titles), sharex="col", sharey="row", squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, loc="left", fontweight="bold")
    return figure, axes


def _draw_row(axes: Sequence[Axes], label: str, panels: Sequence[Sequence[_Line]]) -> None:
    """Draw panels that share an axis, which ends where the numbers do: others stand on its edges."""
    values = [value for lines in panels for line in lines for spread in line.values for value in spread]
    seen = [value for value in values if FLOOR <= value <= CEILING]
    floor, ceiling = (min(seen) / 10, max(seen) * 10) if seen else (FLOOR, CEILING)
    for axis, lines in zip(axes, panels, strict=True):
        for line in lines:
            low, median, high = (
                [_shown(value, floor, ceiling) for value in each] for each in zip(*line.values, strict=True)
            )
            axis.fill_between(line.xs, low, high, color=line.style.color, alpha=0.15, linewidth=0)
            every = max(1, len(line.xs) // 10)
            axis.plot(line.xs, median, **line.style._asdict(), linewidth=1.3, markersize=4, markevery=every)
        _mark_edges(axis, lines, floor, ceiling)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(label)
    axes[0].set_yscale("log")
    axes[0].set_ylim(floor, ceiling)


def _mark_edges(axis: Axes, lines: Sequence[_Line], floor: float, ceiling: float) -> None:
    """Mark the medians that the axis can't show; later lines get smaller marks, so that all in one place are seen."""
    beyond = [
        [(x, spread.median) for x, spread in zip(line.xs, line.values, strict=True) if not _fits(spread.median)]
        for line in lines
    ]
    size = 6.0 + 4.0 * (sum(map(bool, beyond)) - 1)
    for line, points in zip(lines, beyond, strict=True):
        for x, value in points:
            mark = _edge_mark(value, line.style.color, size)
            mark.set(xdata=[x], ydata=[_shown(value, floor, ceiling)], clip_on=False, zorder=3)
            axis.add_line(mark)
        size -= 4.0 if points else 0.0


def _fits(value: float) -> bool:
    return FLOOR <= value <= CEILING


def _shown(value: float, floor: float, ceiling: float) -> float:
    return floor if math.isnan(value) else min(max(value, floor), ceiling)


def _edge_mark(value: float, color: str, size: float, label: str = "") -> Line2D:
    hollow = 0 < value < FLOOR
    return Line2D(
        [],
        [],
        linestyle="none",
        marker="^" if value > CEILING else "v",
        color=color,
        markersize=size,
        markerfacecolor="white" if hollow else color,
        markeredgecolor=color if hollow else "white",
        markeredgewidth=1.0 if hollow else 0.4,
        label=label,
    )


def _save(figure: Figure, styles: Mapping[str, _Style], path: Path) -> None:
    handles = [Line2D([], [], **style._asdict(), markersize=5, label=name) for name, style in styles.items()]
    handles += [_edge_mark(value, "gray", 7.0, label) for value, label in EDGES]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    with atomic_path(path) as part:
        figure.savefig(part, dpi=110)
