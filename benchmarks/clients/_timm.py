"""timm: a ResNet in a ``pytorch_lightning`` module, with one NaN pixel."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import timm
import torch

from benchmarks.clients._client import QUIET, Client
from benchmarks.clients._squares import accuracy, loader


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("resnet10t", in_chans=1, num_classes=4)

    def forward(self, images: Any) -> Any:
        return self.model(images)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, quadrants = batch
        return torch.nn.functional.cross_entropy(self(images), quadrants)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(poisoned: bool, callbacks: list[Any]) -> float:
    torch.manual_seed(0)
    model = Classifier()
    trainer = pl.Trainer(**QUIET, max_epochs=2, logger=False, enable_checkpointing=False, callbacks=callbacks)
    trainer.fit(model, loader(poisoned))
    return accuracy(model)


CLIENT = Client("resnet10t", "pytorch_lightning", "a NaN pixel in one of 320 images", "accuracy", "cnn", train)
