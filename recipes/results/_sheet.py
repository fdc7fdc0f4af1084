"""A table that is shown on the screen and written as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

__all__ = ["Cell", "Sheet"]

WORDS = ("verdict", "success")
"""Columns of text, wherever they stand."""


class Cell(NamedTuple):
    """A number or a word, and its color on the screen."""

    text: str
    color: str = ""


@dataclass
class Sheet:
    """Rows of cells under a title.

    Attributes:
        title: What the table shows.
        columns: Names of the columns.
        labels: How many columns, from the left, are text; those after them hold numbers, save verdicts.
        rows: The cells.
    """

    title: str
    columns: tuple[str, ...]
    labels: int
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def add(self, *cells: str | Cell) -> None:
        """Add a row."""
        self.rows.append(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells))

    def table(self) -> Table:
        """The table for the screen, with a gap wherever the first cell changes."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for index, name in enumerate(self.columns):
            table.add_column(name, justify="left" if self._is_text(index) else "right")
        for row, following in zip(self.rows, [*self.rows[1:], None], strict=True):
            ends = following is not None and following[0] != row[0]
            table.add_row(*(Text(cell.text, style=cell.color) for cell in row), end_section=ends)
        return table

    def markdown(self) -> str:
        """The table for a file, with its title as a heading."""
        names = [name.replace("\n", " ") for name in self.columns]
        rules = ("---" if self._is_text(index) else "---:" for index in range(len(names)))
        lines = [f"## {self.title}", "", _line(names), _line(rules), *(_line(c.text for c in row) for row in self.rows)]
        return "\n".join(lines) + "\n"

    def _is_text(self, column: int) -> bool:
        return column < self.labels or self.columns[column] in WORDS


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
