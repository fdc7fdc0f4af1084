"""A logger that keeps every scalar in memory, for tables and pictures made after training."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from stability_callbacks._atomic import atomic_path

__all__ = ["History", "HistoryLogger", "as_history"]

History = dict[str, list[tuple[int, float]]]
"""Metric name to its ``(step, value)`` pairs, in the order logged."""


def as_history(series: dict[str, list[list[float]]]) -> History:
    """Return what JSON made of a history as it was."""
    return {name: [(int(step), value) for step, value in pairs] for name, pairs in series.items()}


class HistoryLogger(Logger):
    """Collects the scalars that Lightning and the callbacks log, at full resolution, non-finite ones included.

    Attributes:
        history: What was logged so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: History = {}

    def write(self, path: Path) -> None:
        """Write what was logged so far to a file, whole or not at all."""
        with atomic_path(path) as part:
            part.write_text(json.dumps(self.history))  # with NaN and Infinity, which only read() has to understand

    def read(self, path: Path) -> None:
        """Go on from what :meth:`write` wrote."""
        self.history = as_history(json.loads(path.read_text()))

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.history.setdefault(name, []).append((step or 0, float(value)))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are not kept: the configuration file has them."""
