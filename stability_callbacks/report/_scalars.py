"""The curves that loggers wrote: TensorBoard's event files and the table of ``CSVLogger``."""

from __future__ import annotations

import csv
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["EVENT_FILE", "TABLE", "Scalars", "Series", "read_scalars"]

EVENT_FILE = "events.out.tfevents"
TABLE = "metrics.csv"


class Series(NamedTuple):
    """One metric over a run, in order of steps.

    Attributes:
        steps: Where it was logged, shape ``[N]``.
        values: What was logged, shape ``[N]``; NaN and infinities are values.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, points: Iterable[tuple[int, float]]) -> Series:
        """A series of steps and values in any order; those of one step stay in theirs."""
        pairs = sorted(points, key=lambda point: point[0])
        return cls(np.array([step for step, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float64))


class Scalars(NamedTuple):
    """What the loggers of one run wrote.

    Attributes:
        series: The metrics by name.
        seconds: Time from the first to the last of them; None where it is not known.
    """

    series: dict[str, Series]
    seconds: float | None


def read_scalars(directory: Path) -> Scalars:
    """Read the event files and the table in a directory, if they are there; what both hold is taken from the former.

    Args:
        directory: Where a logger wrote, not what is above it.

    Returns:
        The metrics. Warns of cells in the table that are not numbers, and leaves them out.
    """
    table = directory / TABLE
    series = _read_table(table) if table.is_file() else {}
    seconds = None
    if any(directory.glob(f"*{EVENT_FILE}*")):
        events, seconds = _read_events(directory)
        series |= events
    return Scalars(series, seconds)


def _read_events(directory: Path) -> Scalars:
    # Slow to import, and not needed for tables.
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        COMPRESSED_HISTOGRAMS,
        HISTOGRAMS,
        IMAGES,
        SCALARS,
        EventAccumulator,
    )

    most = {SCALARS: 0, HISTOGRAMS: 1, COMPRESSED_HISTOGRAMS: 1, IMAGES: 1}  # 0: all
    events = EventAccumulator(str(directory), size_guidance=most)
    events.Reload()
    series, times = {}, []
    for name in events.Tags()[SCALARS]:
        points = events.Scalars(name)
        series[name] = Series.of((point.step, point.value) for point in points)
        times += [points[0].wall_time, points[-1].wall_time]
    return Scalars(series, max(times) - min(times) if times else None)


def _read_table(path: Path) -> dict[str, Series]:
    points: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = row.pop("step", None)
            for name, cell in row.items():
                if not cell or not step or name in (None, "epoch"):
                    continue
                try:
                    points[name].append((int(step), float(cell)))
                except ValueError:
                    warnings.warn(f"{path}: {cell!r} in column {name!r} is left out: it is not a number", stacklevel=2)
    return {name: Series.of(each) for name, each in points.items()}
