"""A deep multilayer perceptron."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from recipes.models._training import ImageClassifier

__all__ = ["ActivationName", "DeepMLP", "NormName"]

ActivationName = Literal["relu", "leaky_relu", "elu", "gelu", "tanh", "sigmoid"]
NormName = Literal["none", "batch", "layer"]

ACTIVATIONS: dict[ActivationName, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class DeepMLP(ImageClassifier):
    """Linear layers in a row, without skip connections, that name the class of an image.

    Args:
        inputs: Shape of one sample; it is flattened.
        outputs: Number of classes.
        optimizer: Makes the optimizer from the parameters.
        depth: Linear layers, the last one included.
        width: Units of each hidden layer.
        activation: What follows each hidden layer.
        norm: What stands between a hidden layer and its activation: batch or layer normalization, or none.
        weight_norm: Whether each weight is g * v / ||v||, row by row, with g and v learned.
        init_std: Standard deviation of a normal distribution to draw all weights from, with biases of zero, as careless
            code does; null leaves PyTorch's default.

    Raises:
        ValueError: If ``init_std`` is not a finite number above 0.

    Example:
        >>> model = DeepMLP(torch.Size([8, 8]), 10, torch.optim.Adam, depth=3, width=16)
        >>> model(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        inputs: torch.Size,
        outputs: int,
        optimizer: OptimizerCallable,
        depth: PositiveInt = 30,
        width: PositiveInt = 64,
        activation: ActivationName = "relu",
        norm: NormName = "none",
        weight_norm: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__(outputs, optimizer)
        if init_std is not None and not 0 < init_std < math.inf:
            raise ValueError(f"`init_std` must be a finite number > 0 or None, got {init_std}")
        *hidden, last = pairwise([inputs.numel(), *[width] * (depth - 1), outputs])
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in hidden:
            layers += [_linear(fan_in, fan_out, weight_norm, init_std), *_norm(norm, width), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers, _linear(*last, weight_norm, init_std))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, *inputs)`` to logits ``(batch, outputs)``."""
        logits: Tensor = self.layers(images)
        return logits


def _linear(fan_in: int, fan_out: int, weight_norm: bool, init_std: float | None) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    if init_std is not None:
        nn.init.normal_(layer.weight, std=init_std)
        nn.init.zeros_(layer.bias)
    return parametrizations.weight_norm(layer) if weight_norm else layer


def _norm(name: NormName, width: int) -> list[nn.Module]:
    if name == "none":
        return []
    return [nn.BatchNorm1d(width) if name == "batch" else nn.LayerNorm(width)]
