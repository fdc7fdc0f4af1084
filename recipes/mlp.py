"""A deep multilayer perceptron on handwritten digits: three ways in which it fails, each healed by the callbacks alone.

Scenario ``vanishing``: 30 linear layers with ReLU and PyTorch's own initialisation, Adam at 0.001. That initialisation
gives weights a sixth of the variance that ReLU needs: signals lose more than half their size in every layer, and so do
gradients on the way back. The last layers see the same for every image, the first ones get next to no gradient, and the
network stays at chance. Kaiming's initialisation alone heals it.

Scenario ``exploding``: 20 layers, weights from a normal distribution with a standard deviation of 0.3, SGD with
momentum at 0.01. That is 1.7 times what ReLU needs for 64 units: signals and gradients grow in every layer, the first
step throws the weights far off, and soon after they are NaN. LSUV, which scales each layer on the first batch, heals it
at the same learning rate; clipping and a warm-up stand by, and without LSUV they keep the loss finite, no more.

Scenario ``poisoned``: a sound network of five layers, but one batch in a hundred holds a NaN. The first one makes every
weight of the plain network NaN; the guard skips these steps.

Run it with ``python -m recipes.mlp``; ``configs/mlp.yaml`` holds every default, ``configs/mlp/`` the scenarios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from recipes._classifier import ImageClassifier
from recipes._main import run_recipe

__all__ = ["DeepMLP", "main"]

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
        norm: What stands between a hidden layer and its activation: batch or layer normalisation, or none.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line and return the exit code."""
    return run_recipe("mlp", argv)


if __name__ == "__main__":
    raise SystemExit(main())
