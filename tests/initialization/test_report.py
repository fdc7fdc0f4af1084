"""What a report says, and how it is shown."""

from __future__ import annotations

import math
import pickle

import pytest
from rich.console import Console

from stability_callbacks.initialization import InitReport, InitRow

ROWS = (
    InitRow("a.weight", (4, 3), "zeros", 0.5, 0.1, 0.0, 0.0),
    InitRow("b", (), "left alone: frozen", 2.0, 0.0, 2.0, 0.0),
    InitRow("c.weight", None, "left alone: lazy", math.nan, math.nan, math.nan, math.nan),
)


def test_rows_are_found_by_name() -> None:
    report = InitReport(ROWS)
    assert len(report) == 3
    assert list(report) == list(ROWS)
    assert report["b"] is ROWS[1]
    with pytest.raises(KeyError, match="d"):
        report["d"]


def test_only_written_parameters_count_as_initialized() -> None:
    assert [row.initialized for row in ROWS] == [True, False, False]


def test_table_shows_each_parameter() -> None:
    lines = str(InitReport(ROWS)).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["parameter", "shape", "what", "was", "done", "mean", "std"]
    assert lines[1].split() == ["a.weight", "4x3", "zeros", "0.5", "->", "0", "0.1", "->", "0"]
    assert lines[2].split() == ["b", "scalar", "left", "alone:", "frozen", "2", "0"]
    assert lines[3].split() == ["c.weight", "lazy", "left", "alone:", "lazy", "nan", "nan"]


def test_rich_table_shows_the_same() -> None:
    # A name in brackets must not be taken for markup.
    rows = (*ROWS, InitRow("[red]x", (1,), "ones", 0.0, 0.0, 1.0, 0.0))
    console = Console(width=120, record=True, quiet=False, file=None)
    with console.capture() as capture:
        console.print(InitReport(rows))
    shown = capture.get()
    assert "2 of 4 parameters written" in shown
    for cell in ("a.weight", "4x3", "zeros", "0.1 -> 0", "left alone: frozen", "[red]x"):
        assert cell in shown


def test_empty_report() -> None:
    assert len(str(InitReport()).splitlines()) == 1
    assert not list(InitReport())


def test_report_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(InitReport(ROWS))).rows[:2] == ROWS[:2]
