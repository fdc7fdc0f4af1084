from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from recipes.results._report import report, write_results
from recipes.results._run import Run
from tests.recipes.runs import INF, NAN, history, run


def told(runs: list[Run], folder: Path) -> tuple[int, str]:
    output = io.StringIO()
    return report(runs, folder, Console(file=output, width=80)), output.getvalue()


@pytest.mark.parametrize(("value", "code"), [(0.9, 0), (0.7, 1)])
def test_report_admits_failure(tmp_path: Path, value: float, code: int) -> None:
    found, text = told([run("plain", 0.1), run("healed", value, stopped="Too many skips.")], tmp_path)
    assert found == code
    assert f"tensorboard --logdir {tmp_path}" in text
    assert ("seed 3, missed its goal: accuracy 0.700, wanted 0.800. Too many skips." in text) is bool(code)
    assert "| exploding | plain | 0.100 |" in (tmp_path / "summary.md").read_text()


def test_an_ablation_that_fails_is_no_failure_of_the_recipe(tmp_path: Path) -> None:
    runs = [run("plain", 0.1), run("healed", 0.9), run("healed", 0.1, without="guard")]
    code, text = told(runs, tmp_path)
    assert code == 0
    assert "missed" not in text


def test_a_plain_variant_that_succeeds_is_told(tmp_path: Path) -> None:
    code, text = told([run("plain", 0.9), run("healed", 0.9)], tmp_path)
    assert code == 0
    assert "nothing to heal" in text


def test_results_are_replaced_as_a_whole(tmp_path: Path) -> None:
    write_results([run("plain", NAN), run("healed", 0.9), run("healed", 0.1, without="guard")], tmp_path)
    assert [record["value"] for record in json.loads((tmp_path / "results.json").read_text())] == [None, 0.9]
    assert [record["without"] for record in json.loads((tmp_path / "ablation.json").read_text())] == ["guard"]
    write_results([], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ablation.json", "results.json"]
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_picture_is_drawn_whatever_the_curves_hold(tmp_path: Path) -> None:
    dead = run("plain", 0.1, history=history([NAN, INF, NAN]))
    skipping = run("healed", 0.9, history=history([1.0, NAN, 0.5], skips=[0, 1, 1]))
    several = [run("plain", 0.1, seed=seed, history=history([1.0, 0.0, NAN])) for seed in range(3)]
    empty = [run("plain", history={}), run("healed", history={})]
    for number, runs in enumerate(([dead, skipping], [dead], several, empty)):
        folder = tmp_path / str(number)
        folder.mkdir()
        told(runs, folder)
        picture = imread(folder / "curves.png")
        assert picture.shape[0] > 500
        assert picture.std() > 0
