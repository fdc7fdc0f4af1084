"""The tables, for the screen and for ``summary.md``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from recipes.gradient_flow._summary import Summary
from recipes.gradient_flow._verdict import Verdict
from recipes.results import Cell, Sheet

__all__ = ["MARKS", "depth_sheets", "initialization_sheet"]

MARKS: dict[Verdict, str] = {"vanishing": "↓", "exploding": "↑", "sound": ""}
_COLORS: dict[Verdict, str] = {"vanishing": "yellow", "exploding": "red", "sound": "green"}


def initialization_sheet(summaries: Sequence[Summary]) -> Sheet:
    """One row an activation and initialization: medians over the seeds."""
    depth, seeds = summaries[0].setting.depth, len(summaries[0].observations)
    title = f"Initializations, {depth} layers: medians of {_seeds(seeds)}"
    columns = ("activation", "init", "first", "last", "ratio", "inner", "signal", "verdict")
    sheet = Sheet(title, columns, labels=2)
    for each in summaries:
        sheet.add(
            each.setting.activation,
            each.setting.initialization,
            _number(each.of(lambda m: m.first).median),
            _number(each.of(lambda m: m.last).median),
            _ratio(each.of(lambda m: m.ratio).median),
            _ratio(each.of(lambda m: m.inner_ratio).median) if depth > 3 else "-",
            _number(each.of(lambda m: m.signal).median),
            Cell(_opinion(each), _COLORS[each.verdict]),
        )
    return sheet


def depth_sheets(summaries: Sequence[Summary]) -> list[Sheet]:
    """Two tables with one column a depth: the first layer's gradient norm, and its ratio to the last one's."""
    seeds = _seeds(len(summaries[0].observations))
    return [
        _by_depth(f"Depths, gradient norm of the first layer: medians of {seeds}", summaries, _first),
        _by_depth(f"Depths, ratio of the first layer's to the last one's: medians of {seeds}", summaries, _first_ratio),
    ]


def _by_depth(title: str, summaries: Sequence[Summary], show: Callable[[Summary], str]) -> Sheet:
    depths = list(dict.fromkeys(each.setting.depth for each in summaries))
    lines: dict[tuple[str, str], list[Cell]] = {}
    for each in summaries:
        cells = lines.setdefault((each.setting.activation, each.setting.initialization), [])
        cells.append(Cell(show(each) + MARKS[each.verdict], _COLORS[each.verdict]))
    sheet = Sheet(title, ("activation", "init", *map(str, depths)), labels=2)
    for (activation, name), cells in lines.items():
        sheet.add(activation, name, *cells)
    return sheet


def _first(summary: Summary) -> str:
    return _number(summary.of(lambda m: m.first).median)


def _first_ratio(summary: Summary) -> str:
    return _ratio(summary.of(lambda m: m.ratio).median)


def _number(value: float) -> str:
    return f"{value:.2g}"


def _ratio(value: float) -> str:
    return "0/0" if math.isnan(value) else _number(value)


def _opinion(summary: Summary) -> str:
    seeds = len(summary.observations)
    return summary.verdict if summary.agreeing == seeds else f"{summary.verdict} {summary.agreeing}/{seeds}"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
