from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from recipes._comparison import comparison_table, report, results, verdict
from recipes._history import History
from recipes._run import GRADIENT_NORM, LOSS, SKIPPED_STEPS, Goal, Run

NAN, INF = math.nan, math.inf


def history(losses: list[float], norms: list[float] | None = None, skips: list[float] | None = None) -> History:
    series = {LOSS: losses, GRADIENT_NORM: norms or losses, SKIPPED_STEPS: skips or []}
    return {name: list(enumerate(values)) for name, values in series.items()}


def run(variant: Any = "healed", value: float = 0.9, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "scenario": "exploding",
        "seed": 3,
        "goal": Goal("test/accuracy", 0.8),
        "skipped_steps": 0,
        "seconds": 1.23456,
        "history": history([2.0, 1.0, 0.5]),
    }
    return Run(variant=variant, value=value, **{**fields, **changes})


@pytest.mark.parametrize(("value", "reached"), [(0.8, True), (0.79, False), (NAN, False), (-INF, False)])
def test_goal_is_reached_at_the_threshold_and_never_by_nan(value: float, reached: bool) -> None:
    assert Goal("test/accuracy", 0.8).reached(value) is reached


@pytest.mark.parametrize(
    ("losses", "skips", "died_at"),
    [
        ([1.0, 2.0, 3.0], [0, 0, 0], None),
        ([1.0, NAN, NAN], [0, 0, 0], 1),
        ([1.0, INF, NAN], [0, 0, 0], 1),
        ([1.0, NAN, 2.0], [0, 1, 1], None),  # a bad batch, skipped
        ([1.0, 2.0, NAN], [0, 0, 1], None),  # the same as the last one of the run
        ([NAN, 1.0, NAN], [0, 0, 0], 2),
        ([], [], None),
    ],
)
def test_a_run_dies_where_its_loss_stays_non_finite(losses: list[float], skips: list[float], died_at: int) -> None:
    assert run(history=history(losses, skips=skips)).died_at == died_at


def test_skipped_steps_are_those_where_the_count_rose() -> None:
    assert run(history=history([1.0] * 6, skips=[1, 1, 2, 2, 2, 3])).skipped_at == [0, 2, 5]


def test_gradient_norms_leave_out_what_is_not_finite() -> None:
    seen = run(history=history([1.0] * 5, norms=[3.0, NAN, 1.0, INF, 8.0]))
    assert (seen.largest_gradient_norm, seen.median_gradient_norm) == (8.0, 3.0)
    none = run(history=history([NAN]))
    assert math.isnan(none.largest_gradient_norm)
    assert math.isnan(none.median_gradient_norm)


def test_results_have_the_agreed_keys_and_are_valid_json() -> None:
    records = results([run("plain", NAN), run("healed", 0.9)])
    assert records[0] == {
        "scenario": "exploding",
        "variant": "plain",
        "seed": 3,
        "metric": "accuracy",
        "value": None,
        "success": False,
        "seconds": 1.235,
    }
    assert (records[1]["value"], records[1]["success"]) == (0.9, True)
    json.dumps(records, allow_nan=False)


@pytest.mark.parametrize(
    ("finished", "words"),
    [
        (run("healed", 0.9), "healed[/green] ≥ 0.800"),
        (run("healed", 0.7), "fails < 0.800"),
        (run("plain", 0.7), "fails < 0.800"),
        (run("plain", 0.9), "learns ≥ 0.800"),
        (run("plain", 0.1, history=history([1.0, NAN, NAN])), "dead at step 1"),
        (run("healed", 0.1, history=history([NAN] * 3, skips=[1, 2, 3]), stopped="Why."), "stopped by guard"),
    ],
)
def test_verdict(finished: Run, words: str) -> None:
    assert words in verdict(finished)


def test_table_shows_every_figure_in_80_columns() -> None:
    spiky = history([1.0] * 3, norms=[0.5, 123456.0, 2.0])
    runs = [
        run("plain", 0.1, scenario="poisoned", history=history([1.0, NAN])),
        run("healed", 0.7, scenario="poisoned", skipped_steps=500, seconds=123.4, history=spiky),
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_table(runs))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for figure in ("0.100", "0.700", "1.23e+05 / 2", "500", "123.4 s", "dead at step 1", "fails < 0.800"):
        assert figure in text
    assert "…" not in text


@pytest.mark.parametrize(("value", "code"), [(0.9, 0), (0.7, 1)])
def test_report_writes_its_files_and_admits_failure(tmp_path: Path, value: float, code: int) -> None:
    output = io.StringIO()
    runs = [run("plain", 0.1), run("healed", value, stopped="Too many skips.")]
    assert report(runs, tmp_path, Console(file=output, width=80)) == code
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    text = output.getvalue()
    assert f"tensorboard --logdir {tmp_path}" in text
    assert ("missed its goal: accuracy 0.700, wanted 0.800. Too many skips." in text) is bool(code)


def test_picture_is_drawn_whatever_the_curves_hold(tmp_path: Path) -> None:
    dead = run("plain", 0.1, history=history([NAN, INF, NAN]))
    skipping = run("healed", 0.9, history=history([1.0, NAN, 0.5], skips=[0, 1, 1]))
    for number, runs in enumerate(([dead, skipping], [run("plain", history={}), run("healed", history={})])):
        folder = tmp_path / str(number)
        folder.mkdir()
        report(runs, folder, Console(file=io.StringIO()))
        picture = imread(folder / "curves.png")
        assert picture.shape[0] > 500
        assert picture.std() > 0
