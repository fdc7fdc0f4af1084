"""Curves over steps: a drawing that stretches to any width, and the data from which the page's script draws them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stability_callbacks.report._envelope import bin_numbers, bins_of, envelope
from stability_callbacks.report._scalars import Series
from stability_callbacks.report._scale import Scale, number
from stability_callbacks.report._templates import Markup, kind_class, render

__all__ = ["SIZE", "Curve", "Label", "Mark", "MarkLine", "chart", "mark_lines", "place_of", "step_axis", "timeline"]

# Drawn in a square of this size, which the page stretches; lines keep their width.
SIZE = 1000
_BINS = 500
_HOVER_BINS = 96
_MARK_BINS = 200
_ZOOM_BINS = 1000


class Curve(NamedTuple):
    """A series with what it is called in the legend; as a line, or as dots if its points do not follow each other."""

    name: str
    series: Series
    dots: bool = False


class Mark(NamedTuple):
    """An incident on the axis of steps.

    Attributes:
        step: Where.
        kind: Its kind, which gives it its color.
        target: Where on the page it is told of.
    """

    step: int
    kind: str
    target: str


class Label(NamedTuple):
    """A text at a place along an axis, which is written in percent."""

    place: str
    text: str


class MarkLine(NamedTuple):
    """A line from top to bottom where there were incidents of one kind.

    Attributes:
        x: Where, in the drawing.
        first: The first step that it stands for.
        kind: Their kind.
        text: What it says under the pointer.
    """

    x: str
    first: int
    kind: str
    text: str


class _Line(NamedTuple):
    color: str
    path: str


class _Text(NamedTuple):
    x: str
    text: str


class _Entry(NamedTuple):
    color: str
    name: str
    facts: str


class _Link(NamedTuple):
    place: str
    target: str
    text: str


class _Row(NamedTuple):
    kind: str
    times: int
    links: list[_Link]


def chart(
    title: str,
    curves: Sequence[Curve],
    span: tuple[int, int],
    marks: Sequence[Mark] = (),
    logarithmic: bool | None = None,
) -> Markup:
    """Draw curves that share a scale; a value that is not finite is a mark at the upper edge.

    Args:
        title: What they show.
        curves: The curves.
        span: First and last step of the axis.
        marks: Incidents, each a line across the chart.
        logarithmic: Whether the scale shall be logarithmic. Default: if that suits the values.

    Returns:
        A figure. Where scripts run, the page replaces its drawing by one that can be zoomed.
    """
    values = np.concatenate([curve.series.values for curve in curves])
    scale = Scale.fitting(values, logarithmic)
    ticks = scale.ticks()
    upwards = sorted(range(len(curves)), key=lambda place: (curves[place].dots, -place))  # the first line over others
    return render(
        "chart.html",
        title=title,
        size=SIZE,
        logarithmic=scale.logarithmic,
        legend=[_Entry(_color(place, curve), curve.name, _facts(curve)) for place, curve in enumerate(curves)],
        ticks=[Label(f"{100 * place:.2f}", text) for place, text in ticks],
        grid=[f"{SIZE * (1 - place):.1f}" for place, _ in ticks],
        incidents=mark_lines(marks, span),
        lines=[_Line(_color(place, curves[place]), _path(curves[place], span, scale)) for place in upwards],
        breaks=_breaks(curves, span),
        stripes=_stripes(curves, span, marks),
        stripe_width=f"{SIZE / _HOVER_BINS:.1f}",
        steps=step_axis(span),
        data=_data(curves, span, marks, scale),
    )


def timeline(marks: Sequence[Mark], span: tuple[int, int]) -> Markup:
    """One row for each kind of incident, with a link at each step at which there was one."""
    by_kind: defaultdict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        by_kind[mark.kind].append(mark)

    def link(group: Sequence[Mark]) -> _Link:
        return _Link(f"{100 * place_of(group[0].step, span):.2f}", group[0].target, _of_group(group))

    rows = [
        _Row(kind, len(members), [link(group) for group in _grouped(members, span, _MARK_BINS)])
        for kind, members in by_kind.items()
    ]
    return render("timeline.html", rows=rows)


def mark_lines(marks: Sequence[Mark], span: tuple[int, int], bins: int = _MARK_BINS) -> list[MarkLine]:
    """A line for each incident; one for those of a kind that would lie on each other."""
    by_class: defaultdict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        by_class[kind_class(mark.kind)].append(mark)
    return [
        MarkLine(_x(group[0].step, span), group[0].step, group[0].kind, _of_group(group))
        for members in by_class.values()
        for group in _grouped(members, span, bins)
    ]


def step_axis(span: tuple[int, int]) -> list[Label]:
    """The numbers of steps under a chart."""
    low, high = span
    ticks = Scale(float(low), float(high)).ticks(8)
    return [Label(f"{100 * place:.2f}", text) for place, text in ticks if float(text.replace(",", "")) % 1 == 0]


def place_of(step: int, span: tuple[int, int]) -> float:
    """Where a step lies on the axis, from 0 to 1."""
    low, high = span
    return min(max((step - low) / (high - low), 0.0), 1.0)


def _data(curves: Sequence[Curve], span: tuple[int, int], marks: Sequence[Mark], scale: Scale) -> dict[str, object]:
    """What the page's script draws: the curves with more points than a drawing of one size has use for."""
    shortened = [envelope(curve.series, span, _ZOOM_BINS) for curve in curves]
    return {
        "span": span,
        "range": (scale.low, scale.high),
        "logarithmic": scale.logarithmic,
        "curves": [
            {
                "name": curve.name,
                "color": f"--{'text' if curve.dots else f'c{place}'}",
                "dots": curve.dots,
                "steps": short.steps.tolist(),
                "values": [_rounded(value) for value in short.values.tolist()],
            }
            for place, (curve, short) in enumerate(zip(curves, shortened, strict=True))
        ],
        "marks": [
            {"step": line.first, "color": f"--{kind_class(line.kind)}", "text": line.text}
            for line in mark_lines(marks, span, _ZOOM_BINS)
        ],
    }


