"""Say what came of the runs: a table on the screen, results.json, a picture, and where to look further."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recipes._curves import draw_curves
from recipes._run import Run

__all__ = ["comparison_table", "report", "results", "verdict"]

POINTERS = """
Curves       {output}/curves.png
Results      {output}/results.json
TensorBoard  {tensorboard} --logdir {output}
             Scalars, grad_norm/total: plain against healed, before any clipping.
             Histograms, gradients/...: the spread of each weight's gradients.
"""


def report(runs: Sequence[Run], output: Path, console: Console) -> int:
    """Print the table, write ``results.json`` and ``curves.png`` into ``output``.

    Returns:
        The exit code: 0 if every healed run reached its goal, else 1.
    """
    (output / "results.json").write_text(json.dumps(results(runs), indent=2, allow_nan=False) + "\n")
    draw_curves(runs, output / "curves.png")
    console.print()
    console.print(comparison_table(runs))
    console.print(POINTERS.format(output=output, tensorboard=_tensorboard()), highlight=False, soft_wrap=True)
    unhealed = [run for run in runs if run.variant == "healed" and not run.success]
    for run in unhealed:
        console.print(_shortfall(run), style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if unhealed else 0


def results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs as plain records for ``results.json``; a value that is not finite becomes None, as JSON knows no NaN."""
    return [
        {
            "scenario": run.scenario,
            "variant": run.variant,
            "seed": run.seed,
            "metric": run.metric,
            "value": run.value if math.isfinite(run.value) else None,
            "success": run.success,
            "seconds": round(run.seconds, 3),
        }
        for run in runs
    ]


def comparison_table(runs: Sequence[Run]) -> Table:
    """One row a run, one section a scenario; narrow enough for 80 columns."""
    table = Table(
        title=f"Seed {runs[0].seed}", title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("scenario")
    table.add_column("variant")
    for name in (runs[0].metric, "gradient norm\nmax / median", "skipped\nsteps", "time"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for _, group in groupby(runs, key=lambda run: run.scenario):
        for run in group:
            table.add_row(
                run.scenario,
                run.variant,
                f"{run.value:.3f}",
                f"{run.largest_gradient_norm:.3g} / {run.median_gradient_norm:<5.3g}",
                str(run.skipped_steps),
                f"{run.seconds:.1f} s",
                verdict(run),
            )
        table.add_section()
    return table


def verdict(run: Run) -> str:
    """What became of the run, in a few words."""
    if run.stopped is not None:
        return "[red]stopped by guard[/red]"
    if run.died_at is not None:
        return f"[red]dead at step {run.died_at}[/red]"
    if not run.success:
        return f"[red]fails < {run.goal.threshold:.3f}[/red]"
    return f"{'[green]healed[/green]' if run.variant == 'healed' else 'learns'} ≥ {run.goal.threshold:.3f}"


def _shortfall(run: Run) -> str:
    text = f"The healed run of scenario '{run.scenario}' missed its goal: {run.metric} {run.value:.3f}, "
    return f"{text}wanted {run.goal.threshold:.3f}.{f' {run.stopped}' if run.stopped else ''}"


def _tensorboard() -> Path:
    # The one installed beside this interpreter: what is on the PATH may be another, or none.
    command = Path(sys.executable).with_name("tensorboard")
    return command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
