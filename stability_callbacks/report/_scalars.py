"""The curves that loggers wrote: TensorBoard's event files and the table of ``CSVLogger``."""

from __future__ import annotations

import csv
import itertools
import struct
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
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
        The metrics. Warns of damaged events, and of lines and cells of the table that are no numbers, and leaves them
        out.
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
    for path in sorted(directory.glob(f"*{EVENT_FILE}*")):
        if (damage := _damage_of(path)) is not None:
            warnings.warn(f"{path}: {damage}; what comes after is left out", stacklevel=2)
    events = EventAccumulator(str(directory), size_guidance=most)
    try:
        events.Reload()
    except Exception as error:  # noqa: BLE001  # what is no event may raise anything; those read so far are kept
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"{directory}: its event files are read in part only ({reason})", stacklevel=2)
    series, times = {}, []
    for name in events.Tags()[SCALARS]:
        points = events.Scalars(name)
        series[name] = Series.of((point.step, point.value) for point in points)
        times += [points[0].wall_time, points[-1].wall_time]
    return Scalars(series, max(times) - min(times) if times else None)


def _damage_of(path: Path) -> str | None:
    """Where and how an event file is damaged, which TensorBoard's reader takes for its end; None if it is whole.

    Each event is its length (8 bytes), the length's checksum (4), the event itself, and its checksum (4).
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # type: ignore[import-untyped]

    with path.open("rb") as file:
        for event in itertools.count(1):
            if not (head := file.read(12)):
                return None
            if len(head) < 12:
                break
            length, checksum = struct.unpack("<QI", head)
            if masked_crc32c(head[:8]) != checksum:
                return f"event {event} is damaged"
            if length > path.stat().st_size:
                break
            body = file.read(length + 4)
            if len(body) < length + 4:
                break
            if masked_crc32c(body[:-4]) != struct.unpack("<I", body[-4:])[0]:
                return f"event {event} is damaged"
    return f"event {event} was not written completely"


def _read_table(path: Path) -> dict[str, Series]:
    points: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    # Bytes that are not UTF-8 become characters that no number holds, so that they cost their cell and no more.
    with path.open(newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.DictReader(file)
        try:
            for row in table:
                _read_row(row, points, f"{path}, line {table.line_num}")
        except csv.Error as error:  # such as a cell of more than 131,072 characters
            warnings.warn(f"{path}, line {table.line_num}: the rest is left out ({error})", stacklevel=2)
    return {name: Series.of(each) for name, each in points.items()}


def _read_row(row: Mapping[str | None, str], points: dict[str, list[tuple[int, float]]], place: str) -> None:
    step = row.get("step")
    if not step:
        return
    try:
        at = int(step)
        if not -(2**63) <= at < 2**63:
            raise ValueError
    except ValueError:
        warnings.warn(f"{place} is left out: step {step!r} is not an integer of at most 64 bits", stacklevel=3)
        return
    for name, cell in row.items():
        if name is None:  # how the reader marks cells that have no column
            warnings.warn(f"{place} has more cells than columns; the last are left out", stacklevel=3)
        elif cell and name not in ("step", "epoch"):
            try:
                points[name].append((at, float(cell)))
            except ValueError:
                warnings.warn(f"{place}: {cell!r} in column {name!r} is left out: it is not a number", stacklevel=3)
