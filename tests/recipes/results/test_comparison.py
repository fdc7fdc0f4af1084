from __future__ import annotations

import io
import json
import statistics

import pytest
from rich.console import Console

from recipes.results._comparison import (
    ablation_sheet,
    number,
    pairs_sheet,
    records,
    run_sheet,
    seeds_sheet,
    sheets,
    verdict,
)
from recipes.results._run import Goal, Run
from recipes.results._sheet import Sheet
from tests.recipes.runs import INF, NAN, history, run

PLAIN = [0.1, 0.2, 0.3]
HEALED = [0.85, 0.75, 0.95]


def pairs(**changes: object) -> list[Run]:
    return [
        run(variant, value, seed=seed, **changes)
        for seed, values in enumerate(zip(PLAIN, HEALED, strict=True))
        for variant, value in zip(("plain", "healed"), values, strict=True)
    ]


def texts(sheet: Sheet) -> list[tuple[str, ...]]:
    return [tuple(cell.text for cell in row) for row in sheet.rows]


def shown(sheet: Sheet, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(sheet.table())
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_records_have_the_agreed_keys_and_are_valid_json() -> None:
    found = records([run("plain", NAN), run("healed", 0.9), run("healed", 0.5, without="guard")])
    assert found[0] == {
        "scenario": "exploding",
        "variant": "plain",
        "seed": 3,
        "metric": "accuracy",
        "value": None,
        "success": False,
        "seconds": 1.235,
    }
    assert (found[1]["value"], found[1]["success"]) == (0.9, True)
    assert found[2]["without"] == "guard"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("finished", "words"),
    [
        (run("healed", 0.9), "healed ≥ 0.800"),
        (run("healed", 0.7), "fails < 0.800"),
        (run("plain", 0.7), "fails < 0.800"),
        (run("plain", 0.9), "learns ≥ 0.800"),
        (run("plain", 0.9, goal=Goal("loss", 0.5, "min")), "fails > 0.500"),
        (run("healed", 0.4, goal=Goal("loss", 0.5, "min")), "healed ≤ 0.500"),
        (run("plain", 0.1, history=history([1.0, NAN, NAN])), "dead at step 1"),
        (run("healed", 0.1, history=history([NAN] * 3, skips=[1, 2, 3]), stopped="Why."), "stopped by guard"),
    ],
)
def test_verdict(finished: Run, words: str) -> None:
    assert verdict(finished) == words


@pytest.mark.parametrize(
    ("value", "text", "short"),
    [
        (0.8449, "0.845", ".845"),
        (12.3456, "12.346", "12.346"),
        (0.001234, "0.0012", "0.0012"),
        (0.0, "0.000", ".000"),
        (-0.5, "-0.500", "-0.500"),
        (3e7, "3e+07", "3e+07"),
        (NAN, "nan", "nan"),
    ],
)
def test_numbers_keep_the_digits_that_tell(value: float, text: str, short: str) -> None:
    assert (number(value), number(value, short=True)) == (text, short)


def test_table_of_runs_shows_every_figure_in_80_columns() -> None:
    spiky = history([1.0] * 3, norms=[0.5, 123456.0, 2.0])
    runs = [
        run("plain", 0.1, scenario="poisoned", history=history([1.0, NAN])),
        run("healed", 0.7, scenario="poisoned", skipped_steps=500, seconds=123.4, history=spiky),
    ]
    text = shown(run_sheet(runs))
    for figure in ("0.100", "0.700", "1.23e+05 / 2", "500", "123.4 s", "dead at step 1", "fails < 0.800"):
        assert figure in text
    assert "…" not in text


def test_table_of_seeds_shows_mean_spread_and_successes() -> None:
    plain, healed = texts(seeds_sheet(pairs()))
    deviation = statistics.stdev(HEALED)
    assert plain == ("exploding", "plain", "0.200 ± 0.100", ".100 .200 .300", "0", "1.2 s", "0/3 ≥ 0.800")
    assert healed[2:4] == (f"0.850 ± {deviation:.3f}", ".850 .750 .950")
    assert healed[-1] == "2/3 ≥ 0.800"
    dead = texts(seeds_sheet([run("plain", NAN, seed=0), run("plain", 0.5, seed=1)]))[0]
    assert dead[2] == "1/2 finite"


def test_table_of_pairs_compares_seed_by_seed() -> None:
    (row,) = texts(pairs_sheet(pairs()))
    assert row[:2] == ("exploding", "3/3")
    assert row[2].startswith("+0.650 [+0.")
    assert row[-1] == "p = 0.12"  # an eighth
    # A seed that only one variant has is left out: the command was interrupted.
    (row,) = texts(pairs_sheet(pairs()[:-1]))
    assert row[1] == "2/2"
    (row,) = texts(pairs_sheet(pairs()[:2]))
    assert row[1:4] == ("1/1", "+0.750", "-")
    (row,) = texts(pairs_sheet([run("plain", NAN, seed=0), run("healed", 0.9, seed=0)]))
    assert row[1:4] == ("1/1", "not finite", "-")


def test_table_of_an_ablation_shows_what_a_callback_is_good_for() -> None:
    runs = [*pairs(), *(run("healed", value - 0.2, seed=s, without="guard") for s, value in enumerate(HEALED))]
    whole, without = texts(ablation_sheet(runs))
    assert whole[1:] == ("whole", "0.850 ± 0.100", "", "2/3 ≥ 0.800")
    assert without[1:] == ("without guard", "0.650 ± 0.100", "-0.200", "0/3 ≥ 0.800")


def test_runs_of_a_scenario_stand_together_whatever_their_order() -> None:
    runs = [*pairs(), *pairs(scenario="poisoned"), run("healed", 0.5, seed=0, without="guard")]
    assert [row[:2] for row in texts(ablation_sheet(runs))] == [
        ("exploding", "whole"),
        ("exploding", "without guard"),
        ("poisoned", "whole"),
    ]


def test_tables_fit_what_was_run() -> None:
    def titles(runs: list[Run]) -> list[str]:
        return [sheet.title for sheet in sheets(runs)]

    in_pairs, ablation = "Healed against plain, in pairs of one seed", "What each callback contributes"
    assert titles([run("plain"), run("healed")]) == ["Seed 3"]
    assert titles(pairs()) == ["Seeds 0 to 2", in_pairs]
    assert titles([one for one in pairs() if one.variant == "plain"]) == ["Seeds 0 to 2"]
    assert titles([*pairs(), run(without="guard")]) == ["Seeds 0 to 2", in_pairs, ablation]


def test_every_table_fits_the_screen_and_becomes_markdown() -> None:
    runs = [*pairs(), *pairs(scenario="poisoned"), run("healed", INF, seed=0, without="initialization")]
    for sheet in sheets(runs):
        assert "…" not in shown(sheet, 100)
        lines = sheet.markdown().splitlines()
        assert lines[0] == f"## {sheet.title}"
        assert len({line.count("|") for line in lines[2:]}) == 1
        assert len(lines) == 4 + len(sheet.rows)
