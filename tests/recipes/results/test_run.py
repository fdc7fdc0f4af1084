from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from recipes.results._run import Goal, Run
from tests.recipes.runs import INF, NAN, history, run


@pytest.mark.parametrize(
    ("mode", "value", "reached"),
    [
        ("max", 0.8, True),
        ("max", 0.79, False),
        ("max", NAN, False),
        ("max", -INF, False),
        ("min", 0.8, True),
        ("min", 0.81, False),
        ("min", NAN, False),
        ("min", INF, False),
    ],
)
def test_goal_is_reached_at_the_threshold_and_never_by_nan(mode: Any, value: float, reached: bool) -> None:
    assert Goal("accuracy", 0.8, mode).reached(value) is reached


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


def test_a_run_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    original = run("plain", NAN, history=history([1.0, NAN, INF], skips=[0, 1, 1]), stopped="Why.", without="guard")
    original.save(tmp_path / "run.json")
    assert repr(Run.load(tmp_path / "run.json")) == repr(original)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_names_tell_variants_apart() -> None:
    assert run("plain").name == "exploding-plain"
    assert run("healed", without="clipping").name == "exploding-healed-without-clipping"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"scenario": ')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        Run.load(tmp_path / "run.json")
