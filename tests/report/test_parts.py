"""The parts of the page: scales, shortened curves, pictures, curves from files, and runs on the disk."""

from __future__ import annotations

import base64
import math
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from stability_callbacks.diagnosis import IncidentLog
from stability_callbacks.report._chart import Curve, Mark, chart
from stability_callbacks.report._envelope import bins_of, envelope
from stability_callbacks.report._heat_map import heat_map, picture_address
from stability_callbacks.report._run import find_places
from stability_callbacks.report._scalars import Series, read_scalars
from stability_callbacks.report._scale import Scale, number
from stability_callbacks.report._templates import Markup, prose, render
from tests.report.training import incident

values = st.floats(width=32)


@given(st.lists(st.tuples(st.integers(0, 5000), values), min_size=1, max_size=400), st.integers(1, 40))
def test_an_envelope_keeps_extremes_ends_and_breaks_of_every_bin(points: list[tuple[int, float]], bins: int) -> None:
    series = Series.of(points)
    short = envelope(series, (0, 5000), bins)
    assert len(short.steps) <= max(5 * bins, 1)
    assert bool(np.isfinite(series.values).all()) == bool(np.isfinite(short.values).all())
    before, after = bins_of(series, (0, 5000), bins), bins_of(short, (0, 5000), bins)
    assert before.keys() == after.keys()
    for place, part in before.items():
        assert part.least == after[place].least or math.isnan(part.least)
        assert part.most == after[place].most or math.isnan(part.most)
        assert bool(part.broken) == bool(after[place].broken)
    kept = list(zip(short.steps.tolist(), map(repr, short.values.tolist()), strict=True))
    assert set(kept) <= set(zip(series.steps.tolist(), map(repr, series.values.tolist()), strict=True))


def test_bins_count_what_is_not_finite() -> None:
    series = Series.of(enumerate([1.0, math.nan, 3.0, math.inf, -math.inf, 2.0]))
    parts = bins_of(series, (0, 5), 3)
    assert [(part.first, part.last, part.least, part.most, part.broken) for part in parts.values()][::2] == [
        (0, 1, 1.0, 1.0, 1),
        (4, 5, 2.0, 2.0, 1),
    ]
    assert parts[1].most == 3.0


@given(st.lists(values, min_size=1, max_size=30), st.sampled_from([None, True, False]))
def test_values_lie_on_a_fitting_scale_in_their_order(numbers: list[float], logarithmic: bool | None) -> None:
    array = np.array(numbers, np.float64)
    scale = Scale.fitting(array, logarithmic)
    finite = np.sort(array[np.isfinite(array)])
    places = scale.place(finite)
    assert ((places >= 0) & (places <= 1)).all()
    assert (np.diff(places) >= 0).all()
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(0 <= place <= 1 for place, _ in ticks)


def test_a_logarithmic_scale_places_by_ratio() -> None:
    scale = Scale(1.0, 1000.0, logarithmic=True)
    np.testing.assert_allclose(scale.place(np.array([1.0, 10.0, 1000.0, 0.0, 1e9])), [0, 1 / 3, 1, 0, 1])
    assert [text for _, text in scale.ticks()] == ["1", "10", "100", "1,000"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-9, "1e-9"), (123456.7, "123,457"), (3.4e38, "3.4e38"), (-0.5, "-0.5"), (-math.inf, "-inf")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("colors", [3, 16, 256])
def test_a_picture_holds_the_pixels_in_the_colors_of_the_palette(colors: int) -> None:
    random = np.random.default_rng(0)
    palette = random.integers(0, 256, (colors, 4), np.uint8)
    palette[:2, 3] = 0, 255
    pixels = random.integers(0, colors, (7, 5)).astype(np.uint8)
    kind, _, content = picture_address(pixels, palette).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(BytesIO(base64.b64decode(content))) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture.convert("RGBA")), palette[pixels])


def test_backticks_mark_code_and_what_they_hold_is_escaped() -> None:
    assert isinstance(prose("a `<b>` c"), Markup)
    assert prose("a `<b>` <c>") == "a <code>&lt;b&gt;</code> &lt;c&gt;"
    assert prose("`") == "`"


def test_templates_escape_all_but_what_templates_made() -> None:
    row = {"kind": "<b>", "times": "<i>", "links": [{"target": '"', "text": "<u>", "place": "'"}]}
    markup = render("timeline.html", rows=[row])
    assert not re.search(r"<[biu]>", markup)
    assert 'href="#&#34;" title="&lt;u&gt;"' in markup


