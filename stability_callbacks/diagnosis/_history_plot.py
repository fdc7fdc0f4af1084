"""A picture of a history: the last steps before an incident."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stability_callbacks._atomic import atomic_path
from stability_callbacks.diagnosis._history_csv import StepRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["plot_history"]

# Told apart with every kind of color vision.
_RAW, _CLIPPED, _SKIPPED, _NON_FINITE = "#0072b2", "#56b4e9", "#e69f00", "#d55e00"
_NO_GRADIENT, _ZERO = "#d0d0d0", "#000000"
_LABELED_LAYERS = 60
_LABEL_LENGTH = 48


def plot_history(rows: Sequence[StepRow], path: str | os.PathLike[str]) -> None:
    """Draw a history: loss, gradient norms, learning rates, and a heat map of the layers' gradient norms.

    Skipped steps are shaded. A value that is not finite is a cross at the upper edge of its curve, and a cell of its
    own color in the heat map; so is a norm of zero, and a layer without a gradient. The file is there complete or not
    at all.

    Args:
        rows: The steps, at least one, in order.
        path: The picture. Its suffix says in which format, such as ``.png`` or ``.svg``.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no steps.

    Example:
        >>> row = StepRow(7, 0, 7, (0.1,), 2.5, 5.0, 1.0, 0.2, ("spike",), None, {"net": 5.0})
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     plot_history([row, row._replace(step=8, verdict=())], f"{directory}/history.png")
    """
    if not rows:
        raise ValueError("`rows` must hold at least one step, got none")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'stability-callbacks[plot]'") from error

    steps = [row.step for row in rows]
    layers = list(dict.fromkeys(name for row in rows for name in row.norms))
    heights = (1.8, 2.2, 1.1, min(max(0.17 * len(layers), 1.5), 10))
    figure = Figure(figsize=(12, sum(heights) + 1.2), layout="constrained")
    grid = figure.subplots(4, 2, sharex="col", height_ratios=heights, width_ratios=(70, 1))
    (of_loss, of_norm, of_rate, of_layers), bars = grid.T

    _draw_curve(of_loss, steps, [row.loss for row in rows])
    _draw_curve(of_norm, steps, [row.grad_norm for row in rows])
    _draw_curve(of_norm, steps, [row.grad_norm_clipped for row in rows], color=_CLIPPED)
    _use_logarithms(of_loss, [row.loss for row in rows])
    _use_logarithms(of_norm, [norm for row in rows for norm in (row.grad_norm, row.grad_norm_clipped)])
    for group in range(max(len(row.lr) for row in rows)):
        known = [row for row in rows if group < len(row.lr)]
        _draw_curve(of_rate, [row.step for row in known], [row.lr[group] for row in known], color=f"C{group}")
    for axes, label in ((of_loss, "loss"), (of_norm, "gradient norm"), (of_rate, "learning rate")):
        for row in rows:
            if row.skipped:
                axes.axvspan(row.step - 0.5, row.step + 0.5, color=_SKIPPED, alpha=0.5, linewidth=0, zorder=0)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    of_layers.set_xlabel("step")
    of_layers.xaxis.get_major_locator().set_params(integer=True)
    for bar in bars:
        bar.set_axis_off()
    _draw_layers(of_layers, bars[-1], rows, layers)
    _explain_colors(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw_curve(axes: Axes, steps: Sequence[int], values: Sequence[float], color: str = _RAW) -> None:
    shown = [value if math.isfinite(value) else math.nan for value in values]
    axes.plot(steps, shown, color=color, marker="." if len(steps) < 100 else "", linewidth=1.1)
    bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    edge = axes.get_xaxis_transform()  # x in steps, y in shares of the axes
    (crosses,) = axes.plot(bad, [1.0] * len(bad), "x", color=_NON_FINITE, transform=edge, clip_on=False)
    crosses.set_in_layout(False)


def _use_logarithms(axes: Axes, values: Sequence[float]) -> None:
    """Make the scale logarithmic, down to the least value where there are zeros; not if values are negative."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    if len(positive) == len(finite) > 0:
        axes.set_yscale("log")
    elif positive and min(finite) == 0:
        axes.set_yscale("symlog", linthresh=min(positive))


def _draw_layers(axes: Axes, bar: Axes, rows: Sequence[StepRow], layers: Sequence[str]) -> None:
    """A heat map of the layers' norms on a logarithmic scale, and what can't be shown on one in colors of its own."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    axes.set_facecolor(_NO_GRADIENT)
    if not layers:
        return
    norms = np.array([[row.norms.get(layer, -1.0) for row in rows] for layer in layers])  # -1: no gradient
    corners = _edges([row.step for row in rows]), np.arange(len(layers) + 1) - 0.5
    positive = norms[np.isfinite(norms) & (norms > 0)]
    if positive.size:
        scale = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))
        shown = np.ma.masked_where(~np.isfinite(norms) | (norms <= 0), norms)
        mesh = axes.pcolormesh(*corners, shown, cmap=colormaps["viridis"], norm=scale)
        bar.set_axis_on()
        axes.figure.colorbar(mesh, cax=bar, label="gradient norm")
    for cells, color in ((norms == 0, _ZERO), (~np.isfinite(norms), _NON_FINITE)):
        axes.pcolormesh(*corners, np.ma.masked_where(~cells, cells), cmap=ListedColormap([color]))
    every = math.ceil(len(layers) / _LABELED_LAYERS)
    axes.set_yticks(range(0, len(layers), every), [_short(layer) for layer in layers[::every]], fontsize=7)
    axes.invert_yaxis()


def _short(name: str) -> str:
    return name if len(name) <= _LABEL_LENGTH else f"...{name[3 - _LABEL_LENGTH :]}"


def _edges(steps: Sequence[int]) -> NDArray[np.float64]:
    """Where the cells of a heat map begin and end: half way between steps, which may be more than one apart."""
    before = 2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1
    after = 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[0] + 1
    centers = np.array([before, *steps, after], dtype=np.float64)
    return (centers[1:] + centers[:-1]) / 2


def _explain_colors(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Line2D([], [], color=_RAW, label="loss, raw norm"),
            Line2D([], [], color=_CLIPPED, label="clipped norm"),
            Patch(color=_SKIPPED, alpha=0.5, linewidth=0, label="step skipped"),
            Line2D([], [], linestyle="none", marker="x", color=_NON_FINITE, label="not finite"),
            Patch(color=_NON_FINITE, label="layer: not finite"),
            Patch(color=_ZERO, label="layer: zero"),
            Patch(color=_NO_GRADIENT, label="layer: no gradient"),
        ],
        loc="outside upper center",
        ncols=7,
        frameon=False,
    )
