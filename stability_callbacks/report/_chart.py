"""Curves over steps that stretch to any width, with what lies under the pointer said in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stability_callbacks.report._envelope import bin_numbers, bins_of, envelope
from stability_callbacks.report._html import Html, tag
from stability_callbacks.report._scalars import Series
from stability_callbacks.report._scale import Scale, number

__all__ = ["Curve", "Mark", "chart", "kind_class", "mark_lines", "place_of", "step_axis", "timeline"]

# Drawn in a square of this size, which the page stretches; lines keep their width.
SIZE = 1000
_BINS = 500
_HOVER_BINS = 96
_MARK_BINS = 200
_KINDS = ("nonfinite", "spike", "input", "rollback", "checkpoint_refused", "loss_scale")


class Curve(NamedTuple):
    """A series with what it is called in the legend; as a line, or as dots if its points do not follow each other."""

    name: str
    series: Series
    dots: bool = False


class Mark(NamedTuple):
    """An incident on the axis of steps.

    Attributes:
        step: Where.
        kind: Its kind, which gives it its colour.
        target: Where on the page it is told of.
    """

    step: int
    kind: str
    target: str


def chart(
    title: str,
    curves: Sequence[Curve],
    span: tuple[int, int],
    marks: Sequence[Mark] = (),
    logarithmic: bool | None = None,
) -> Html:
    """Draw curves that share a scale; a value that is not finite is a mark at the upper edge.

    Args:
        title: What they show.
        curves: The curves.
        span: First and last step of the axis.
        marks: Incidents, each a line across the chart.
        logarithmic: Whether the scale shall be logarithmic. Default: if that suits the values.

    Returns:
        A figure.
    """
    values = np.concatenate([curve.series.values for curve in curves])
    scale = Scale.fitting(values, logarithmic)
    ticks = scale.ticks()
    upwards = sorted(range(len(curves)), key=lambda place: (curves[place].dots, -place))  # the first line over others
    drawing = [
        *(_grid_line(place) for place, _ in ticks),
        *mark_lines(marks, span),
        *(_line(place, curves[place], span, scale) for place in upwards),
        *_breaks(curves, span),
        *_hover(curves, span, marks),
    ]
    labels = [tag("span", text, style=f"bottom:{100 * place:.2f}%") for place, text in ticks]
    legend = tag("ul", *(_legend(place, curve) for place, curve in enumerate(curves)), class_="legend")
    note = tag("span", "logarithmic", class_="note") if scale.logarithmic else ""
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), " ", note, legend),
        tag("div", *labels, class_="ticks"),
        tag("div", tag("div", _svg(drawing), class_="plot"), step_axis(span)),
        class_="chart",
    )


def timeline(marks: Sequence[Mark], span: tuple[int, int]) -> Html:
    """One row for each kind of incident, with a link at each step at which there was one."""
    by_kind: defaultdict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        by_kind[mark.kind].append(mark)
    rows = []
    for kind, members in by_kind.items():
        links = [
            tag(
                "a",
                href=f"#{group[0].target}",
                title=_of_group(group),
                aria_label=_of_group(group),
                style=f"left:{100 * place_of(group[0].step, span):.2f}%",
            )
            for group in _grouped(members, span)
        ]
        caption = tag("div", tag("span", class_="dot"), f"{kind} ", tag("span", str(len(members)), class_="note"))
        rows.append(tag("div", caption, tag("div", *links, class_="lane"), class_=f"row {kind_class(kind)}"))
    return tag("div", *rows, class_="timeline")


def mark_lines(marks: Sequence[Mark], span: tuple[int, int]) -> list[Html]:
    """A line from top to bottom for each incident; one for those that would lie on each other."""
    by_kind: defaultdict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        by_kind[kind_class(mark.kind)].append(mark)
    return [
        tag(
            "line",
            tag("title", _of_group(group)),
            class_=f"incident {kind}",
            x1=f"{SIZE * place_of(group[0].step, span):.1f}",
            x2=f"{SIZE * place_of(group[0].step, span):.1f}",
            y1=0,
            y2=SIZE,
        )
        for kind, members in by_kind.items()
        for group in _grouped(members, span)
    ]


def step_axis(span: tuple[int, int]) -> Html:
    """The numbers of steps under a chart."""
    low, high = span
    ticks = Scale(float(low), float(high)).ticks(8)
    texts = [
        tag("span", text, style=f"left:{100 * place:.2f}%")
        for place, text in ticks
        if float(text.replace(",", "")) % 1 == 0
    ]
    return tag("div", *texts, class_="steps")


def place_of(step: int, span: tuple[int, int]) -> float:
    """Where a step lies on the axis, from 0 to 1."""
    low, high = span
    return min(max((step - low) / (high - low), 0.0), 1.0)


def kind_class(kind: str) -> str:
    """The class that gives a kind of incident its colour."""
    return kind if kind in _KINDS else "other"


def _svg(drawing: Sequence[Html]) -> Html:
    return tag("svg", *drawing, viewBox=f"0 0 {SIZE} {SIZE}", preserveAspectRatio="none", role="img")


def _grid_line(place: float) -> Html:
    y = f"{SIZE * (1 - place):.1f}"
    return tag("line", class_="grid", x1=0, x2=SIZE, y1=y, y2=y)


def _line(place: int, curve: Curve, span: tuple[int, int], scale: Scale) -> Html:
    short = envelope(curve.series, span, _BINS)
    ys = SIZE * (1 - scale.place(short.values))
    path, pen_down = [], False
    for step, value, y in zip(short.steps.tolist(), short.values.tolist(), ys.tolist(), strict=True):
        if not np.isfinite(value):
            pen_down = False
            continue
        point = f"{SIZE * place_of(step, span):.1f} {y:.1f}"
        path.append(f"L{point}" if pen_down else f"M{point}h0")  # h0: a point by itself is a dot
        pen_down = not curve.dots
    return tag("path", class_=_curve_class("curve", place, curve), d="".join(path))


def _breaks(curves: Sequence[Curve], span: tuple[int, int]) -> list[Html]:
    broken: defaultdict[int, list[str]] = defaultdict(list)
    for curve in curves:
        bad = _chosen(~np.isfinite(curve.series.values), curve.series)
        for part in bins_of(bad, span, _MARK_BINS).values():
            broken[part.first].append(f"{curve.name}: {_not_finite(part.broken)}, {_steps(part.first, part.last)}")
    return [
        tag(
            "line",
            tag("title", "\n".join(texts)),
            class_="broken",
            x1=f"{SIZE * place_of(step, span):.1f}",
            x2=f"{SIZE * place_of(step, span):.1f}",
            y1=0,
            y2=SIZE // 12,
        )
        for step, texts in sorted(broken.items())
    ]


def _chosen(places: NDArray[np.bool_], series: Series) -> Series:
    return Series(series.steps[places], series.values[places])


def _hover(curves: Sequence[Curve], span: tuple[int, int], marks: Sequence[Mark]) -> list[Html]:
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
    width = SIZE / _HOVER_BINS
    return [
        tag(
            "rect",
            tag("title", "\n".join(lines[:12] + ["..."] * (len(lines) > 12))),
            class_="hover",
            x=f"{place * width:.1f}",
            y=0,
            width=f"{width:.1f}",
            height=SIZE,
        )
        for place, lines in sorted(texts.items())
    ]


def _legend(place: int, curve: Curve) -> Html:
    values = curve.series.values
    finite = values[np.isfinite(values)]
    facts = [f"last {number(float(values[-1]))}"]
    if finite.size:
        facts.append(f"max {number(float(finite.max()))}")
    if broken := values.size - finite.size:
        facts.append(_not_finite(broken))
    return tag(
        "li",
        tag("span", class_=_curve_class("swatch", place, curve)),
        tag("span", curve.name),
        tag("span", " · ".join(facts), class_="note"),
    )


def _curve_class(name: str, place: int, curve: Curve) -> str:
    return f"{name} {'dots' if curve.dots else f'c{place}'}"


def _grouped(marks: Sequence[Mark], span: tuple[int, int]) -> list[list[Mark]]:
    groups: defaultdict[int, list[Mark]] = defaultdict(list)
    for mark in marks:
        groups[int(bin_numbers(np.array([mark.step]), span, _MARK_BINS)[0])].append(mark)
    return list(groups.values())


def _of_group(marks: Sequence[Mark]) -> str:
    times = f"{len(marks)} x " if len(marks) > 1 else ""
    return f"{times}{marks[0].kind}, {_steps(marks[0].step, marks[-1].step)}"


def _steps(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _not_finite(count: int) -> str:
    return f"{count:,} not finite" if count else ""
