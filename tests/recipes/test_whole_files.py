"""Whatever file a recipe writes is there complete or not at all."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from recipes.gradient_flow import Observation, Setting, gradient_through_time, observe
from recipes.gradient_flow.__main__ import report as report_gradient_flow
from recipes.results import HistoryLogger, report, write_results
from recipes.transformer import TextSample
from tests.recipes.runs import run

RUNS = [run("plain", 0.1), run("healed", 0.9), run("healed", 0.1, without="guard")]


def observations(study: Any) -> list[Observation]:
    return [observe(Setting(study, "relu", "he", 3), None, 0, width=8, batch_size=8, dtype=torch.float32)]


def log_sample(folder: Path) -> None:
    TextSample()._log("to be", SimpleNamespace(loggers=[SimpleNamespace(log_dir=str(folder))]))  # type: ignore[arg-type]


def console() -> Console:
    return Console(file=io.StringIO())


WRITERS: list[tuple[str, Callable[[Path], object]]] = [
    ("run.json", lambda folder: RUNS[0].save(folder / "run.json")),
    ("interrupted.json", lambda folder: HistoryLogger().write(folder / "interrupted.json")),
    ("results.json", lambda folder: write_results(RUNS, folder)),
    ("ablation.json", lambda folder: write_results(RUNS, folder)),
    ("summary.md", lambda folder: report(RUNS, folder, console())),
    ("curves.png", lambda folder: report(RUNS, folder, console())),
    ("sample.txt", log_sample),
    ("results.json", lambda folder: report_gradient_flow(observations("depths"), folder, console())),
    ("summary.md", lambda folder: report_gradient_flow(observations("depths"), folder, console())),
    ("depths.png", lambda folder: report_gradient_flow(observations("depths"), folder, console())),
    ("initializations.png", lambda folder: report_gradient_flow(observations("initializations"), folder, console())),
    ("gradient_through_time.png", lambda folder: gradient_through_time(folder, seeds=[0])),
    ("gradient_through_time.md", lambda folder: gradient_through_time(folder, seeds=[0])),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_a_write_that_fails_half_way_leaves_the_older_file(
    name: str, write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    older = (tmp_path / name).read_bytes()

    def full(original: Callable[..., Any], place: int) -> Callable[..., Any]:
        def write_half(*args: Any, **options: Any) -> Any:
            if not Path(args[place]).name.endswith(name):
                return original(*args, **options)
            Path(args[place]).write_bytes(b"half")
            raise OSError("the disk is full")

        return write_half

    monkeypatch.setattr(Path, "write_text", full(Path.write_text, 0))
    monkeypatch.setattr(Figure, "savefig", full(Figure.savefig, 1))
    with pytest.raises(OSError, match="the disk is full"):
        write(tmp_path)
    assert (tmp_path / name).read_bytes() == older
    assert not list(tmp_path.rglob(".unfinished-*"))
