"""Say what came of the runs: tables on the screen, files in the output folder, and where to look further."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recipes.results._comparison import number, records, sheets
from recipes.results._curves import draw_curves
from recipes.results._run import Run
from stability_callbacks._atomic import atomic_path

__all__ = ["report", "write_results"]

POINTERS = """
Curves       {output}/curves.png
Results      {output}/results.json, tables in {output}/summary.md
TensorBoard  {tensorboard} --logdir {output}
             Scalars, grad_norm/total: plain against healed, before any clipping.
             Histograms, gradients/...: the spread of each weight's gradients.
"""


def write_results(runs: Sequence[Run], output: Path) -> None:
    """Write ``results.json``, and ``ablation.json`` if callbacks were left out; each is whole at any time."""
    _write_json(output / "results.json", [run for run in runs if run.without is None])
    left_out = [run for run in runs if run.without is not None]
    if left_out:
        _write_json(output / "ablation.json", left_out)


def report(runs: Sequence[Run], output: Path, console: Console) -> int:
    """Print the tables and write ``summary.md`` and ``curves.png`` into ``output``.

    Returns:
        The exit code: 0 if every healed run reached its goal, else 1.
    """
    tables = sheets(runs)
    with atomic_path(output / "summary.md") as part:
        part.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")
    draw_curves(runs, output / "curves.png")
    for table in tables:
        console.print()
        console.print(table.table())
    pointers = POINTERS.format(output=output, tensorboard=_tensorboard())
    console.print(pointers, highlight=False, markup=False, soft_wrap=True)
    whole = [run for run in runs if run.without is None]
    unhealed = [run for run in whole if run.variant == "healed" and not run.success]
    for run in whole:
        if run.variant == "plain" and run.success:
            text = f"The plain run of scenario '{run.scenario}', seed {run.seed}, reached the goal: nothing to heal."
            console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for run in unhealed:
        console.print(_shortfall(run), style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if unhealed else 0


def _write_json(path: Path, runs: Sequence[Run]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(records(runs), indent=2, allow_nan=False) + "\n")


def _shortfall(run: Run) -> str:
    text = f"The healed run of scenario '{run.scenario}', seed {run.seed}, missed its goal: {run.goal.metric} "
    wanted = f"{number(run.value)}, wanted {number(run.goal.threshold)}."
    return text + wanted + (f" {run.stopped}" if run.stopped else "")


def _tensorboard() -> Path:
    # The one installed beside this interpreter: what is on the PATH may be another, or none.
    command = Path(sys.executable).with_name("tensorboard")
    return command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
