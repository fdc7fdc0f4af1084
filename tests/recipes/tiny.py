"""A recipe that trains in a second: the framework's tests run it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from recipes.data import Text
from recipes.models import CharTransformer, ShardableModule

CONFIGS = Path(__file__).parent / "configs"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
LENGTH = 12  # characters that the small Transformer reads at once


class TinyNet(ShardableModule):
    """Two layers with batch normalization and dropout: buffers, and random numbers in each step.

    Args:
        inputs: Shape of one sample.
        outputs: Number of classes.
        optimizer: Makes the optimizer.
        width: Hidden units.
    """

    def __init__(self, inputs: torch.Size, outputs: int, optimizer: OptimizerCallable, width: int = 8) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs.numel(), width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(width, outputs),
        )
        self.accuracy = MulticlassAccuracy(outputs, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val/accuracy")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test/accuracy")

    def _evaluate(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log(name, self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Strangers(L.LightningDataModule):
    """A data module that knows nothing of recipes: no seed, no number of classes, an ordinary loader.

    Args:
        size: Numbers a sample.
        integers: Whether the targets are classes, or else numbers.
        targets: How many numbers a sample has for targets; 0 stands for one without a dimension of its own.
    """

    def __init__(self, size: int = 6, integers: bool = True, targets: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(40, targets) if targets else torch.randn(40)
        self.samples = TensorDataset(
            torch.randn(40, size, generator=generator), torch.arange(40) % 4 if integers else numbers
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=10, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=10)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=10)


class Batched(Strangers):
    """Has an option that the built-in data have, too."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()


class WithoutValidation(Strangers):
    """Trains and tests only; knows its processes from the Trainer."""

    def __init__(self, folder: Path = Path("data")) -> None:
        super().__init__()
        self.save_hyperparameters()  # a path, too, in every checkpoint

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.processes = self.trainer.world_size

    val_dataloader = L.LightningDataModule.val_dataloader


class WithoutTest(Strangers):
    """Cannot be tested."""

    test_dataloader = L.LightningDataModule.test_dataloader


class Dictionaries(Strangers):
    """Gives batches in a form of its own."""

    def train_dataloader(self) -> DataLoader[Any]:
        samples: Any = [{"inputs": torch.zeros(6), "targets": torch.tensor(0)}] * 10
        return DataLoader(samples, batch_size=5)


def fitted(data: Text, steps: int = 3, callbacks: list[L.Callback] | None = None, **options: Any) -> L.Trainer:
    """Train a Transformer of one layer on a text."""
    data.setup("fit")
    adam = partial(torch.optim.AdamW, lr=1e-2)
    model = CharTransformer(torch.Size([LENGTH]), data.classes, adam, layers=1, width=16, heads=2)
    options = {"logger": False, **options}
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=callbacks, log_every_n_steps=1, **QUIET, **options
    )
    trainer.fit(model, data)
    return trainer


@dataclass
class Outcome:
    """What a command returned, printed and wrote."""

    code: int
    screen: str
    output: Path

    def records(self, name: str = "results.json") -> list[dict[str, Any]]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        records: list[dict[str, Any]] = json.loads((self.output / name).read_text(), parse_constant=refuse)
        return records
