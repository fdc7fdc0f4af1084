"""Small networks that learn scikit-learn's handwritten digits in a few hundred steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stability_callbacks.initialization import Auto

__all__ = ["NETWORKS", "DigitClassifier"]

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10


class MLP(nn.Sequential):
    """Three layers with ReLU; takes ``(batch, 64)``, as all networks here."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(
            nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
        )


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(x)).relu()
        output: Tensor = (x + self.norm2(self.conv2(hidden))).relu()
        return output


class ResNet(nn.Sequential):
    """Residual blocks of two convolutions with batch normalization, on images of 8 x 8."""

    def __init__(self, channels: int = 8, blocks: int = 2) -> None:
        super().__init__(
            nn.Unflatten(1, (1, SIDE, SIDE)),
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            *(ResidualBlock(channels) for _ in range(blocks)),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * SIDE * SIDE // 4, CLASSES),
        )


class PixelLSTM(nn.Module):
    """Reads the image, pooled to 4 x 4, pixel by pixel, and names the digit after the last one."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.pool = nn.Sequential(nn.Unflatten(1, (1, SIDE, SIDE)), nn.AvgPool2d(2), nn.Flatten())
        self.lstm = nn.LSTM(1, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.pool(x).unsqueeze(-1))
        logits: Tensor = self.head(states[:, -1])
        return logits


class RowTransformer(nn.Module):
    """A pre-norm Transformer whose tokens are the rows of the image."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(SIDE, width)
        self.position = nn.Parameter(torch.randn(SIDE, width) * 0.02)
        block = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x.unflatten(1, (SIDE, SIDE))) + self.position
        logits: Tensor = self.head(self.blocks(tokens).mean(1))
        return logits


def _sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)


def _adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=3e-3, weight_decay=0.01)


def _adamw_fast(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=2e-2, weight_decay=0.01)


# name: network, optimizer
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Optimizer]]] = {
    "MLP": (MLP, _adamw),
    "ResNet": (ResNet, _sgd),
    "LSTM": (PixelLSTM, _adamw_fast),
    "Transformer": (RowTransformer, _adamw),
}


class DigitClassifier(L.LightningModule):
    """Cross-entropy with smoothed labels, so that the loss does not fall to zero, around one of the networks.

    Args:
        name: One of ``NETWORKS``.
    """

    input_scale: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        make_net, self.make_optimizer = NETWORKS[name]
        self.net = make_net()
        Auto().apply(self.net)
        # So that every network has a buffer on which its outputs depend.
        self.register_buffer("input_scale", torch.ones(PIXELS))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, pixels)`` to logits ``(batch, classes)``."""
        logits: Tensor = self.net(images * self.input_scale)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels, label_smoothing=0.1)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())
