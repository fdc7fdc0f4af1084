"""Recurrent networks: one that reads an image pixel by pixel, one that continues a wave."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import R2Score

from recipes.models._training import ImageClassifier, ShardableModule

__all__ = ["CellName", "PixelRNN", "SineRNN"]

CellName = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]


class PixelRNN(ImageClassifier):
    """Reads an image one pixel a time step and names its class after the last one.

    Args:
        inputs: Shape of one sample; it is flattened, so that an image of 8 x 8 is a sequence of 64 steps.
        outputs: Number of classes.
        optimizer: Makes the optimizer from the parameters.
        cell: What carries the state from step to step: an LSTM, a GRU, or the plain recurrence with tanh or ReLU.
        hidden_size: Units of each recurrent layer.
        num_layers: Recurrent layers.
        recurrent_std: Standard deviation of a normal distribution to draw the hidden-to-hidden weights from, as
            careless code does; null leaves PyTorch's default.

    Raises:
        ValueError: If ``recurrent_std`` is not a finite number above 0.

    Example:
        >>> model = PixelRNN(torch.Size([1, 8, 8]), 10, torch.optim.Adam, cell="gru", hidden_size=16)
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        inputs: torch.Size,
        outputs: int,
        optimizer: OptimizerCallable,
        cell: CellName = "lstm",
        hidden_size: PositiveInt = 64,
        num_layers: PositiveInt = 1,
        recurrent_std: float | None = None,
    ) -> None:
        super().__init__(outputs, optimizer)
        self.recurrent = _recurrent(cell, 1, hidden_size, num_layers, recurrent_std)
        self.head = nn.Linear(hidden_size, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, *inputs)`` to logits ``(batch, outputs)``."""
        states, _ = self.recurrent(images.flatten(1).unsqueeze(-1))
        logits: Tensor = self.head(states[:, -1])
        return logits


class SineRNN(ShardableModule):
    """Reads a wave and predicts how it goes on: regression with the squared error.

    It logs R², the share of the variance that the prediction explains: 1 is perfect, 0 is what the mean would get, and
    below 0 the network does worse than that.

    Args:
        inputs: Shape of one sample, ``(steps, features)``.
        outputs: How many values to predict.
        optimizer: Makes the optimizer from the parameters.
        cell: What carries the state from step to step: an LSTM, a GRU, or the plain recurrence with tanh or ReLU.
        hidden_size: Units of each recurrent layer.
        num_layers: Recurrent layers.
        recurrent_std: Standard deviation of a normal distribution to draw the hidden-to-hidden weights from; null
            leaves PyTorch's default.

    Raises:
        ValueError: If ``recurrent_std`` is not a finite number above 0.

    Example:
        >>> model = SineRNN(torch.Size([48, 1]), 8, torch.optim.Adam, hidden_size=16)
        >>> model(torch.zeros(5, 48, 1)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        inputs: torch.Size,
        outputs: int,
        optimizer: OptimizerCallable,
        cell: CellName = "rnn_tanh",
        hidden_size: PositiveInt = 64,
        num_layers: PositiveInt = 1,
        recurrent_std: float | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.recurrent = _recurrent(cell, inputs[-1], hidden_size, num_layers, recurrent_std)
        self.head = nn.Linear(hidden_size, outputs)
        self.val_r2 = R2Score()
        self.test_r2 = R2Score()

    def forward(self, waves: Tensor) -> Tensor:
        """Map ``(batch, steps, features)`` to the next values ``(batch, outputs)``."""
        states, _ = self.recurrent(waves)
        values: Tensor = self.head(states[:, -1])
        return values

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        waves, values = batch
        loss = nn.functional.mse_loss(self(waves), values)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        waves, values = batch
        self.val_r2(self(waves).flatten(), values.flatten())
        self.log("val/r2", self.val_r2)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        waves, values = batch
        self.test_r2(self(waves).flatten(), values.flatten())
        self.log("test/r2", self.test_r2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def _recurrent(
    cell: CellName, features: int, hidden_size: int, num_layers: int, recurrent_std: float | None
) -> nn.RNNBase:
    if recurrent_std is not None and not 0 < recurrent_std < math.inf:
        raise ValueError(f"`recurrent_std` must be a finite number > 0 or None, got {recurrent_std}")
    layers: nn.RNNBase
    if cell == "lstm":
        layers = nn.LSTM(features, hidden_size, num_layers, batch_first=True)
    elif cell == "gru":
        layers = nn.GRU(features, hidden_size, num_layers, batch_first=True)
    else:
        nonlinearity = cell.removeprefix("rnn_")
        layers = nn.RNN(features, hidden_size, num_layers, nonlinearity=nonlinearity, batch_first=True)
    if recurrent_std is not None:
        for name, weight in layers.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.normal_(weight, std=recurrent_std)
    return layers