def test_a_template_that_misses_a_value_says_so() -> None:
    with pytest.raises(UndefinedError, match="rows"):
        render("timeline.html")


def test_a_lone_point_between_breaks_is_drawn_as_a_dot() -> None:
    series = Series.of(enumerate([1.0, math.nan, 2.0, math.inf, 3.0]))
    figure = chart("Loss", [Curve("loss", series)], (0, 4), [Mark(1, "nonfinite", "x")])
    assert figure.count("h0") == 3
    assert "L" not in figure.partition('class="curve c0" d="')[2].partition('"')[0]
    assert figure.count('class="broken"') == 2
    assert "nonfinite at step 1" in figure


def test_the_heat_map_tells_nothing_zero_and_not_finite_apart() -> None:
    from stability_callbacks.report._heat_map import _pixels

    layers = {
        "a": Series.of([(0, 1e-3), (1, 1.0), (2, math.nan), (3, 0.0)]),
        "late": Series.of([(2, 1e-3), (3, math.inf)]),
    }
    pixels, least, most = _pixels(layers, (0, 3))
    assert pixels.tolist() == [[3, 255, 2, 1], [0, 0, 3, 2]]
    assert (least, most) == (1e-3, 1.0)
    assert "2 not finite" not in heat_map(layers, (0, 3))
    assert "a: 0 to 1, 1 not finite, first at step 2" in heat_map(layers, (0, 3))


def test_steps_logged_at_a_distance_leave_no_stripes() -> None:
    from stability_callbacks.report._heat_map import _pixels

    series = Series.of((step, 1.0 + step) for step in [*range(0, 1000, 50), 7, 13])
    pixels, *_ = _pixels({"a": series}, (0, 999))
    assert (pixels > 2).all()


def test_scalars_come_from_event_files_with_their_duration(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in ((0, 1.0), (5, math.nan), (9, math.inf)):
            writer.add_scalar("train_loss", value, step, walltime=100.0 + 2 * step)
            writer.add_histogram("gradients/x", np.ones(3), step)
    scalars = read_scalars(tmp_path)
    series = scalars.series["train_loss"]
    assert series.steps.tolist() == [0, 5, 9]
    assert list(map(str, series.values.tolist())) == ["1.0", "nan", "inf"]
    assert scalars.seconds == 18.0


def test_all_event_files_of_a_resumed_run_are_read(tmp_path: Path) -> None:
    for part in range(2):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{part}") as writer:
            writer.add_scalar("train_loss", float(part), part)
    assert read_scalars(tmp_path).series["train_loss"].values.tolist() == [0.0, 1.0]


def test_scalars_come_from_a_table(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss,val_loss\n0,9,nan,\n0,4,0.5,\n0,9,,inf\n0,12,0.2")
    series = read_scalars(tmp_path).series
    assert series["train_loss"].steps.tolist() == [4, 9, 12]
    assert str(series["train_loss"].values.tolist()) == "[0.5, nan, 0.2]"
    assert series["val_loss"].values.tolist() == [math.inf]
    assert set(series) == {"train_loss", "val_loss"}


def test_a_cell_that_is_no_number_is_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train_loss\n0,1\n1,oops\n")
    with pytest.warns(UserWarning, match="'oops' in column 'train_loss'"):
        assert read_scalars(tmp_path).series["train_loss"].steps.tolist() == [0]


def test_a_record_elsewhere_belongs_to_the_only_run(tmp_path: Path) -> None:
    logs, record = tmp_path / "logs" / "version_0", tmp_path / "my_record"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_text("step,train_loss\n0,1\n")
    IncidentLog(record / "incidents.jsonl").append(incident(1, "spike"))
    assert [(place.directory, place.records) for place in find_places(tmp_path)] == [(logs, (record,))]


def test_a_record_belongs_to_the_logs_beside_it(tmp_path: Path) -> None:
    for version in range(2):
        logs = tmp_path / f"version_{version}"
        logs.mkdir()
        (logs / "metrics.csv").write_text("step,train_loss\n0,1\n")
    IncidentLog(tmp_path / "version_0" / "flight_record" / "incidents.jsonl").append(incident(1, "spike"))
    IncidentLog(tmp_path / "elsewhere" / "incidents.jsonl").append(incident(1, "spike"))
    records = {place.directory.name: [each.name for each in place.records] for place in find_places(tmp_path)}
    assert records == {"version_0": ["flight_record"], "version_1": [], "elsewhere": ["elsewhere"]}
