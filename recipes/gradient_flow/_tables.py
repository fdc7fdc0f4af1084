"""The tables, for the screen and for ``summary.md``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from recipes.gradient_flow._summary import Summary
from recipes.gradient_flow._verdict import Verdict

__all__ = ["MARKS", "Sheet", "depth_sheets", "initialization_sheet", "markdown", "rich_table"]

MARKS: dict[Verdict, str] = {"vanishing": "↓", "exploding": "↑", "sound": ""}
_STYLES: dict[Verdict, str] = {"vanishing": "yellow", "exploding": "red", "sound": "green"}


class Cell(NamedTuple):
    """A number or a word, and the verdict that gives it its colour."""

    text: str
    verdict: Verdict | None = None


class Sheet(NamedTuple):
    """A table, before it is known where it is shown.

    Attributes:
        title: Above it.
        headings: Of the columns.
        rows: Cells; of each row the first is an activation, the second an initialisation.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def initialization_sheet(summaries: Sequence[Summary]) -> Sheet:
    """One row an activation and initialisation: medians over the seeds."""
    depth, seeds = summaries[0].setting.depth, len(summaries[0].observations)
    rows = [
        (
            Cell(each.setting.activation),
            Cell(each.setting.initialization),
            Cell(_number(each.of(lambda m: m.first).median)),
            Cell(_number(each.of(lambda m: m.last).median)),
            Cell(_ratio(each.of(lambda m: m.ratio).median)),
            Cell(_ratio(each.of(lambda m: m.inner_ratio).median) if depth > 3 else "-"),
            Cell(_number(each.of(lambda m: m.signal).median)),
            Cell(_opinion(each), each.verdict),
        )
        for each in summaries
    ]
    return Sheet(
        f"Initialisations, {depth} layers: medians of {_seeds(seeds)}",
        ("activation", "init", "first", "last", "ratio", "inner", "signal", "verdict"),
        rows,
    )


def depth_sheets(summaries: Sequence[Summary]) -> list[Sheet]:
    """Two tables with one column a depth: the first layer's gradient norm, and its ratio to the last one's."""
    seeds = _seeds(len(summaries[0].observations))
    return [
        _by_depth(f"Depths, gradient norm of the first layer: medians of {seeds}", summaries, _first),
        _by_depth(f"Depths, ratio of the first layer's to the last one's: medians of {seeds}", summaries, _first_ratio),
    ]


def markdown(sheet: Sheet) -> str:
    """The table in Markdown, with its title as a heading."""
    lines = [
        sheet.headings,
        ["---", "---", *["---:"] * (len(sheet.headings) - 2)],
        *([cell.text for cell in row] for row in sheet.rows),
    ]
    return "\n".join([f"## {sheet.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def rich_table(sheet: Sheet) -> Table:
    """The table for a screen, one section an activation."""
    table = Table(title=sheet.title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column, heading in enumerate(sheet.headings):
        table.add_column(heading, justify="left" if column < 2 or heading == "verdict" else "right", no_wrap=True)
    for row, following in zip(sheet.rows, [*sheet.rows[1:], None], strict=True):
        cells = [Text(cell.text, style=_STYLES[cell.verdict] if cell.verdict else "") for cell in row]
        table.add_row(*cells, end_section=following is not None and following[0] != row[0])
    return table


def _by_depth(title: str, summaries: Sequence[Summary], show: Callable[[Summary], str]) -> Sheet:
    depths = list(dict.fromkeys(each.setting.depth for each in summaries))
    lines: dict[tuple[str, str], list[Cell]] = {}
    for each in summaries:
        cells = lines.setdefault((each.setting.activation, each.setting.initialization), [])
        cells.append(Cell(show(each) + MARKS[each.verdict], each.verdict))
    rows = [(Cell(activation), Cell(name), *cells) for (activation, name), cells in lines.items()]
    return Sheet(title, ("activation", "init", *map(str, depths)), rows)


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
