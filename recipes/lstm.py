"""An LSTM that reads handwritten digits pixel by pixel: it fails at a high learning rate, and heals with the callbacks.

Scenario ``exploding``: 64 time steps, SGD with momentum 0.9 at a learning rate of 0.5. Now and then the gradient is
ten or a hundred times its usual size and throws the plain LSTM back; the same LSTM with an orthogonal initialisation,
clipping, a warm-up and a cosine decay learns the task.

Scenario ``poisoned``: one batch in a hundred holds a NaN. The first one kills the plain LSTM; the guarded one skips it
and ends where it ends on clean data.

Run it with ``python -m recipes.lstm``; ``configs/lstm.yaml`` holds every default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from rich.console import Console
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from recipes._callback_set import CallbackSet
from recipes._command_line import from_command_line, quiet
from recipes._comparison import report
from recipes._digits import Digits
from recipes._poison import Poison
from recipes._run import LOSS, Goal, Run, TrainerFactory, Variant, train

__all__ = ["LSTMRecipe", "PixelLSTM", "main"]

CONFIG = Path(__file__).parents[1] / "configs" / "lstm.yaml"
ACCURACY = "test/accuracy"
CLASSES = 10


class PixelLSTM(L.LightningModule):
    """Reads an image one pixel a time step and names the digit after the last one.

    Args:
        optimizer: Makes the optimizer from the parameters.
        hidden_size: Units of each LSTM layer.
        num_layers: LSTM layers.
    """

    def __init__(self, optimizer: OptimizerCallable, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lstm = nn.LSTM(1, hidden_size, num_layers, batch_first=True)
        self.head = nn.Linear(hidden_size, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, pixels)`` to logits ``(batch, classes)``."""
        states, _ = self.lstm(images.unsqueeze(-1))
        logits: Tensor = self.head(states[:, -1])
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log(LOSS, loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log(ACCURACY, self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class LSTMRecipe:
    """Train a plain LSTM and a healed one from the same seed, and compare them.

    Args:
        optimizer: Optimizer of both variants.
        trainer: Trainer of both variants; takes every argument of lightning.Trainer but callbacks and logger.
        plain: Callbacks of the plain variant: they only watch.
        healed: Callbacks of the healed variant.
        seed: Seed of the weights, the order of the batches and the poison.
        scenarios: Which failures to show.
        output: Folder for results.json, curves.png and the TensorBoard logs.
        hidden_size: Units of each LSTM layer.
        num_layers: LSTM layers.
        batch_size: Images a batch.
        poison: Which batches hold a NaN in the scenario "poisoned".
        accuracy: Test accuracy that counts as success on clean data.
        tolerance: How far below its accuracy on clean data a run with poisoned batches may end.
        threads: CPU threads; more than one does not pay for so small a model.
    """

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable,
        trainer: TrainerFactory,
        plain: CallbackSet,
        healed: CallbackSet,
        seed: NonNegativeInt,
        scenarios: Literal["exploding", "poisoned", "all"],
        output: Path,
        hidden_size: PositiveInt,
        num_layers: PositiveInt,
        batch_size: PositiveInt,
        poison: Poison,
        accuracy: ClosedUnitInterval,
        tolerance: ClosedUnitInterval,
        threads: PositiveInt,
    ) -> None:
        self.optimizer = optimizer
        self.make_trainer = trainer
        self.callbacks: dict[Variant, CallbackSet] = {"plain": plain, "healed": healed}
        self.seed = seed
        self.scenarios = scenarios
        self.output = output
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_size = batch_size
        self.poison = poison
        self.accuracy = accuracy
        self.tolerance = tolerance
        self.threads = threads
        # Made once for nothing, so that a wrong argument is told now and not between two runs.
        self.optimizer(self._model().parameters())
        self.make_trainer(callbacks=[], logger=[])
        self.output.mkdir(parents=True, exist_ok=True)

    def run(self, console: Console) -> list[Run]:
        """Train every run of the chosen scenarios."""
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)  # the denormal gradients of a ruined LSTM cost a CPU five times the time
        runs: list[Run] = []
        goal = Goal(ACCURACY, self.accuracy)
        if self.scenarios != "poisoned":
            runs += [self._train("exploding", variant, goal, console) for variant in ("plain", "healed")]
        if self.scenarios != "exploding":
            # The healed run of the first scenario is a run on clean data; training it twice would change no bit.
            clean = replace(runs[-1], scenario="clean") if runs else self._train("clean", "healed", goal, console)
            goal = Goal(ACCURACY, clean.value - self.tolerance)
            runs += [clean, *(self._train("poisoned", variant, goal, console) for variant in ("plain", "healed"))]
        return runs

    def _train(self, scenario: str, variant: Variant, goal: Goal, console: Console) -> Run:
        L.seed_everything(self.seed, verbose=False)
        data = Digits(self.batch_size, self.seed, self.poison if scenario == "poisoned" else None)
        run = train(
            self._model(),
            data,
            scenario=scenario,
            variant=variant,
            seed=self.seed,
            goal=goal,
            callbacks=self.callbacks[variant].fresh(),
            make_trainer=self.make_trainer,
            output=self.output,
            console=console,
        )
        if scenario == "poisoned" and data.poisoned_batches == 0:
            console.print("[yellow]No batch was poisoned in so short a run: raise --trainer.max_steps.")
        return run

    def _model(self) -> PixelLSTM:
        return PixelLSTM(self.optimizer, self.hidden_size, self.num_layers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line and return the exit code."""
    console = Console()
    with quiet():
        recipe = from_command_line(LSTMRecipe, CONFIG, argv)
        runs = recipe.run(console)
    return report(runs, recipe.output, console)


if __name__ == "__main__":
    raise SystemExit(main())
