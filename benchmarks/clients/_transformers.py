"""transformers: a small ViT in a ``lightning`` module, with one NaN pixel."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.clients._client import QUIET, Client
from benchmarks.clients._squares import accuracy, loader


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=32,
            patch_size=8,
            num_channels=1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=4,
        )
        self.model = ViTForImageClassification(config)

    def forward(self, images: Any) -> Any:
        return self.model(pixel_values=images).logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, quadrants = batch
        return self.model(pixel_values=images, labels=quadrants).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(poisoned: bool, callbacks: list[Any]) -> float:
    torch.manual_seed(0)
    model = Classifier()
    trainer = pl.Trainer(**QUIET, max_epochs=4, logger=False, enable_checkpointing=False, callbacks=callbacks)
    trainer.fit(model, loader(poisoned))
    return accuracy(model)


CLIENT = Client("ViT", "lightning", "a NaN pixel in one of 320 images", "accuracy", "transformer", train)
