"""The gradient norms of all layers over the steps, as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stability_callbacks.report._chart import SIZE, Mark, mark_lines, step_axis
from stability_callbacks.report._envelope import bin_numbers, bins_of
from stability_callbacks.report._html import Html, tag
from stability_callbacks.report._png import indexed_png, png_address
from stability_callbacks.report._scalars import Series
from stability_callbacks.report._scale import number

__all__ = ["heat_map"]

_MOST_COLUMNS = 192
_LABELLED_ROWS = 64

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
_NOTHING, _ZERO, _BROKEN, _FIRST_COLOUR = 0, 1, 2, 3


def heat_map(layers: Mapping[str, Series], span: tuple[int, int], marks: Sequence[Mark] = ()) -> Html:
    """Draw the largest norm of each layer in each stretch of steps, on a logarithmic scale.

    What is not finite and what is zero have colours of their own; nothing is drawn where there was no gradient.

    Args:
        layers: The norms of each layer, at least one of them not empty.
        span: First and last step of the axis.
        marks: Incidents, each a line across the map.

    Returns:
        A figure.
    """
    pixels, least, most = _pixels(layers, span)
    height = max(3, min(18, 900 // len(layers)))  # of a row, in the page's pixels
    every = -(-len(layers) // _LABELLED_ROWS)
    names = [
        tag("span", name, title=_facts(name, series), style=f"top:{100 * row / len(layers):.3f}%")
        for row, (name, series) in enumerate(layers.items())
        if row % every == 0
    ]
    stripes = [
        tag("rect", tag("title", _facts(name, series)), class_="hover", x=0, y=row, width=SIZE, height=1)
        for row, (name, series) in enumerate(layers.items())
    ]
    rows = tag("svg", *stripes, viewBox=f"0 0 {SIZE} {len(layers)}", preserveAspectRatio="none")
    lines = tag("svg", *mark_lines(marks, span), viewBox=f"0 0 {SIZE} {SIZE}", preserveAspectRatio="none")
    picture = tag("img", src=png_address(indexed_png(pixels, _palette())), alt="gradient norm by layer and step")
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("strong", "Gradient norm by layer"),
            " ",
            tag("span", "raw, largest of each stretch of steps", class_="note"),
            _key(least, most),
        ),
        tag(
            "div",
            tag("div", *names, class_="names"),
            tag("div", tag("div", picture, lines, rows, class_="plot"), step_axis(span)),
            class_="rows",
            style=f"--height:{height * len(layers)}px;--row:{100 / len(layers):.3f}%",
        ),
        class_="heat",
    )


def _pixels(layers: Mapping[str, Series], span: tuple[int, int]) -> tuple[NDArray[np.uint8], float, float]:
    """The colours, and the norms at the ends of the scale."""
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
    colours = np.full(norms.shape, _NOTHING, np.uint8)
    share = np.log10(positive / least) / max(np.log10(most / least), 1e-3)
    colours[on_scale] = _FIRST_COLOUR + np.rint(share * (255 - _FIRST_COLOUR)).astype(np.uint8)
    colours[norms == 0] = _ZERO
    colours[~np.isfinite(norms)] = _BROKEN
    return colours, least, most


def _palette() -> NDArray[np.uint8]:
    anchors = np.array([list(bytes.fromhex(colour)) for colour in _ANCHORS], np.float64)
    places = np.linspace(0, len(anchors) - 1, 256 - _FIRST_COLOUR)
    colours = np.stack([np.interp(places, np.arange(len(anchors)), channel) for channel in anchors.T], axis=1)
    palette: NDArray[np.float64] = np.full((256, 4), 255.0)
    palette[_FIRST_COLOUR:, :3] = colours
    palette[_NOTHING] = 0, 0, 0, 0
    palette[_ZERO] = 0, 0, 0, 255
    palette[_BROKEN] = 213, 94, 0, 255
    return np.rint(palette).astype(np.uint8)


def _key(least: float, most: float) -> Html:
    gradient = ", ".join(f"#{colour}" for colour in _ANCHORS)
    return tag(
        "span",
        number(least),
        tag("span", class_="ramp", style=f"background:linear-gradient(to right, {gradient})"),
        number(most),
        *(tag("span", tag("span", class_=f"cell {name}"), name.replace("-", " ")) for name in ("not-finite", "zero")),
        class_="key",
    )


def _facts(name: str, series: Series) -> str:
    finite = series.values[np.isfinite(series.values)]
    broken = series.steps[~np.isfinite(series.values)]
    facts = [f"{number(float(finite.min()))} to {number(float(finite.max()))}"] if finite.size else []
    if broken.size:
        facts.append(f"{broken.size:,} not finite, first at step {int(broken[0]):,}")
    return f"{name}: {', '.join(facts)}"
