"""The page about a run: complete, well-formed, self-contained, and escaped."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from stability_callbacks.diagnosis import KINDS, Cause, IncidentLog, Kind, register_kind, write_bundle
from stability_callbacks.report import write_report
from tests.report.training import (
    BAD_STEP,
    LAYERS,
    ROLLBACK_STEP,
    SPIKE_STEP,
    STEPS,
    curves,
    history,
    incident,
    incidents,
    write_record,
    write_run,
)

EVERY = 30  # steps from log to log
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and keeps what is on the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.code: defaultdict[str, list[str]] = defaultdict(list)
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.code[self.open[-1]].append(data)
        elif self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def charts(self) -> list[dict[str, Any]]:
        """What the page's script draws."""
        types = [attributes.get("type") for tag, attributes in self.elements if tag == "script"]
        return [json.loads(text) for kind, text in zip(types, self.code["script"], strict=True) if kind is not None]

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]


def page_of(directory: Path) -> Page:
    output = write_report(directory, directory.parent / "page.html")
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("logs") / "version_0"
    write_run(directory, EVERY)
    return directory


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return page_of(run)


def test_the_page_needs_nothing_besides_itself(page: Page) -> None:
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base", "form"}
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert all(attributes in ({}, {"type": "application/json"}) for attributes in scripts)
    assert scripts.count({}) == 1
    addresses = [a[name] for _, a in page.elements for name in ("src", "href", "action", "srcset") if name in a]
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert "url(" not in "".join(str(element) for element in page.elements)
    [style] = page.code["style"]
    assert not re.search(r"url\(|@import|https?:|//", style)


def test_the_page_names_no_address_in_the_network(page: Page, run: Path) -> None:
    text = write_report(run, run.parent / "page.html").read_text(encoding="utf-8")
    banner = "/*! https://github.com/leeoniya/uPlot (v1.6.32) */"  # a comment: whose the library is
    assert text.count(banner) == 1
    assert not re.search(r"(?:https?|wss?|ftp):|[\"'(=]\s*//", text.replace(banner, ""))
    assert not re.search(r"\b(?:fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts)\b", text)
    assert "Permission is hereby granted, free of charge" in text  # the library's license goes where its copy goes


def test_a_page_of_a_long_run_is_under_one_megabyte(tmp_path: Path) -> None:
    """Every step of 20,000 is logged, so that no curve is drawn with all its points."""
    run = tmp_path / "run"
    values = curves(20_000)
    write_record(run / "flight_record")
    rows = zip(*(each.tolist() for each in values.values()), strict=True)
    lines = [f"{step},{','.join(map(repr, row))}" for step, row in enumerate(rows)]
    (run / "metrics.csv").write_text("\n".join([f"step,{','.join(values)}", *lines]))
    output = write_report(run, tmp_path / "page.html")
    assert 300_000 < output.stat().st_size < 1_000_000


def test_the_data_for_zooming_holds_what_was_logged(page: Page) -> None:
    charts = page.charts
    assert len(charts) == len(page.of_class("chart")) == 3 + 2 * 2
    loss, at_incidents = charts[0]["curves"]
    assert (loss["name"], at_incidents["name"]) == ("train_loss", "at incidents")
    assert loss["steps"] == list(range(0, STEPS, EVERY))
    assert [step for step, value in zip(loss["steps"], loss["values"], strict=True) if value == "NaN"] == [
        math.ceil(BAD_STEP / EVERY) * EVERY
    ]
    assert max(value for value in loss["values"] if value != "NaN") == pytest.approx(9.7)
    assert charts[1]["logarithmic"]
    assert not charts[2]["logarithmic"]
    assert {mark["color"] for mark in charts[0]["marks"]} == {f"--kind-{each.kind}" for each in incidents()}


def colors(page: Page) -> tuple[dict[str, str], dict[str, str]]:
    """The custom properties of the page on a light and on a dark ground."""
    [style] = page.code["style"]
    light, dark = {}, {}
    for block in re.findall(r"(@media \(prefers-color-scheme: dark\) \{\s*)?:root \{(.*?)\}", style, re.DOTALL):
        (dark if block[0] else light).update(re.findall(r"(--[\w-]+): (#\w+);", block[1]))
    return light, dark


