"""The page: what a run did, what happened to it, and what to change."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from stability_callbacks.diagnosis import KINDS, Bundle, BundleError, Incident
from stability_callbacks.report._advice import Observation, advise
from stability_callbacks.report._chart import Curve, Mark, chart
from stability_callbacks.report._heat_map import heat_map
from stability_callbacks.report._overview import largest, largest_gradient_norm, overview, span_of
from stability_callbacks.report._run import Run
from stability_callbacks.report._scalars import Series
from stability_callbacks.report._scale import number
from stability_callbacks.report._templates import Markup, render

__all__ = ["page"]

_MOST_ROWS = 2000
_MOST_CLOSE_UPS = 12


class _Entry(NamedTuple):
    """A run in the list of contents."""

    id: str
    name: str
    badges: list[tuple[str, int]]


class _Verdict(NamedTuple):
    text: str
    bad: bool


class _BundleCell(NamedTuple):
    """A link to a close-up and how to replay it, or a note that says why there is none."""

    note: str = ""
    name: str = ""
    anchor: str = ""
    command: str = ""


class _Row(NamedTuple):
    """An incident in the table."""

    id: str
    incident: Incident
    evidence: list[tuple[str, str]]
    no_place: str
    bundle: _BundleCell


class _CloseUp(NamedTuple):
    """The steps before an incident."""

    anchor: str
    name: str
    incident: Incident
    explanation: str
    command: str
    figures: list[Markup]


def page(runs: Sequence[Run], source: Path, left_out: int = 0) -> str:
    """Write the page about some runs.

    Args:
        runs: The runs, in the order in which they shall appear, at least one.
        source: The directory in which they were found.
        left_out: How many more there are.

    Returns:
        One HTML document that needs nothing besides itself.
    """
    several = len(runs) > 1
    contents = [
        _Entry(f"run{place}", _name(run, source), _badges(run)) for place, run in enumerate(runs) if several or left_out
    ]
    return render(
        "page.html",
        title=source.name or str(source),
        source=source,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        contents=contents,
        left_out=left_out,
        sections=[_section(run, source, f"run{place}", several) for place, run in enumerate(runs)],
        style=_style(),
        script=_script(),
    )


def _style() -> Markup:
    kinds = render("kinds.css", kinds=KINDS.values())
    return Markup("\n").join([kinds, _file("uplot", "uPlot.min.css"), _file("page.css")])


def _script() -> Markup:
    """The chart library under its license, and what puts it to use."""
    license_text = Markup("/*!\n{}\n*/").format(_file("uplot", "LICENSE"))
    return Markup("\n").join([license_text, _file("uplot", "uPlot.iife.min.js"), _file("curves.js")])


def _file(*path: str) -> Markup:
    return Markup(files(__package__).joinpath(*path).read_text(encoding="utf-8"))


def _section(run: Run, source: Path, name: str, several: bool) -> Markup:
    span = span_of(run)
    marks = [Mark(each.step, each.kind, f"{name}-i{row}") for row, each in enumerate(run.incidents)]
    readable = run.readable_bundles
    return render(
        "run.html",
        id=name,
        heading=_name(run, source) if several else "",
        verdict=_verdict(run),
        facts=_tiles(run, span),
        badges=_badges(run),
        figures=overview(run, span, marks),
        advice=advise([Observation(incident, run.cause_of(incident)) for incident in run.incidents]),
        rows=[_row(run, each, f"{name}-i{place}") for place, each in enumerate(run.incidents[:_MOST_ROWS])],
        more_rows=max(len(run.incidents) - _MOST_ROWS, 0),
        close_ups=[_close_up(bundle) for bundle in readable[:_MOST_CLOSE_UPS]],
        not_drawn=[bundle.path.name for bundle in readable[_MOST_CLOSE_UPS:]],
        damaged=[str(each) for each in run.bundles.values() if isinstance(each, BundleError)],
    )


def _verdict(run: Run) -> _Verdict:
    incidents = run.incidents
    if incidents:
        steps = len({each.step for each in incidents})
        first, last = incidents[0].step, incidents[-1].step
        when = f"at step {first:,}" if first == last else f"at {steps:,} steps from {first:,} to {last:,}"
        return _Verdict(f"{len(incidents):,} incident{'s' * (len(incidents) > 1)}, {when}.", bad=True)
    skipped = max((largest(series) for name, series in run.scalars.series.items() if _is_skip_count(name)), default=0.0)
    if skipped > 0:
        text = f"{number(skipped)} steps were skipped, but no record tells more of them: add FlightRecorder to see why."
        return _Verdict(text, bad=True)
    told = "" if run.recorded else " FlightRecorder writes its record when the first one happens."
    return _Verdict(f"No incidents were recorded.{told}", bad=False)


def _is_skip_count(name: str) -> bool:
    return name == "stability/skipped_steps" or name.startswith("stability/skipped_steps/")


def _tiles(run: Run, span: tuple[int, int]) -> list[tuple[str, str]]:
    facts = [("last step", f"{span[1]:,}")]
    if run.scalars.seconds:
        facts.append(("duration", str(timedelta(seconds=round(run.scalars.seconds)))))
    facts.append(("incidents", f"{len(run.incidents):,}"))
    if not math.isnan(norm := largest_gradient_norm(run)):
        facts.append(("largest gradient norm", number(norm)))
    return facts


def _badges(run: Run) -> list[tuple[str, int]]:
    return Counter(each.kind for each in run.incidents).most_common()


# The cause: in a column of its own, and above the close-up. The votes: the kind is the one that tells most.
_TOLD_ELSEWHERE = ("cause", "phase", "votes")


def _row(run: Run, incident: Incident, name: str) -> _Row:
    evidence = [
        (key, number(value) if isinstance(value, float | int) else str(value))
        for key, value in incident.evidence.items()
        if key not in _TOLD_ELSEWHERE and value != ""
    ]
    has_place = any(each is not None for each in (incident.operation, incident.module, incident.source))
    no_place = "" if has_place else str(incident.evidence.get("cause", ""))
    return _Row(name, incident, evidence, no_place, _bundle_cell(run, incident))


def _bundle_cell(run: Run, incident: Incident) -> _BundleCell:
    if incident.bundle is None:
        return _BundleCell()
    path = run.bundle_of(incident)
    if path is None:
        return _BundleCell(note=f"{Path(incident.bundle).name} was removed")
    bundle = run.bundles[path]
    if isinstance(bundle, BundleError):
        return _BundleCell(note=str(bundle))
    return _BundleCell(name=path.name, anchor=_anchor(bundle), command=_replay_command(bundle))


def _close_up(bundle: Bundle) -> _CloseUp:
    return _CloseUp(
        _anchor(bundle),
        bundle.path.name,
        bundle.incident,
        "" if bundle.cause is None else bundle.cause.explanation,
        _replay_command(bundle),
        _figures_of(bundle),
    )


def _figures_of(bundle: Bundle) -> list[Markup]:
    rows = bundle.history
    if len(rows) < 2:
        return []
    span = rows[0].step, max(rows[-1].step, rows[0].step + 1)
    marks = [Mark(row.step, kind, _anchor(bundle)) for row in rows for kind in row.verdict]

    def series(name: str) -> Series:
        return Series.of((row.step, getattr(row, name)) for row in rows)

    norms = [Curve("raw", series("grad_norm")), Curve("clipped", series("grad_norm_clipped"))]
    figures = [
        chart("Loss", [Curve("loss", series("loss"))], span, marks),
        chart("Gradient norm", norms, span, marks, logarithmic=True),
    ]
    names = dict.fromkeys(name for row in rows for name in row.norms)
    layers = {name: Series.of((row.step, row.norms[name]) for row in rows if name in row.norms) for name in names}
    return [*figures, heat_map(layers, span, marks)] if layers else figures


def _replay_command(bundle: Bundle) -> str:
    """What replays a bundle; nothing if it holds too little for that."""
    if not all((bundle.path / name).is_file() for name in ("batch.pt", "weights.pt")):
        return ""
    model = str(bundle.meta.get("model", "package.module:Class"))
    return shlex.join(["python", "-m", "stability_callbacks", "replay", str(bundle.path), "--model", model])


def _anchor(bundle: Bundle) -> str:
    return "bundle-" + re.sub(r"[^\w-]", "-", str(bundle.path))


def _name(run: Run, source: Path) -> str:
    return str(run.directory.relative_to(source)) if run.directory != source else source.name or str(source)
