"""A run on one page: its curves, what happened in it, and what to change. Needs neither Lightning nor a network."""

from __future__ import annotations

import os
from pathlib import Path

from stability_callbacks._atomic import atomic_path
from stability_callbacks.report._advice import Advice, Observation, advise, cure_of
from stability_callbacks.report._page import page
from stability_callbacks.report._run import find_places, read_run

__all__ = ["Advice", "Observation", "advise", "cure_of", "write_report"]

_MOST_RUNS = 10


def write_report(directory: str | os.PathLike[str], output: str | os.PathLike[str] = "report.html") -> Path:
    """Write one HTML page about the runs that left files in a directory or below.

    It reads TensorBoard's event files, ``metrics.csv`` of ``CSVLogger``, and what ``FlightRecorder`` wrote. Each run
    has a section, the newest first, and the ten newest are shown. Where a run has no logs, the curves are those that
    its bundles hold.

    Args:
        directory: A run's directory, or one above it such as ``lightning_logs``.
        output: The page. Default: ``report.html`` in the working directory.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If the directory does not exist, or nothing of a run is in it.
        OSError: If the page can't be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from stability_callbacks.diagnosis import Incident, IncidentLog
        >>> with TemporaryDirectory() as run:
        ...     IncidentLog(f"{run}/flight_record/incidents.jsonl").append(Incident(7, 0, 7, 0, "spike", {}, "skipped"))
        ...     write_report(run, f"{run}/report.html").name
        'report.html'
    """
    directory, output = Path(directory), Path(output)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    places = find_places(directory)
    if not places:
        raise FileNotFoundError(
            f"nothing of a run was found in {directory} or below: neither event files of TensorBoard, nor metrics.csv, "
            "nor incidents.jsonl. Give the directory to which a logger or FlightRecorder wrote."
        )
    shown = places[:_MOST_RUNS]
    text = page([read_run(place) for place in shown], directory, left_out=len(places) - len(shown))
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")  # a record may hold lone surrogates
    return output