def test_every_color_that_is_used_is_defined_for_light_and_dark(page: Page) -> None:
    light, dark = colors(page)
    assert light.keys() == dark.keys()
    used = {each for chart in page.charts for part in ("curves", "marks") for each in (e["color"] for e in chart[part])}
    code = "".join(page.code["style"] + page.code["script"])
    used |= set(re.findall(r"var\((--[\w-]+)\)", code)) - {"--kind", "--curve", "--height", "--row"}
    assert {"--kind-nonfinite", "--c0", "--text"} <= used
    assert used <= light.keys()


def test_a_kind_of_the_users_own_is_shown_in_its_color_with_its_advice(tmp_path: Path, own_kind: Kind) -> None:
    log = IncidentLog(tmp_path / "run" / "incidents.jsonl")
    log.append(incident(3, "mine"))
    log.append(incident(4, "nobodys"))
    (tmp_path / "run" / "metrics.csv").write_text("step,train_loss\n0,1\n9,2\n")
    page = page_of(tmp_path / "run")
    light, dark = colors(page)
    assert (light["--kind-mine"], dark["--kind-mine"]) == (own_kind.color, own_kind.dark_color)
    assert ".kind-mine { --kind: var(--kind-mine); }" in page.code["style"][0]
    shown = {name: page.of_class(name) for name in ("kind-mine", "other-kind")}
    # In the timeline, the header, the table, the chart and the advice.
    assert [len(each) for each in shown.values()] == [5, 5]
    assert [mark["color"] for mark in page.charts[0]["marks"]] == ["--kind-mine", "--other-kind"]
    for words in (own_kind.title, own_kind.meaning, "Give the loader more workers: num_workers=8"):
        assert words in page.words
    assert "A detector of your own spoke up" in page.words


def test_a_hostile_kind_of_the_users_own_is_escaped(tmp_path: Path, own_kind: Kind) -> None:
    register_kind(Kind(own_kind.name, title=HOSTILE, meaning=HOSTILE, remedies=(HOSTILE,)))
    IncidentLog(tmp_path / "run" / "incidents.jsonl").append(incident(3, "mine"))
    page = page_of(tmp_path / "run")
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert page.words.count('<script>alert("x")</script>&amp;') == 3


def test_links_lead_somewhere(page: Page) -> None:
    places = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    targets = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"}
    assert len(places) == len(set(places))
    assert targets
    assert targets <= set(places)


def test_every_incident_is_in_the_table(page: Page) -> None:
    rows = [attributes["id"] for tag, attributes in page.elements if tag == "tr" and "id" in attributes]
    assert len(rows) == len(incidents())
    for each in incidents():
        assert f"{each.step:,}" in page.words
        assert each.kind in page.words
    assert "gate = x.log()" in page.words
    assert "restored the state of step 5100" in page.words


def test_the_header_counts(page: Page) -> None:
    assert f"{len(incidents())} incidents, at 13 steps from 0 to {ROLLBACK_STEP:,}." in page.words
    assert "spike 6" in page.words
    assert f"last step {STEPS - EVERY:,}" in page.words
    assert "duration 0:24:52" in page.words


def test_advice_is_given_for_every_kind(page: Page) -> None:
    for words in (
        "stability_callbacks.numerics.safe_log",
        "Clip harder",
        "Clean the data",
        "bf16-mixed",
        "Training went back to an earlier state",
        "Checkpoints were not written",
    ):
        assert words in page.words


def test_curves_are_drawn_with_their_incidents(page: Page) -> None:
    assert len(page.of_class("curve")) == 6 + 2 * 3  # of the run, and of two close-ups
    assert {f"kind-{kind}" for kind in KINDS if kind in {each.kind for each in incidents()}} == {
        kind for attributes in page.of_class("incident") for kind in attributes["class"].split() if kind != "incident"
    }


