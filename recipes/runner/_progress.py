"""One progress bar for a whole run, counted in optimizer steps."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["StepProgressBar"]


class StepProgressBar(ProgressBar):
    """Shows steps, time and the metrics logged with ``prog_bar=True``; the finished bar stays on the screen.

    Args:
        title: What the bar stands for, such as the name of the run.
        console: Where to draw.
    """

    def __init__(self, title: str, console: Console) -> None:
        super().__init__()
        self.title = title
        self.console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self._enabled:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[metrics]}"),
            console=self.console,
        )
        total = trainer.estimated_stepping_batches
        self._task = self._progress.add_task(self.title, total=total if math.isfinite(total) else None, metrics="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is not None:
            metrics = "  ".join(f"{name} {value:.3g}" for name, value in trainer.progress_bar_metrics.items())
            self._progress.update(self._task, completed=trainer.global_step, metrics=metrics)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
