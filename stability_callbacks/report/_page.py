"""The page: what a run did, what happened to it, and what to change."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from importlib.resources import files
from pathlib import Path

from stability_callbacks.diagnosis import Bundle, BundleError, Incident
from stability_callbacks.report._advice import Advice, Observation, advise
from stability_callbacks.report._chart import Curve, Mark, chart, kind_class
from stability_callbacks.report._heat_map import heat_map
from stability_callbacks.report._html import Html, join, prose, tag
from stability_callbacks.report._overview import largest, largest_gradient_norm, overview, span_of
from stability_callbacks.report._run import Run
from stability_callbacks.report._scalars import Series
from stability_callbacks.report._scale import number

__all__ = ["page"]

_MOST_ROWS = 2000
_MOST_CLOSE_UPS = 12


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
    sections = [_section(run, source, place, several) for place, run in enumerate(runs)]
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    header = tag(
        "header",
        tag("h1", "Training report"),
        tag("p", tag("span", str(source), class_="path"), f" · made {now} by stability-callbacks", class_="note"),
        _contents(runs, source, left_out) if several or left_out else "",
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"Training report: {source.name or source}"),
        tag("style", Html(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", header, *sections)), lang="en") + "\n"


def _contents(runs: Sequence[Run], source: Path, left_out: int) -> Html:
    entries = [
        tag(
            "li",
            tag("a", _name(run, source), href=f"#run{place}"),
            " ",
            *_badges(Counter(i.kind for i in run.incidents)),
        )
        for place, run in enumerate(runs)
    ]
    more = f"{left_out} older runs are left out: give their own directory to see them." if left_out else ""
    return tag("nav", tag("p", "Runs, the newest first:"), tag("ul", *entries), tag("p", more, class_="note"))


def _section(run: Run, source: Path, place: int, several: bool) -> Html:
    prefix = f"run{place}"
    span = span_of(run)
    marks = [Mark(each.step, each.kind, f"{prefix}-i{row}") for row, each in enumerate(run.incidents)]
    parts = [
        tag("h2", _name(run, source)) if several else "",
        _verdict(run),
        _tiles(run, span),
        _titled("The run", overview(run, span, marks)),
        _titled("What to change", _advice(run)),
        _titled("Incidents", _table(run, prefix)),
        _titled("Close-ups", _close_ups(run)),
    ]
    return tag("section", *parts, id=prefix)


def _titled(title: str, content: Sequence[Html]) -> Html:
    return join([tag("h3", title), *content]) if content else Html("")


# ---- what happened, in short


def _verdict(run: Run) -> Html:
    incidents = run.incidents
    if incidents:
        steps = len({each.step for each in incidents})
        first, last = incidents[0].step, incidents[-1].step
        when = f"at step {first:,}" if first == last else f"at {steps:,} steps from {first:,} to {last:,}"
        return tag("p", f"{len(incidents):,} incident{'s' * (len(incidents) > 1)}, {when}.", class_="verdict bad")
    skipped = max((largest(series) for name, series in run.scalars.series.items() if _is_skip_count(name)), default=0.0)
    if skipped > 0:
        text = f"{number(skipped)} steps were skipped, but no record tells more of them: add FlightRecorder to see why."
        return tag("p", text, class_="verdict bad")
    told = "" if run.recorded else " FlightRecorder writes its record when the first one happens."
    return tag("p", f"No incidents were recorded.{told}", class_="verdict good")


def _is_skip_count(name: str) -> bool:
    return name == "stability/skipped_steps" or name.startswith("stability/skipped_steps/")


def _tiles(run: Run, span: tuple[int, int]) -> Html:
    kinds = Counter(each.kind for each in run.incidents)
    facts = [("last step", f"{span[1]:,}")]
    if run.scalars.seconds:
        facts.append(("duration", str(timedelta(seconds=round(run.scalars.seconds)))))
    facts.append(("incidents", f"{len(run.incidents):,}"))
    if not math.isnan(norm := largest_gradient_norm(run)):
        facts.append(("largest gradient norm", number(norm)))
    tiles = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
    return join([tag("dl", *tiles, class_="tiles"), tag("p", *_badges(kinds), class_="badges") if kinds else Html("")])


def _badges(kinds: Mapping[str, int]) -> list[Html]:
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    return [
        tag("span", tag("span", class_="dot"), f"{kind} {count:,}", class_=f"badge {kind_class(kind)}")
        for kind, count in ordered
    ]


# ---- the advice


def _advice(run: Run) -> list[Html]:
    observations = [Observation(incident, run.cause_of(incident)) for incident in run.incidents]
    return [tag("div", *(_card(each) for each in advise(observations)), class_="cards")] if observations else []


def _card(advice: Advice) -> Html:
    return tag(
        "article",
        tag("h4", tag("span", class_="dot"), prose(advice.title)),
        tag("p", f"{advice.kind}, {advice.times:,} time{'s' * (advice.times > 1)}", class_="note"),
        tag("p", prose(advice.meaning)),
        tag("ul", *(tag("li", prose(each)) for each in advice.changes)),
        class_=f"card {kind_class(advice.kind)}",
    )


# ---- the incidents

_COLUMNS = ("step", "epoch", "batch", "kind", "evidence", "action", "where it began", "bundle")


def _table(run: Run, prefix: str) -> list[Html]:
    incidents = run.incidents
    if not incidents:
        return []
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in _COLUMNS)))
    rows = [_row(run, each, f"{prefix}-i{place}") for place, each in enumerate(incidents[:_MOST_ROWS])]
    more = len(incidents) - len(rows)
    note = tag("p", f"{more:,} later ones are left out; the record on the disk holds them.", class_="note")
    return [tag("div", tag("table", head, tag("tbody", *rows)), class_="scroll"), *([note] if more else [])]


def _row(run: Run, incident: Incident, name: str) -> Html:
    cells = (
        f"{incident.step:,}",
        str(incident.epoch),
        str(incident.batch_idx) + (f" on rank {incident.rank}" if incident.rank else ""),
        tag("span", tag("span", class_="dot"), incident.kind, class_=f"badge {kind_class(incident.kind)}"),
        join(_evidence(incident)),
        incident.action + (f" ({incident.optimizer})" if incident.optimizer else ""),
        join(_origin(incident)),
        _bundle_cell(run, incident),
    )
    return tag(
        "tr", *(tag("td", cell, data_label=column) for column, cell in zip(_COLUMNS, cells, strict=True)), id=name
    )


# The cause: in a column of its own, and above the close-up. The votes: the kind is the one that tells most.
_TOLD_ELSEWHERE = ("cause", "phase", "votes")


def _evidence(incident: Incident) -> list[Html]:
    facts = {name: value for name, value in incident.evidence.items() if name not in _TOLD_ELSEWHERE and value != ""}
    return [
        tag(
            "div",
            tag("span", f"{name} ", class_="note"),
            number(value) if isinstance(value, float | int) else str(value),
        )
        for name, value in facts.items()
    ]


def _origin(incident: Incident) -> list[Html]:
    parts = []
    if incident.operation is not None:
        parts.append(tag("div", tag("code", incident.operation)))
    if incident.module is not None:
        parts.append(tag("div", tag("span", "in ", class_="note"), tag("code", incident.module or "the model itself")))
    if incident.source is not None:
        parts.append(tag("div", incident.source, class_="source"))
    if not parts and (cause := incident.evidence.get("cause")):
        parts.append(tag("div", str(cause), class_="note"))
    return parts


def _bundle_cell(run: Run, incident: Incident) -> Html:
    if incident.bundle is None:
        return Html("")
    path = run.bundle_of(incident)
    if path is None:
        return tag("span", f"{Path(incident.bundle).name} was removed", class_="note")
    bundle = run.bundles[path]
    if isinstance(bundle, BundleError):
        return tag("span", str(bundle), class_="note")
    link = tag("a", path.name, href=f"#{_anchor(bundle)}")
    if not _can_be_replayed(bundle):
        return link
    return tag("span", link, tag("details", tag("summary", "replay"), tag("pre", _replay_command(bundle))))


# ---- the steps before an incident


def _close_ups(run: Run) -> list[Html]:
    readable = run.readable_bundles
    parts = [_close_up(bundle, opened=not place) for place, bundle in enumerate(readable[:_MOST_CLOSE_UPS])]
    if len(readable) > len(parts):
        names = ", ".join(bundle.path.name for bundle in readable[len(parts) :])
        parts.append(tag("p", f"Not drawn: {names}.", class_="note"))
    damaged = [str(each) for each in run.bundles.values() if isinstance(each, BundleError)]
    return parts + [tag("p", text, class_="verdict bad") for text in damaged]


def _close_up(bundle: Bundle, opened: bool) -> Html:
    incident, rows = bundle.incident, bundle.history
    summary = tag(
        "summary",
        tag("span", class_="dot"),
        tag("strong", f"Step {incident.step:,}, {incident.kind}"),
        tag("span", f" {bundle.path.name}", class_="note"),
    )
    parts = [tag("p", bundle.cause.explanation)] if bundle.cause is not None else []
    if _can_be_replayed(bundle):
        parts.append(tag("pre", _replay_command(bundle)))
    if len(rows) > 1:
        span = rows[0].step, max(rows[-1].step, rows[0].step + 1)
        marks = [Mark(row.step, kind, _anchor(bundle)) for row in rows for kind in row.verdict]

        def series(name: str) -> Series:
            return Series.of((row.step, getattr(row, name)) for row in rows)

        norms = [Curve("raw", series("grad_norm")), Curve("clipped", series("grad_norm_clipped"))]
        parts += [
            chart("Loss", [Curve("loss", series("loss"))], span, marks),
            chart("Gradient norm", norms, span, marks, logarithmic=True),
        ]
        names = dict.fromkeys(name for row in rows for name in row.norms)
        layers = {name: Series.of((row.step, row.norms[name]) for row in rows if name in row.norms) for name in names}
        if layers:
            parts.append(heat_map(layers, span, marks))
    attributes = {"open": ""} if opened else {}
    return tag("details", summary, *parts, id=_anchor(bundle), class_=kind_class(incident.kind), **attributes)


def _can_be_replayed(bundle: Bundle) -> bool:
    return all((bundle.path / name).is_file() for name in ("batch.pt", "weights.pt"))


def _replay_command(bundle: Bundle) -> str:
    model = str(bundle.meta.get("model", "package.module:Class"))
    return shlex.join(["python", "-m", "stability_callbacks", "replay", str(bundle.path), "--model", model])


def _anchor(bundle: Bundle) -> str:
    return "bundle-" + re.sub(r"[^\w-]", "-", str(bundle.path))


def _name(run: Run, source: Path) -> str:
    return str(run.directory.relative_to(source)) if run.directory != source else source.name or str(source)
