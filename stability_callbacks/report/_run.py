"""What training left behind, found and put together."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from stability_callbacks.diagnosis import Bundle, BundleError, Cause, Incident, read_bundle, read_incidents
from stability_callbacks.report._scalars import EVENT_FILE, TABLE, Scalars, Series, read_scalars

__all__ = ["Place", "Run", "find_places", "read_run"]

_RECORD = "flight_record"
_INCIDENTS = "incidents.jsonl"
_BUNDLES = "bundles"
_MANIFEST = "manifest.json"


class Place(NamedTuple):
    """Where a run left its files.

    Attributes:
        directory: Where its loggers wrote, or, if there are none, where its record lies.
        records: The directories of its records of incidents.
        newest: When something in it was last written, in seconds since 1970.
    """

    directory: Path
    records: tuple[Path, ...]
    newest: float


class Run(NamedTuple):
    """One run: its curves and its record.

    Attributes:
        directory: As in :class:`Place`.
        scalars: The curves.
        incidents: The incidents, in order of steps.
        recorded: Whether a record of incidents was found.
        bundles: Its bundles, by their directories. In place of one that can't be read there is the error that says why.
    """

    directory: Path
    scalars: Scalars
    incidents: list[Incident]
    recorded: bool
    bundles: dict[Path, Bundle | BundleError]

    @property
    def readable_bundles(self) -> list[Bundle]:
        """The bundles that could be read, in order of steps."""
        readable = [bundle for bundle in self.bundles.values() if isinstance(bundle, Bundle)]
        return sorted(readable, key=lambda bundle: bundle.incident.step)

    def bundle_of(self, incident: Incident) -> Path | None:
        """The directory of an incident's bundle, if it is still there."""
        name = incident.bundle and Path(incident.bundle).name
        return next((path for path in self.bundles if path.name == name), None)

    def cause_of(self, incident: Incident) -> Cause | None:
        """What was found to be the cause of an incident, if its bundle is still there and tells."""
        path = self.bundle_of(incident)
        bundle = None if path is None else self.bundles[path]
        return bundle.cause if isinstance(bundle, Bundle) else None


def find_places(directory: Path) -> list[Place]:
    """Find the runs in a directory and below, the newest first.

    A run is a directory that a logger wrote to. A record of incidents belongs to the run in whose directory it lies,
    and to the only run there is if it lies elsewhere; otherwise it makes a run of its own.

    Args:
        directory: The directory.

    Returns:
        Where they are.
    """
    logs, records = _walk(directory)
    places: dict[Path, list[Path]] = {each: [] for each in logs}
    for record in records:
        home = record.parent if record.name == _RECORD or record.parent in logs else record
        if home not in logs and len(logs) == 1:
            home = logs[0]
        places.setdefault(home, []).append(record)
    found = [Place(home, tuple(records), _newest([home, *records])) for home, records in places.items()]
    return sorted(found, key=lambda place: place.newest, reverse=True)


def read_run(place: Place) -> Run:
    """Read what a run left behind; of a run without a logger, the curves that its bundles hold.

    Args:
        place: Where it is.

    Returns:
        The run. Warns of what can't be read, and leaves it out.
    """
    incidents: list[Incident] = []
    bundles: dict[Path, Bundle | BundleError] = {}
    recorded = False
    for record in place.records:
        kept = {path: _read(path) for path in _bundles_in(record)}
        for each in kept.values():
            if isinstance(each, BundleError):
                warnings.warn(str(each), stacklevel=2)
        bundles |= kept
        if (record / _INCIDENTS).is_file():
            recorded = True
            incidents += read_incidents(record / _INCIDENTS)
        else:
            incidents += [bundle.incident for bundle in kept.values() if isinstance(bundle, Bundle)]
    scalars = read_scalars(place.directory)
    run = Run(place.directory, scalars, sorted(incidents, key=lambda incident: incident.step), recorded, bundles)
    return run if scalars.series else run._replace(scalars=Scalars(_curves_of(run.readable_bundles), None))


def _walk(directory: Path) -> tuple[list[Path], list[Path]]:
    """The directories of logs, and those of records."""
    logs, records = [], []
    for name, below, files in os.walk(directory):
        here = Path(name)
        below[:] = sorted(each for each in below if not each.startswith("."))
        if TABLE in files or any(EVENT_FILE in each for each in files):
            logs.append(here)
        if _MANIFEST in files:
            below.clear()
            above = here.parent.parent
            record = above if here.parent.name == _BUNDLES and above.is_relative_to(directory) else here
        elif _INCIDENTS in files:
            record = here
        else:
            continue
        if record not in records:
            records.append(record)
    return logs, records


def _newest(directories: Iterable[Path]) -> float:
    files = (each for directory in directories for each in directory.rglob("*") if each.is_file())
    return max((each.stat().st_mtime for each in files), default=0.0)


def _bundles_in(record: Path) -> list[Path]:
    manifests = [record / _MANIFEST, *sorted((record / _BUNDLES).glob(f"*/{_MANIFEST}"))]
    return [each.parent for each in manifests if each.is_file() and not each.parent.name.startswith(".")]


def _read(path: Path) -> Bundle | BundleError:
    try:
        return read_bundle(path, tensors=False)
    except BundleError as error:
        return error


def _curves_of(bundles: list[Bundle]) -> dict[str, Series]:
    points: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for row in (row for bundle in bundles for row in bundle.history):
        points["loss"][row.step] = row.loss
        points["grad_norm/total"][row.step] = row.grad_norm
        points["grad_norm_clipped/total"][row.step] = row.grad_norm_clipped
        for group, rate in enumerate(row.lr):
            points[f"lr/pg{group + 1}"][row.step] = rate
        for layer, norm in row.norms.items():
            points[f"grad_norm/{layer}"][row.step] = norm
    return {name: Series.of(each.items()) for name, each in points.items()}
