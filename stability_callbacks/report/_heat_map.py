"""The gradient norms of all layers over the steps, as colors."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stability_callbacks.report._chart import SIZE, Mark, mark_lines, step_axis
from stability_callbacks.report._envelope import bin_numbers, bins_of
from stability_callbacks.report._scalars import Series
from stability_callbacks.report._scale import number
from stability_callbacks.report._templates import Markup, render

__all__ = ["heat_map"]

_MOST_COLUMNS = 192
_LABELED_ROWS = 64

# Viridis (matplotlib, CC0), at equal distances. The first three places of the palette are for what has no place on it.
_ANCHORS = (
    "440154",
    "482475",
    "414487",
    "355f8d",
    "2a788e",
    "21918c",
    "22a884",
    "44bf70",
    "7ad151",
    "bddf26",
    "fde725",
)
_NOTHING, _ZERO, _BROKEN, _FIRST_COLOR = 0, 1, 2, 3


class _Row(NamedTuple):
    name: str
    facts: str
    top: str
    labeled: bool


def heat_map(layers: Mapping[str, Series], span: tuple[int, int], marks: Sequence[Mark] = ()) -> Markup:
    """Draw the largest norm of each layer in each stretch of steps, on a logarithmic scale.

    What is not finite and what is zero have colors of their own; nothing is drawn where there was no gradient.

    Args:
        layers: The norms of each layer, at least one of them not empty.
        span: First and last step of the axis.
        marks: Incidents, each a line across the map.

    Returns:
        A figure.
    """
    pixels, least, most = _pixels(layers, span)
    height = max(3, min(18, 900 // len(layers)))  # of a row, in the page's pixels
    every = -(-len(layers) // _LABELED_ROWS)
    return render(
        "heat_map.html",
        size=SIZE,
        least=least,
        most=most,
        ramp=[f"#{color}" for color in _ANCHORS],
        height=height * len(layers),
        row_height=f"{100 / len(layers):.3f}",
        rows=[
            _Row(name, _facts(name, series), f"{100 * row / len(layers):.3f}", row % every == 0)
            for row, (name, series) in enumerate(layers.items())
        ],
        picture=picture_address(pixels, _palette()),
        incidents=mark_lines(marks, span),
        steps=step_axis(span),
    )


def picture_address(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> str:
    """A picture of few colors as an address that holds it.

    Args:
        pixels: Index of each pixel's color, shape ``[height, width]``.
        palette: Red, green, blue and opacity of each color, shape ``[colors, 4]``, at most 256 of them.

    Returns:
        The address of a PNG picture.
    """
    height, width = pixels.shape
    picture = Image.frombytes("P", (width, height), pixels.tobytes())
    picture.putpalette(palette.tobytes(), "RGBA")
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _pixels(layers: Mapping[str, Series], span: tuple[int, int]) -> tuple[NDArray[np.uint8], float, float]:
    """The colors, and the norms at the ends of the scale."""
    steps = np.unique(np.concatenate([series.steps for series in layers.values()]))
    columns = int(min(len(steps), _MOST_COLUMNS, span[1] - span[0] + 1))
    norms = np.full((len(layers), columns), -1.0)  # -1: no gradient
    for row, series in enumerate(layers.values()):
        for column, part in bins_of(series, span, columns).items():
            norms[row, column] = np.nan if part.broken else part.most
    # Steps that are logged at a distance need not fall into each column: those between show the one before.
    filled = np.zeros(columns, bool)
    filled[bin_numbers(steps, span, columns)] = True
    source = np.maximum.accumulate(np.where(filled, np.arange(columns), 0))
    norms = norms[:, source]
    on_scale = np.isfinite(norms) & (norms > 0)
    positive = norms[on_scale]
    least, most = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    colors = np.full(norms.shape, _NOTHING, np.uint8)
    exponents = np.log10(positive) - np.log10(least)  # the quotient itself may leave the range of floats
    share = exponents / max(np.log10(most) - np.log10(least), 1e-3)
    colors[on_scale] = _FIRST_COLOR + np.rint(share * (255 - _FIRST_COLOR)).astype(np.uint8)
    colors[norms == 0] = _ZERO
    colors[~np.isfinite(norms)] = _BROKEN
    return colors, least, most


def _palette() -> NDArray[np.uint8]:
    anchors = np.array([list(bytes.fromhex(color)) for color in _ANCHORS], np.float64)
    places = np.linspace(0, len(anchors) - 1, 256 - _FIRST_COLOR)
    colors = np.stack([np.interp(places, np.arange(len(anchors)), channel) for channel in anchors.T], axis=1)
    palette: NDArray[np.float64] = np.full((256, 4), 255.0)
    palette[_FIRST_COLOR:, :3] = colors
    palette[_NOTHING] = 0, 0, 0, 0
    palette[_ZERO] = 0, 0, 0, 255
    palette[_BROKEN] = 213, 94, 0, 255
    return np.rint(palette).astype(np.uint8)


def _facts(name: str, series: Series) -> str:
    finite = series.values[np.isfinite(series.values)]
    broken = series.steps[~np.isfinite(series.values)]
    facts = [f"{number(float(finite.min()))} to {number(float(finite.max()))}"] if finite.size else []
    if broken.size:
        facts.append(f"{broken.size:,} not finite, first at step {int(broken[0]):,}")
    return f"{name}: {', '.join(facts)}"