def place_of(step: int) -> float:
    """Where in its chart the log of a step stands."""
    return 1000 * (math.ceil(step / EVERY) * EVERY) / (STEPS - EVERY)


def test_the_spike_reaches_the_top_of_its_curve_and_the_nan_is_a_mark(page: Page) -> None:
    loss = page.of_class("curve")[0]["d"]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", loss)]
    assert min(heights) == pytest.approx(1000 * 0.06 / 1.12, abs=15)  # the margin above the largest value, 9.7
    peak = next(float(x) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", loss) if float(y) == min(heights))
    assert peak == pytest.approx(place_of(SPIKE_STEP), abs=0.1)
    broken = [float(attributes["x1"]) for attributes in page.of_class("broken")]
    assert pytest.approx(place_of(BAD_STEP), abs=0.1) in broken  # in the log
    assert pytest.approx(1000 * BAD_STEP / (STEPS - EVERY), abs=0.1) in broken  # in the record
    assert "train_loss: 1 not finite" in page.words


def test_the_heat_map_names_all_layers(page: Page) -> None:
    for name in LAYERS:
        assert name in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == 3


def test_bundles_are_shown_with_the_command_that_replays_them(page: Page, run: Path) -> None:
    bundle = run / "flight_record" / "bundles" / f"step={BAD_STEP}-nonfinite"
    command = f"python -m stability_callbacks replay {bundle} --model package.model:Transformer"
    assert page.words.count(command) == 2  # in the table and above its close-up
    assert "step=1-gone was removed" in page.words


HOSTILE = '<script>alert("x")</script>&amp;\'`'


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    (run / "a<i>b").mkdir(parents=True)
    (run / "a<i>b" / "metrics.csv").write_text('step,train_loss,grad_norm/total,"grad_norm/<u>x"\n0,1,2,3\n1,1,2,3\n')
    log = IncidentLog(run / "a<i>b" / "flight_record" / "incidents.jsonl")
    details = dict.fromkeys(("action", "module", "operation", "source", "optimizer"), HOSTILE)
    log.append(incident(1, HOSTILE, evidence={HOSTILE: HOSTILE}, bundle=HOSTILE.replace("/", ""), **details))
    log.append(incident(1, "nonfinite", **details))
    page = page_of(run)
    assert not {tag for tag, _ in page.elements} & {"b", "i", "u"}
    data = [{"type": "application/json"}] * len(page.charts)
    assert [attributes for tag, attributes in page.elements if tag == "script"] == [*data, {}]
    assert page.words.count(HOSTILE) >= 6
    assert "<u>x" in page.text


def test_what_a_bundle_holds_is_escaped(tmp_path: Path) -> None:
    row = history(2, "spike", 3)[0]
    rows = [row._replace(step=step, norms={HOSTILE: 1.0}, verdict=(HOSTILE,) * step) for step in range(2)]
    write_bundle(
        tmp_path / "run" / "bundles",
        incident=incident(1, "spike", action=HOSTILE, evidence={"cause": HOSTILE}),
        history=rows,
        batches=[torch.ones(1)],
        weights={"w": torch.ones(1)},
        cause=Cause(True, "forward", HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        meta={"model": HOSTILE},
    )
    page = page_of(tmp_path / "run")
    assert page.charts
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert len(scripts) == len(page.charts) + 1
    assert page.words.count("<script>alert") >= 5
    assert HOSTILE in {mark["text"].partition(", step")[0] for chart in page.charts for mark in chart["marks"]}


def test_text_that_no_encoding_has_spoils_no_page(tmp_path: Path) -> None:
    """JSON may hold half of a surrogate pair."""
    log = IncidentLog(tmp_path / "run" / "incidents.jsonl")
    log.append(incident(3, "\ud800", evidence={"\udfff": "\ud800"}, module="\x00\ud800"))
    assert "1 incident, at step 3." in page_of(tmp_path / "run").words


def test_curves_and_layers_with_hostile_names_are_escaped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    name = HOSTILE.replace('"', "")
    (run / "metrics.csv").write_text(f'step,"loss{name}","grad_norm/{name}"\n0,1,2\n1,nan,3\n')
    page = page_of(run)
    assert [chart["curves"][0]["name"] for chart in page.charts] == [f"loss{name}"]
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert f"loss{name}" in page.text


def test_a_run_without_incidents_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("epoch,step,train_loss\n0,0,2.5\n0,1,2.25\n")
    page = page_of(run)
    assert "No incidents were recorded." in page.words
    assert "What to change" not in page.words
    assert len(page.of_class("curve")) == 1


def test_skips_without_a_record_are_told_of(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step,stability/skipped_steps\n0,0\n50,3\n")
    assert "3 steps were skipped, but no record tells more of them" in page_of(run).words


def test_several_runs_have_a_section_each_the_newest_first(tmp_path: Path) -> None:
    for version in range(12):
        run = tmp_path / "logs" / f"version_{version}"
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text(f"step,train_loss\n0,{version}\n1,2\n")
        os.utime(run / "metrics.csv", (version, version))
    page = page_of(tmp_path / "logs")
    headings = re.findall(r"version_\d+", page.words)
    expected = [f"version_{version}" for version in range(11, 1, -1)]
    assert headings == expected * 2  # in the list of contents, and above the sections
    assert "2 older runs are left out" in page.words


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(run, tmp_path / "run")


def test_a_damaged_bundle_is_told_of_and_the_rest_is_shown(own_run: Path) -> None:
    bundle = own_run / "flight_record" / "bundles" / f"step={BAD_STEP}-nonfinite"
    (bundle / "cause.json").write_text("{")
    with pytest.warns(UserWarning, match=r"can't be read because of cause\.json"):
        page = page_of(own_run)
    assert "can't be read because of cause.json" in page.words
    assert f"step={SPIKE_STEP}-spike" in page.words


def test_a_run_without_logs_shows_what_its_bundles_hold(own_run: Path) -> None:
    for file in own_run.glob("events*"):
        file.unlink()
    page = page_of(own_run)
    assert len(page.of_class("curve")) == 6 + 2 * 3
    assert f"last step {ROLLBACK_STEP:,}" in page.words


def test_incidents_of_a_damaged_line_are_left_out_with_a_warning(tmp_path: Path) -> None:
    log = tmp_path / "run" / "flight_record" / "incidents.jsonl"
    IncidentLog(log).append(incident(3, "spike"))
    with log.open("a") as file:
        file.write('{"step": 4, "ep')
    with pytest.warns(UserWarning, match="line 2 is left out"):
        page = page_of(tmp_path / "run")
    assert "1 incident, at step 3." in page.words


@pytest.mark.parametrize("there", [True, False])
def test_nothing_to_report_is_an_error(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="nothing of a run was found" if there else "no directory"):
        write_report(tmp_path / "run", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_what_loggers_did_not_see_of_an_incident_is_drawn_from_the_record(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text(
        "step,train_loss,grad_norm_clipped/total,grad_norm/total\n0,2.0,1.0,5\n9,1.0,1.0,5\n"
    )
    log = IncidentLog(run / "flight_record" / "incidents.jsonl")
    log.append(incident(4, "spike", evidence={"loss": 800.0, "grad_norm": 4000.0}))
    log.append(incident(6, "nonfinite", evidence={"loss": math.nan, "grad_norm": math.nan}))
    page = page_of(run)
    assert "largest gradient norm 4,000" in page.words
    assert page.words.count("at incidents last NaN · max") == 2
    assert len(page.of_class("dots")) == 2 * 2  # in the legend and in the chart
    assert page.words.index("grad_norm/total") < page.words.index("grad_norm_clipped/total")


def test_a_cause_that_names_no_place_is_told(tmp_path: Path) -> None:
    log = IncidentLog(tmp_path / "run" / "incidents.jsonl")
    log.append(incident(4, "nonfinite", evidence={"cause": "not looked for: the model is sharded"}))
    assert "not looked for: the model is sharded" in page_of(tmp_path / "run").words
