"""What the recipes' classifiers have in common: a LightningModule that knows nothing of the callbacks."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from recipes._sharding import ShardableModule

__all__ = ["ImageClassifier"]


class ImageClassifier(ShardableModule):
    """Trains with the cross entropy and logs ``train/loss``, ``val/accuracy`` and ``test/accuracy``.

    A subclass has the layers and ``forward``, which maps images to logits.

    Args:
        outputs: Number of classes.
        optimizer: Makes the optimizer from the parameters.
    """

    def __init__(self, outputs: int, optimizer: OptimizerCallable) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.val_accuracy = MulticlassAccuracy(outputs, average="micro")
        self.test_accuracy = MulticlassAccuracy(outputs, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.val_accuracy(self(images), labels)
        self.log("val/accuracy", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test/accuracy", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())
