"""What an initialization did, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["InitReport", "InitRow"]

_HEADINGS = ("parameter", "shape", "what was done", "mean", "std")


class InitRow(NamedTuple):
    """What happened to one parameter.

    A parametrised weight is one parameter here, under the name and with the values that its layer sees.

    Attributes:
        name: The parameter's full name in the model, without the segments that wrappers such as ``torch.compile`` add.
        shape: Its shape; None where it is lazy and has none yet.
        what: What was done, or ``left alone: `` and why.
        mean_before: Mean of its values before; NaN where there are none.
        std_before: Their standard deviation, over all values.
        mean_after: Mean of its values after.
        std_after: Their standard deviation.
    """

    name: str
    shape: tuple[int, ...] | None
    what: str
    mean_before: float
    std_before: float
    mean_after: float
    std_after: float

    @property
    def initialized(self) -> bool:
        """Whether the parameter was written."""
        return not self.what.startswith("left alone")


@dataclass(frozen=True)
class InitReport:
    """The rows of an initialization, one per parameter and name, in the model's order.

    ``str(report)`` is a plain table, and ``rich.print(report)`` a colored one.

    Attributes:
        rows: What happened to each parameter.

    Example:
        >>> import torch
        >>> from stability_callbacks.initialization import Xavier
        >>> _ = torch.manual_seed(0)
        >>> report = Xavier().apply(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4)))
        >>> report["0.weight"].what
        'Xavier uniform, gain 1 (no activation found after it)'
        >>> [row.name for row in report if not row.initialized]
        ['1.weight', '1.bias']
    """

    rows: tuple[InitRow, ...] = ()

    def __iter__(self) -> Iterator[InitRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> InitRow:
        """Return the row of the parameter with this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        lines = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        count = sum(row.initialized for row in self.rows)
        table = Table(title=f"Initialization: {count} of {len(self)} parameters written")
        for heading in _HEADINGS:
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, _cells(row)), style=None if row.initialized else "dim")
        return table


def _cells(row: InitRow) -> tuple[str, ...]:
    shape = "lazy" if row.shape is None else "x".join(map(str, row.shape)) or "scalar"
    mean, std = (_change(row.mean_before, row.mean_after), _change(row.std_before, row.std_after))
    return row.name, shape, row.what, mean, std


def _change(before: float, after: float) -> str:
    first, last = f"{before:.2g}", f"{after:.2g}"
    return first if first == last else f"{first} -> {last}"
