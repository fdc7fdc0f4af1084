"""What ``python -m recipes.<name>`` does, whichever recipe it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from recipes.results import Run, report, write_results
from recipes.runner._command_line import quiet, scenarios_from_command_line
from recipes.runner._interruption import Interrupted, interruption

__all__ = ["run_recipe"]

CONFIGS = Path(__file__).parents[2] / "configs"
INTERRUPTED = 130  # what shells report after Ctrl-C


def run_recipe(name: str, argv: Sequence[str] | None = None, picture: Callable[[Path], Path] | None = None) -> int:
    """Train every scenario, variant and seed that the command line asks for, and report.

    The results are on disk after each run. Ctrl-C ends the command after the step in hand; ``--resume`` goes on there.

    Args:
        name: The recipe: ``configs/<name>.yaml`` has its defaults, ``configs/<name>/`` its scenarios.
        argv: The command line; None takes that of the process.
        picture: Draws a further picture into the output folder and returns its path.

    Returns:
        The exit code: 0 if every healed run reached its goal, 130 after Ctrl-C, else 1.
    """
    # Other processes of a distributed run train along and keep silent.
    writes = getattr(rank_zero_only, "rank", 0) in (0, None)
    console = Console(quiet=not writes)
    runs: list[Run] = []
    interrupted = False
    with quiet(), interruption() as asked:
        recipes = scenarios_from_command_line(CONFIGS / f"{name}.yaml", argv)
        output = recipes[0].output
        try:
            for recipe in recipes:
                for run in recipe.run(console, asked):
                    runs.append(run)
                    if writes:
                        write_results(runs, output)
        except (Interrupted, SystemExit):  # Lightning answers a second Ctrl-C by leaving Python
            if not asked.requested:
                raise
            interrupted = True
            console.print("\n[yellow]Interrupted. The same command with --resume goes on from here.")
        if not writes:
            return 0
        if not runs:
            write_results(runs, output)
            return INTERRUPTED
        code = report(runs, output, console)
        if picture is not None:
            console.print(f"Picture      {picture(output)}", highlight=False, markup=False, soft_wrap=True)
    return INTERRUPTED if interrupted else code
