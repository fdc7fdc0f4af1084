"""What came of the runs: kept on disk, compared, drawn and shown."""

from recipes.results._comparison import sheets
from recipes.results._curves import draw_curves
from recipes.results._history import History, HistoryLogger, as_history
from recipes.results._paired import PairedComparison, compare_in_pairs
from recipes.results._report import report, write_results
from recipes.results._run import Goal, Run, Variant
from recipes.results._sheet import Cell, Sheet

__all__ = [
    "Cell",
    "Goal",
    "History",
    "HistoryLogger",
    "PairedComparison",
    "Run",
    "Sheet",
    "Variant",
    "as_history",
    "compare_in_pairs",
    "draw_curves",
    "report",
    "sheets",
    "write_results",
]
