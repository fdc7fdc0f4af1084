"""The steps of a history, and a table of them that people and spreadsheets can read."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stability_callbacks._atomic import atomic_path

__all__ = ["StepRow", "read_history", "write_history"]

_NORM = "grad_norm/"
_RATE = "lr"
_APPLY = "apply"
_INTEGERS = ("step", "epoch", "batch_idx")
_NUMBERS = ("loss", "grad_norm", "grad_norm_clipped", "clip_coefficient")


class StepRow(NamedTuple):
    """What is known of one step of one optimizer, on the host.

    Attributes:
        step: Number of the step.
        epoch: The epoch.
        batch_idx: The batch that completed the step.
        lr: Learning rate of each parameter group.
        loss: Mean loss over the step's micro-batches; NaN where it was NaN, or was not seen.
        grad_norm: Raw total gradient norm.
        grad_norm_clipped: Total norm after clipping.
        clip_coefficient: What clipping multiplied the total norm by.
        verdict: The kinds of incident for which the step was skipped; empty if the update was applied.
        loss_scale: The loss scale; None if there is no scaler.
        norms: Raw gradient norm by parameter or by layer. Those without a gradient in this step are not there.
    """

    step: int
    epoch: int
    batch_idx: int
    lr: tuple[float, ...]
    loss: float
    grad_norm: float
    grad_norm_clipped: float
    clip_coefficient: float
    verdict: tuple[str, ...]
    loss_scale: float | None
    norms: dict[str, float]

    @property
    def skipped(self) -> bool:
        """Whether the update was not applied."""
        return bool(self.verdict)


def write_history(rows: Sequence[StepRow], path: str | os.PathLike[str]) -> None:
    """Write a history as CSV, complete or not at all.

    The columns are ``step``, ``epoch``, ``batch_idx``, ``lr`` (and ``lr/pg2``, ... for further parameter groups),
    ``loss``, ``grad_norm``, ``grad_norm_clipped``, ``clip_coefficient``, ``verdict`` (``apply``, or the kinds of
    incident for which the step was skipped, joined by ``+``), ``loss_scale``, and ``grad_norm/<layer>``. An empty cell
    says that there was nothing, such as no gradient; ``nan`` and ``inf`` are values. Numbers have nine significant
    digits, which tell any two float32 apart, learning rates all of theirs.

    Args:
        rows: The steps.
        path: The file.

    Example:
        >>> row = StepRow(7, 0, 7, (0.1,), 2.5, 5.0, 1.0, 0.2, ("spike",), None, {"net": 5.0})
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     path = Path(directory, "history.csv")
        ...     write_history([row], path)
        ...     print(path.read_text().strip())
        ...     read_history(path) == [row]
        step,epoch,batch_idx,lr,loss,grad_norm,grad_norm_clipped,clip_coefficient,verdict,loss_scale,grad_norm/net
        7,0,7,0.1,2.5,5,1,0.2,spike,,5
        True
    """
    groups = max((len(row.lr) for row in rows), default=0)
    norms = [_NORM + name for name in dict.fromkeys(name for row in rows for name in row.norms)]
    rates = [_rate_column(group) for group in range(max(groups, 1))]
    columns = [*_INTEGERS, *rates, *_NUMBERS, "verdict", "loss_scale", *norms]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_cells(row) for row in rows)


def read_history(path: str | os.PathLike[str]) -> list[StepRow]:
    """Read a history that :func:`write_history` wrote.

    Args:
        path: The file.

    Returns:
        The steps.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file, strict=True)
        try:
            if not table.fieldnames:
                raise ValueError("no header")
            return [_row(cells) for cells in table]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {table.line_num}, is not of a history of steps: {error!r}") from error


def _cells(row: StepRow) -> dict[str, str]:
    return {
        **{name: str(getattr(row, name)) for name in _INTEGERS},
        **{_rate_column(group): repr(rate) for group, rate in enumerate(row.lr)},
        **{name: format(getattr(row, name), ".9g") for name in _NUMBERS},
        "verdict": "+".join(row.verdict) or _APPLY,
        "loss_scale": "" if row.loss_scale is None else format(row.loss_scale, ".9g"),
        **{_NORM + name: format(norm, ".9g") for name, norm in row.norms.items()},
    }


def _row(cells: Mapping[str, str]) -> StepRow:
    if None in cells or None in cells.values():  # how the reader marks cells too many, and too few
        raise ValueError("wrong number of cells")
    step, epoch, batch_idx = (int(cells[name]) for name in _INTEGERS)
    if not -(2**63) <= step < 2**63:
        raise ValueError(f"step {step} does not fit into 64 bits")
    loss, norm, clipped_norm, coefficient = (float(cells[name]) for name in _NUMBERS)
    rates = (cell for column, cell in cells.items() if column == _RATE or column.startswith(f"{_RATE}/"))
    verdict = cells["verdict"]
    return StepRow(
        step,
        epoch,
        batch_idx,
        tuple(float(cell) for cell in rates if cell),
        loss,
        norm,
        clipped_norm,
        coefficient,
        () if verdict == _APPLY else tuple(verdict.split("+")),
        float(cells["loss_scale"]) if cells["loss_scale"] else None,
        {
            column.removeprefix(_NORM): float(cell)
            for column, cell in cells.items()
            if column.startswith(_NORM) and cell
        },
    )


def _rate_column(group: int) -> str:
    return f"{_RATE}/pg{group + 1}" if group else _RATE
