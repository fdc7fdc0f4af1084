"""What is measured of one network: the gradient of each layer's weights, and the signal that comes out of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recipes.gradient_flow._digits import Batch
from stability_callbacks.gradient_pass import tensor_norms

__all__ = ["Measurement", "measure"]


class Measurement(NamedTuple):
    """One network on one batch, layer by layer from the input to the output.

    Attributes:
        gradient_norms: Norm of the gradient of each linear layer's weights. Biases are left out: the gradient of the
            last one stays large whatever becomes of the signal.
        signal_stds: By how much each linear layer's output differs from sample to sample: root of the variance over the
            batch, averaged over the units.
    """

    gradient_norms: tuple[float, ...]
    signal_stds: tuple[float, ...]

    @property
    def first(self) -> float:
        """Gradient norm of the layer next to the input."""
        return self.gradient_norms[0]

    @property
    def last(self) -> float:
        """Gradient norm of the layer that makes the logits."""
        return self.gradient_norms[-1]

    @property
    def ratio(self) -> float:
        """First over last; NaN for 0/0."""
        return _quotient(self.first, self.last)

    @property
    def inner_ratio(self) -> float:
        """The same between layers of one shape, the second and the last but one; NaN in networks of less than four."""
        return _quotient(self.gradient_norms[1], self.gradient_norms[-2]) if len(self.gradient_norms) > 3 else math.nan

    @property
    def signal(self) -> float:
        """Signal that comes out of the last hidden layer, before its activation; of a single layer, its own."""
        return self.signal_stds[-2] if len(self.signal_stds) > 1 else self.signal_stds[-1]


def measure(model: nn.Sequential, batch: Batch) -> Measurement:
    """Pass a batch through a classifier and its gradient back.

    Norms are taken in float64 of the gradients as they are, so that a zero is a gradient whose every element is zero in
    the network's precision; in float32 the squares of elements below 1e-23 would be zero already.

    Args:
        model: Linear layers, and others without parameters. Its ``.grad`` is replaced.
        batch: Inputs and labels.

    Returns:
        The norms and signals.
    """
    inputs, labels = batch
    signals: list[float] = []
    model.zero_grad()
    for layer in model:
        inputs = layer(inputs)
        if isinstance(layer, nn.Linear):
            signals.append(_std_over_batch(inputs))
    cross_entropy(inputs, labels).backward()
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    norms = tensor_norms([weight.grad.double() for weight in weights if weight.grad is not None])
    return Measurement(tuple(norms.tolist()), tuple(signals))


@torch.no_grad()
def _std_over_batch(outputs: Tensor) -> float:
    return float(outputs.double().var(0, correction=0).mean().sqrt())


def _quotient(first: float, last: float) -> float:
    if last != 0:
        return first / last
    return math.inf if first > 0 else math.nan
