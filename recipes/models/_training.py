"""How the recipes' models train: as LightningModules that know nothing of the callbacks."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["ImageClassifier", "ShardableModule"]


class ShardableModule(L.LightningModule):
    """A LightningModule that shards its parameters over the processes where the Trainer's strategy is FSDP2's."""

    def configure_model(self) -> None:
        trainer = self._trainer
        if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy) or isinstance(self, FSDPModule):
            return
        assert self.device_mesh is not None
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


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
