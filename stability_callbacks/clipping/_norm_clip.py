"""Clipping by the total norm."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from stability_callbacks._validation import check_number
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.gradient_pass import GradientNorms, Parameters, named_gradients, scale_gradients_

__all__ = ["NormClip", "norm_clip_coefficient"]


def norm_clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    r"""The factor that brings a gradient of a given norm down to ``max_norm``; 1 if the norm is not finite.

    .. math:: c = \min\Big(1, \frac{\text{max\_norm}}{\lVert g \rVert + 10^{-6}}\Big)

    Args:
        norm: Total norm, 0-dim.
        max_norm: Largest norm allowed.

    Returns:
        0-dim, in ``(0, 1]``.

    Example:
        >>> norm_clip_coefficient(torch.tensor(float("nan")), 1.0)
        tensor(1.)
    """
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return torch.where(torch.isfinite(norm), coefficient, torch.ones_like(coefficient))


class NormClip(ClipRule):
    r"""Scale all gradients by one factor so that their total norm stays within a bound: the standard remedy.

    Keeps the gradient's direction. Use it against exploding gradients everywhere, and always for recurrent networks.

    .. math:: g \leftarrow g \cdot \min\Big(1, \frac{\text{max\_norm}}{\lVert g \rVert_p + 10^{-6}}\Big)

    Equal to :func:`torch.nn.utils.clip_grad_norm_` on finite gradients, to the bit in float32 and float64; in half
    precision the norm is more exact. Unlike there, a NaN or an infinity does not spread to all gradients: they stay
    untouched.

    Args:
        max_norm: Largest total norm, > 0. Default 1.0.
        norm_type: The ``p`` of the norm: a positive number or ``inf``. Default 2.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is not positive.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> _ = NormClip(max_norm=1.0).clip_([weight])
        >>> weight.grad
        tensor([0.6000, 0.8000])

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (2013), arXiv 1211.5063.
    """

    linear: ClassVar[bool] = True

    def __init__(self, max_norm: float = 1.0, norm_type: float = 2.0) -> None:
        self.max_norm = check_number("max_norm", max_norm, above=0)
        self.norm_type = check_number("norm_type", norm_type, above=0, allow_inf=True)

    def __repr__(self) -> str:
        return f"NormClip(max_norm={self.max_norm:g}, norm_type={self.norm_type:g})"

    @property
    def threshold(self) -> float:
        return self.max_norm

    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        pairs = named_gradients(parameters)
        norms = self.measure(pairs, norms)
        coefficient = norm_clip_coefficient(norms.total, self.max_norm)
        scale_gradients_(pairs, coefficient)
        return ClipResult(norms.total, norms.total * coefficient, coefficient)
