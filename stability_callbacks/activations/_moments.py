"""Mean, standard deviation and signal of activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stability_callbacks.gradient_pass import local_values

__all__ = ["Moments", "measure_moments", "precise"]


class Moments(NamedTuple):
    """Statistics of a tensor, on the host. Numbers that do not exist are NaN.

    Attributes:
        elements: Number of elements.
        mean: Mean.
        variance: Variance, without Bessel's correction.
        signal_variance: The part of it that depends on the sample: variance over the first dimension, averaged over the
            others. The same as ``variance`` where the first dimension has size 1.
    """

    elements: int = 0
    mean: float = math.nan
    variance: float = math.nan
    signal_variance: float = math.nan

    @property
    def std(self) -> float:
        """Standard deviation."""
        return math.sqrt(self.variance)

    @property
    def signal(self) -> float:
        """Standard deviation over the samples."""
        return math.sqrt(self.signal_variance)

    @staticmethod
    def of(tensor: Tensor) -> Moments:
        """The statistics of a tensor; waits for the device.

        Example:
            >>> moments = Moments.of(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
            >>> moments.elements, moments.mean, moments.variance, moments.signal_variance
            (4, 1.5, 1.25, 1.0)
        """
        values = precise(tensor)
        return Moments(values.numel(), *measure_moments(values).tolist()) if values.numel() else Moments()

    @staticmethod
    def pooled(parts: Sequence[Moments]) -> Moments:
        """The statistics of several tensors taken together, such as the outputs of several calls of one module.

        The signal is that of each by itself, averaged.
        """
        parts = [part for part in parts if part.elements]
        total = sum(part.elements for part in parts)
        if not total:
            return Moments()
        mean = sum(part.elements * part.mean for part in parts) / total
        variance = sum(part.elements * (part.variance + (part.mean - mean) ** 2) for part in parts) / total
        return Moments(total, mean, variance, sum(part.elements * part.signal_variance for part in parts) / total)


@torch.no_grad()
def measure_moments(tensor: Tensor) -> Tensor:
    r"""Mean, variance and signal variance of a tensor, without waiting for the device.

    .. math:: \bar y = \tfrac 1 n \sum_i y_i, \quad \tfrac 1 n \sum_i (y_i - \bar y)^2, \quad
        \operatorname{mean}_j \operatorname{var}_b \, y_{b j}

    Args:
        tensor: Any tensor with elements; of a sharded one the local shard counts.

    Returns:
        Shape ``[3]``, on the tensor's device, float64 (float32 on MPS).

    Example:
        >>> measure_moments(torch.tensor([[0.0, 1.0], [2.0, 3.0]])).tolist()
        [1.5, 1.25, 1.0]
    """
    values = precise(tensor)
    variance, mean = torch.var_mean(values, correction=0)
    signal = values.var(0, correction=0).mean() if values.ndim and len(values) > 1 else variance
    return torch.stack([mean, variance, signal])


def precise(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in float64, in which squares of tiny and huge ones exist; MPS has only float32."""
    values = local_values(tensor.detach())
    if values.is_complex():
        values = torch.view_as_real(values)
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
