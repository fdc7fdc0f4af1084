"""The network under study: linear layers of one width with an activation between them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import nn

__all__ = ["ACTIVATIONS", "ActivationName", "network"]

ActivationName = Literal["relu", "tanh", "sigmoid", "gelu"]

ACTIVATIONS: dict[ActivationName, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}


def network(inputs: int, outputs: int, activation: ActivationName, depth: int, width: int) -> nn.Sequential:
    """Make a plain deep network, without normalization and without skip connections.

    Args:
        inputs: Features of a sample.
        outputs: Logits.
        activation: What stands between the linear layers; nothing follows the last.
        depth: Linear layers, the last one included.
        width: Units of each hidden layer.

    Returns:
        The network, initialized as PyTorch does.

    Example:
        >>> print(network(64, 10, "tanh", depth=2, width=32))
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=True)
          (1): Tanh()
          (2): Linear(in_features=32, out_features=10, bias=True)
        )
    """
    sizes = [inputs, *[width] * (depth - 1)]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
