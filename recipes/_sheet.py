"""A table that is shown on the screen and written as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

__all__ = ["Sheet"]


@dataclass
class Sheet:
    """Rows of text under a title.

    Attributes:
        title: What the table shows.
        columns: Names of the columns; those after the first ``labels`` ones hold numbers, save the last.
        labels: How many columns, from the left, are text.
        rows: The cells.
        colors: For each row, the colour of its last cell on the screen; "" for none.
    """

    title: str
    columns: tuple[str, ...]
    labels: int
    rows: list[tuple[str, ...]] = field(default_factory=list)
    colors: list[str] = field(default_factory=list)

    def add(self, *cells: str, color: str = "") -> None:
        """Add a row."""
        self.rows.append(cells)
        self.colors.append(color)

    def table(self) -> Table:
        """The table for the screen, with a gap wherever the first cell changes."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for index, name in enumerate(self.columns):
            text = index < self.labels or index == len(self.columns) - 1
            table.add_column(name, justify="left" if text else "right")
        for row, color, following in zip(self.rows, self.colors, [*self.rows[1:], None], strict=True):
            ends = following is not None and following[0] != row[0]
            table.add_row(*(Text(cell) for cell in row[:-1]), Text(row[-1], style=color), end_section=ends)
        return table

    def markdown(self) -> str:
        """The table for a file, as GitHub renders it."""
        names = [name.replace("\n", " ") for name in self.columns]
        lines = [f"**{self.title}**", "", _line(names), _line("---" for _ in names), *map(_line, self.rows)]
        return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
