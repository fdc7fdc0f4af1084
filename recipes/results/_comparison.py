"""What came of the runs, in tables: run by run, over several seeds, and with one callback left out at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from recipes.results._paired import compare_in_pairs
from recipes.results._run import Goal, Run
from recipes.results._sheet import Cell, Sheet

__all__ = ["ablation_sheet", "number", "pairs_sheet", "records", "run_sheet", "seeds_sheet", "sheets", "verdict"]


def sheets(runs: Sequence[Run]) -> list[Sheet]:
    """Every table that the runs allow: run by run, or the mean over seeds and the pairs; and the ablation."""
    whole = [run for run in runs if run.without is None]
    if len({run.seed for run in whole}) == 1:
        tables = [run_sheet(whole)]
    else:
        tables = [seeds_sheet(whole)]
        if {run.variant for run in whole} == {"plain", "healed"}:
            tables.append(pairs_sheet(whole))
    if len(whole) < len(runs):
        tables.append(ablation_sheet(runs))
    return [table for table in tables if table.rows]


def run_sheet(runs: Sequence[Run]) -> Sheet:
    """One row a run; narrow enough for 80 columns."""
    columns = (
        "scenario",
        "variant",
        _metrics(runs),
        "gradient norm\nmax / median",
        "skipped\nsteps",
        "time",
        "verdict",
    )
    sheet = Sheet(f"Seed {runs[0].seed}" if runs else "", columns, labels=2)
    for run in runs:
        sheet.add(
            run.scenario,
            run.variant,
            number(run.value),
            f"{run.largest_gradient_norm:.3g} / {run.median_gradient_norm:.3g}",
            str(run.skipped_steps),
            f"{run.seconds:.1f} s",
            Cell(verdict(run), _color(run.success)),
        )
    return sheet


def seeds_sheet(runs: Sequence[Run]) -> Sheet:
    """One row a scenario and variant: mean, spread and every seed's success."""
    columns = ("scenario", "variant", _metrics(runs), "each seed", "skipped", "time", "success")
    seeds = sorted({run.seed for run in runs})
    sheet = Sheet(f"Seeds {seeds[0]} to {seeds[-1]}" if seeds else "", columns, labels=2)
    for group in _groups(runs):
        successes = sum(run.success for run in group)
        sheet.add(
            group[0].scenario,
            group[0].variant,
            _spread([run.value for run in group]),
            " ".join(number(run.value, short=True) for run in group),
            f"{statistics.fmean(run.skipped_steps for run in group):.3g}",
            f"{statistics.fmean(run.seconds for run in group):.1f} s",
            Cell(f"{successes}/{len(group)} {_bound(group[0].goal)}", _color(successes == len(group))),
        )
    return sheet


def pairs_sheet(runs: Sequence[Run]) -> Sheet:
    """One row a scenario: healed against plain, seed by seed."""
    columns = (
        "scenario",
        "healed\nbetter in",
        "mean gain\n[95 % interval]",
        "paired t-test,\none-sided",
        "exact sign test,\none-sided",
    )
    sheet = Sheet("Healed against plain, in pairs of one seed", columns, labels=1)
    for scenario, group in _by_scenario(runs).items():
        values = {variant: {run.seed: run.value for run in group if run.variant == variant} for variant in _VARIANTS}
        seeds = sorted(values["plain"].keys() & values["healed"].keys())
        if not seeds:  # an interrupted command
            continue
        plain, healed = ([values[variant][seed] for seed in seeds] for variant in _VARIANTS)
        pairs = compare_in_pairs(plain, healed, group[0].goal.mode)
        low, high = pairs.interval
        gain = f"{pairs.difference:+.3f}" if math.isfinite(pairs.difference) else "not finite"
        sheet.add(
            scenario,
            f"{pairs.better}/{pairs.pairs}",
            gain if math.isnan(low) else f"{gain} [{low:+.3f}, {high:+.3f}]",
            "-" if math.isnan(pairs.t_test) else f"p = {pairs.t_test:.2g}",
            f"p = {pairs.sign_test:.2g}",
        )
    return sheet


def ablation_sheet(runs: Sequence[Run]) -> Sheet:
    """One row a callback left out of the healed variant, beside the whole of it."""
    columns = ("scenario", "healed variant", _metrics(runs), "change", "success")
    sheet = Sheet("What each callback contributes", columns, labels=2)
    whole = {(run.scenario, run.seed): run.value for run in runs if run.variant == "healed" and run.without is None}
    for group in _groups([run for run in runs if run.variant == "healed"]):
        without = group[0].without
        change = statistics.fmean(run.value - whole.get((run.scenario, run.seed), math.nan) for run in group)
        successes = sum(run.success for run in group)
        sheet.add(
            group[0].scenario,
            "whole" if without is None else f"without {without}",
            _spread([run.value for run in group]),
            "" if without is None else f"{change:+.3f}" if math.isfinite(change) else "not finite",
            Cell(f"{successes}/{len(group)} {_bound(group[0].goal)}", _color(successes == len(group))),
        )
    return sheet


def records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs as plain records for ``results.json``; a value that is not finite becomes None, as JSON knows no NaN."""
    return [
        {
            "scenario": run.scenario,
            "variant": run.variant,
            **({"without": run.without} if run.without is not None else {}),
            "seed": run.seed,
            "metric": run.goal.metric,
            "value": run.value if math.isfinite(run.value) else None,
            "success": run.success,
            "seconds": round(run.seconds, 3),
        }
        for run in runs
    ]


def verdict(run: Run) -> str:
    """What became of the run, in a few words."""
    if run.stopped is not None:
        return "stopped by guard"
    if run.died_at is not None:
        return f"dead at step {run.died_at}"
    if not run.success:
        return f"fails {'<' if run.goal.mode == 'max' else '>'} {number(run.goal.threshold)}"
    return f"{'healed' if run.variant == 'healed' else 'learns'} {_bound(run.goal)}"


def number(value: float, short: bool = False) -> str:
    """A metric's value: three decimals, or two digits if it is smaller than they can show; "short" drops the zero."""
    if not math.isfinite(value) or 0 < abs(value) < 0.01 or abs(value) >= 1e5:
        return f"{value:.2g}"
    text = f"{value:.3f}"
    return text.removeprefix("0") if short and value < 1 else text


_VARIANTS = ("plain", "healed")


def _by_scenario(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {scenario: list(group) for scenario, group in groupby(runs, key=lambda run: run.scenario)}


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs that differ only in their seed, scenario by scenario, in the order in which they first appear."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.scenario, run.name), []).append(run)
    order = list(dict.fromkeys(run.scenario for run in runs))
    return sorted(groups.values(), key=lambda group: order.index(group[0].scenario))


def _metrics(runs: Sequence[Run]) -> str:
    return " or ".join(dict.fromkeys(run.goal.metric for run in runs))


def _bound(goal: Goal) -> str:
    return f"{'≥' if goal.mode == 'max' else '≤'} {number(goal.threshold)}"


def _spread(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return f"{sum(map(math.isfinite, values))}/{len(values)} finite"
    deviation = f" ± {number(statistics.stdev(values))}" if len(values) > 1 else ""
    return number(statistics.fmean(values)) + deviation


def _color(success: bool) -> str:
    return "green" if success else "red"