def _rounded(value: float) -> float | str:
    """As many digits as a pointer shows; as text if JSON has no such number."""
    rounded = float(f"{value:.5g}")
    if np.isfinite(rounded):
        return rounded
    return value if np.isfinite(value) else number(value)  # the former where rounding left the range of floats


def _x(step: int, span: tuple[int, int]) -> str:
    return f"{SIZE * place_of(step, span):.1f}"


def _path(curve: Curve, span: tuple[int, int], scale: Scale) -> str:
    short = envelope(curve.series, span, _BINS)
    ys = SIZE * (1 - scale.place(short.values))
    path, pen_down = [], False
    for step, value, y in zip(short.steps.tolist(), short.values.tolist(), ys.tolist(), strict=True):
        if not np.isfinite(value):
            pen_down = False
            continue
        point = f"{_x(step, span)} {y:.1f}"
        path.append(f"L{point}" if pen_down else f"M{point}h0")  # h0: a point by itself is a dot
        pen_down = not curve.dots
    return "".join(path)


def _breaks(curves: Sequence[Curve], span: tuple[int, int]) -> list[_Text]:
    broken: defaultdict[int, list[str]] = defaultdict(list)
    for curve in curves:
        bad = _chosen(~np.isfinite(curve.series.values), curve.series)
        for part in bins_of(bad, span, _MARK_BINS).values():
            broken[part.first].append(f"{curve.name}: {_not_finite(part.broken)}, {_steps(part.first, part.last)}")
    return [_Text(_x(step, span), "\n".join(texts)) for step, texts in sorted(broken.items())]


def _chosen(places: NDArray[np.bool_], series: Series) -> Series:
    return Series(series.steps[places], series.values[places])


def _stripes(curves: Sequence[Curve], span: tuple[int, int], marks: Sequence[Mark]) -> list[_Text]:
    """Stripes that can't be seen, and say what lies in them."""
    texts: defaultdict[int, list[str]] = defaultdict(list)
    for curve in curves:
        for place, part in bins_of(curve.series, span, _HOVER_BINS).items():
            if not texts[place]:
                texts[place].append(_steps(part.first, part.last))
            least, most = number(part.least), number(part.most)
            values = least if least == most else f"{least} to {most}"
            of_finite = "" if np.isnan(part.least) else values
            said = ", ".join(filter(None, [of_finite, _not_finite(part.broken)]))
            texts[place].append(f"{curve.name}: {said}")
    for mark in marks:
        place = int(bin_numbers(np.array([mark.step]), span, _HOVER_BINS)[0])
        texts[place].append(f"{mark.kind} at step {mark.step:,}")
    return [
        _Text(f"{place * SIZE / _HOVER_BINS:.1f}", "\n".join(lines[:12] + ["..."] * (len(lines) > 12)))
        for place, lines in sorted(texts.items())
    ]


def _facts(curve: Curve) -> str:
    values = curve.series.values
    finite = values[np.isfinite(values)]
    facts = [f"last {number(float(values[-1]))}"]
    if finite.size:
        facts.append(f"max {number(float(finite.max()))}")
    if broken := values.size - finite.size:
        facts.append(_not_finite(broken))
    return " · ".join(facts)


def _color(place: int, curve: Curve) -> str:
    return "dots" if curve.dots else f"c{place}"


def _grouped(marks: Sequence[Mark], span: tuple[int, int], bins: int) -> list[list[Mark]]:
    groups: defaultdict[int, list[Mark]] = defaultdict(list)
    for mark in marks:
        groups[int(bin_numbers(np.array([mark.step]), span, bins)[0])].append(mark)
    return list(groups.values())


def _of_group(marks: Sequence[Mark]) -> str:
    times = f"{len(marks)} x " if len(marks) > 1 else ""
    return f"{times}{marks[0].kind}, {_steps(marks[0].step, marks[-1].step)}"


def _steps(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _not_finite(count: int) -> str:
    return f"{count:,} not finite" if count else ""
